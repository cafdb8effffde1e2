"""Shard sets: written by the `write_...` functions, read by `ShardDataModule`.

The names below are imported when they are first used, so that what only looks at shards does without Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "Augmentation": "transforms",
    "ShardDataModule": "datamodule",
    "ShardError": "index",
    "ShardIndex": "index",
    "write_demo": "demo",
    "write_folder": "folder",
    "write_imagenet": "imagenet",
    "write_latents": "latents",
    "write_parquet": "parquet",
    "write_resharded": "reshard",
    "write_tokens": "tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"flextok_pl.data.{_HOMES[name]}"), name)
