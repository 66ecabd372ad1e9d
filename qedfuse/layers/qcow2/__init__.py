"""qcow2 images, read-only."""
