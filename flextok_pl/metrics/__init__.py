"""Distances between sets of features, and statistics of pixels and tokens."""
