"""LightningModules: `VAEModule` (stage 0) and `TokenizerModule` (stage 1)."""

from flextok_pl.modules.tokenizer import TokenizerModule
from flextok_pl.modules.vae import VAEModule

__all__ = ["TokenizerModule", "VAEModule"]
