"""LightningModules: `VAEModule` (stage 0), `TokenizerModule` (1), `PriorModule` (2) and `DistillationModule` (3)."""

from flextok_pl.modules.distillation import DistillationModule
from flextok_pl.modules.prior import PriorModule
from flextok_pl.modules.tokenizer import TokenizerModule
from flextok_pl.modules.vae import VAEModule

__all__ = ["DistillationModule", "PriorModule", "TokenizerModule", "VAEModule"]
