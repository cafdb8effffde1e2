"""Shard sets: written by the `write_...` functions, read by `ShardDataModule`."""

from flextok_pl.data.datamodule import ShardDataModule
from flextok_pl.data.demo import write_demo
from flextok_pl.data.folder import write_folder
from flextok_pl.data.imagenet import write_imagenet
from flextok_pl.data.index import ShardError, ShardIndex
from flextok_pl.data.latents import write_latents
from flextok_pl.data.parquet import write_parquet
from flextok_pl.data.reshard import write_resharded
from flextok_pl.data.tokens import write_tokens
from flextok_pl.data.transforms import Augmentation

__all__ = [
    "Augmentation",
    "ShardDataModule",
    "ShardError",
    "ShardIndex",
    "write_demo",
    "write_folder",
    "write_imagenet",
    "write_latents",
    "write_parquet",
    "write_resharded",
    "write_tokens",
]
