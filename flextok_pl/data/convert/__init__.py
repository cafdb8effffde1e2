"""From pictures of any source to shard sets."""
