"""Train, evaluate and use FlexTok with PyTorch Lightning.

The names below are imported at first use, so that `import flextok_pl` and the command start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok_pl.assets import DEMO_PRIOR, DEMO_TOKENIZER, DEMO_VAE
    from flextok_pl.callbacks import GenerationFID, ReconstructionFID
    from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
    from flextok_pl.data import ShardDataModule
    from flextok_pl.models.adaptive import Quality
    from flextok_pl.models.any_size import reconstruct
    from flextok_pl.models.prior import Prior
    from flextok_pl.models.tokenizer import FlexTok
    from flextok_pl.models.vae import VAE
    from flextok_pl.modules import PriorModule, TokenizerModule, VAEModule
    from flextok_pl.runtime import Trainer

__all__ = [
    "DEMO_PRIOR",
    "DEMO_TOKENIZER",
    "DEMO_VAE",
    "VAE",
    "FlexTok",
    "FlexTokConfig",
    "GenerationFID",
    "Prior",
    "PriorConfig",
    "PriorModule",
    "Quality",
    "ReconstructionFID",
    "ShardDataModule",
    "TokenizerModule",
    "Trainer",
    "VAEConfig",
    "VAEModule",
    "reconstruct",
]

_HOMES = {
    "assets": ("DEMO_PRIOR", "DEMO_TOKENIZER", "DEMO_VAE"),
    "callbacks": ("GenerationFID", "ReconstructionFID"),
    "config": ("FlexTokConfig", "PriorConfig", "VAEConfig"),
    "data": ("ShardDataModule",),
    "models.adaptive": ("Quality",),
    "models.any_size": ("reconstruct",),
    "models.prior": ("Prior",),
    "models.tokenizer": ("FlexTok",),
    "models.vae": ("VAE",),
    "modules": ("PriorModule", "TokenizerModule", "VAEModule"),
    "runtime": ("Trainer",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
