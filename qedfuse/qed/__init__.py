"""The QED format and its read-write engine, which owns the write order."""
