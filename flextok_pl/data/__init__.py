"""Write shard sets with the `write_...` functions and read them with `ShardDataModule`.

The names below are imported at first use, so that code which only inspects shards does not import Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok_pl.data.convert.demo import write_demo as write_demo
    from flextok_pl.data.convert.folder import write_folder as write_folder
    from flextok_pl.data.convert.imagenet import write_imagenet as write_imagenet
    from flextok_pl.data.convert.parquet import write_parquet as write_parquet
    from flextok_pl.data.convert.reshard import write_resharded as write_resharded
    from flextok_pl.data.datamodule import ShardDataModule as ShardDataModule
    from flextok_pl.data.encode.latents import write_latents as write_latents
    from flextok_pl.data.encode.tokens import write_tokens as write_tokens
    from flextok_pl.data.shards.index import ShardError as ShardError
    from flextok_pl.data.shards.index import ShardIndex as ShardIndex
    from flextok_pl.data.transforms import Augmentation as Augmentation

_HOMES = {
    "Augmentation": "transforms",
    "ShardDataModule": "datamodule",
    "ShardError": "shards.index",
    "ShardIndex": "shards.index",
    "write_demo": "convert.demo",
    "write_folder": "convert.folder",
    "write_imagenet": "convert.imagenet",
    "write_latents": "encode.latents",
    "write_parquet": "convert.parquet",
    "write_resharded": "convert.reshard",
    "write_tokens": "encode.tokens",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"flextok_pl.data.{_HOMES[name]}"), name)
