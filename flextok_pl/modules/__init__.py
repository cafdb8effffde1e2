"""LightningModules: `VAEModule` (stage 0), `TokenizerModule` (stage 1) and `PriorModule` (stage 2)."""

from flextok_pl.modules.prior import PriorModule
from flextok_pl.modules.tokenizer import TokenizerModule
from flextok_pl.modules.vae import VAEModule

__all__ = ["PriorModule", "TokenizerModule", "VAEModule"]
