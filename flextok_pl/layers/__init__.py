"""Building blocks of the networks, in plain PyTorch."""
