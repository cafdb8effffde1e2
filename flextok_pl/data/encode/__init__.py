"""Shard sets that networks write from others: latents and tokens."""
