"""What ships with the package: the demo's models, and published numbers; how they were made is in README.md."""

from pathlib import Path

DEMO_VAE = Path(__file__).with_name("vae_demo")
"""Folder of the demo autoencoder, which diffusers reads too."""

DEMO_TOKENIZER = Path(__file__).with_name("tokenizer_demo.safetensors")
"""The demo tokenizer, its autoencoder included: 64 px pictures, 64 tokens."""

DEMO_PRIOR = Path(__file__).with_name("prior_demo.safetensors")
"""The demo prior of the nine emoji groups, for the demo tokenizer's tokens."""

EXAMPLES = Path(__file__).with_name("examples")
"""Folder of some of the demo's pictures that the demo tokenizer has not been trained on."""

PUBLISHED = Path(__file__).with_name("published.json")
"""FIDs of other models by data set and number of tokens, with their sources."""
