"""Consistency and repair of an image that is closed."""
