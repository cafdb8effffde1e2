"""LightningModules: `VAEModule` (stage 0), `TokenizerModule` (stage 1), `PriorModule` (stage 2), `DistillationModule`."""

from flextok_pl.modules.distillation import DistillationModule
from flextok_pl.modules.prior import PriorModule
from flextok_pl.modules.tokenizer import TokenizerModule
from flextok_pl.modules.vae import VAEModule

__all__ = ["DistillationModule", "PriorModule", "TokenizerModule", "VAEModule"]
