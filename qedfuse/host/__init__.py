"""Everything that touches a host file or a thread."""
