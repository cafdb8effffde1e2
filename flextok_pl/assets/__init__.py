"""What ships with the package: the demo's autoencoder and tokenizer. README.md beside it says how they were made."""

from pathlib import Path

DEMO_VAE = Path(__file__).with_name("vae_demo")
"""Folder of the demo autoencoder, which diffusers reads too."""

DEMO_TOKENIZER = Path(__file__).with_name("tokenizer_demo.safetensors")
"""The demo tokenizer, its autoencoder included: 64 px pictures, 64 tokens."""
