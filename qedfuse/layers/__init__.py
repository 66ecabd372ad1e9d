"""What a disk is to a reader: layers of a backing chain, and where their bytes lie."""
