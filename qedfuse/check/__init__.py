"""Consistency and repair of an image that nobody has open."""
