"""The process of a mount, and the commands that talk to it."""
