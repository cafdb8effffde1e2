"""The format of shard sets: write, find, read, check and count them."""
