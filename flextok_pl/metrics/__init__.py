"""Compare sets of features; compute statistics of pixels and tokens."""
