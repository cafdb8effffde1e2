"""Measure reconstructions and generated images at every token budget, without Lightning."""
