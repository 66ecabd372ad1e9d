"""Conversions that leave a disk's data where it is: a file becomes an image of another format."""
