"""Train, evaluate and use FlexTok with PyTorch Lightning.

The names below are imported when they are first used, so that `import flextok_pl` and the command start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok_pl.assets import DEMO_PRIOR, DEMO_TOKENIZER, DEMO_VAE
    from flextok_pl.callbacks import GenerationFID, ReconstructionFID
    from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
    from flextok_pl.data import ShardDataModule
    from flextok_pl.models.adaptive import Quality
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
]

_HOMES = {
    "DEMO_PRIOR": "flextok_pl.assets",
    "DEMO_TOKENIZER": "flextok_pl.assets",
    "DEMO_VAE": "flextok_pl.assets",
    "VAE": "flextok_pl.models.vae",
    "FlexTok": "flextok_pl.models.tokenizer",
    "FlexTokConfig": "flextok_pl.config",
    "GenerationFID": "flextok_pl.callbacks",
    "Prior": "flextok_pl.models.prior",
    "PriorConfig": "flextok_pl.config",
    "PriorModule": "flextok_pl.modules",
    "Quality": "flextok_pl.models.adaptive",
    "ReconstructionFID": "flextok_pl.callbacks",
    "ShardDataModule": "flextok_pl.data",
    "TokenizerModule": "flextok_pl.modules",
    "Trainer": "flextok_pl.runtime",
    "VAEConfig": "flextok_pl.config",
    "VAEModule": "flextok_pl.modules",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
