"""The format: shard sets on disk, written, found, read, checked and counted."""
