"""Convert pictures from any source to shard sets."""
