"""The kernel's requests as calls of the engine; nothing of processes."""
