"""Offline jobs, one a module."""
