"""Shard sets: written by `write_demo`, `write_folder`, `write_latents`, `write_tokens`, read by `ShardDataModule`."""

from flextok_pl.data.datamodule import ShardDataModule
from flextok_pl.data.demo import write_demo
from flextok_pl.data.folder import write_folder
from flextok_pl.data.index import ShardError, ShardIndex
from flextok_pl.data.latents import write_latents
from flextok_pl.data.tokens import write_tokens
from flextok_pl.data.transforms import Augmentation

__all__ = [
    "Augmentation",
    "ShardDataModule",
    "ShardError",
    "ShardIndex",
    "write_demo",
    "write_folder",
    "write_latents",
    "write_tokens",
]
