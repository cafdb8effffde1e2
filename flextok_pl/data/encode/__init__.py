"""Write latents and tokens of shard sets as new shard sets."""
