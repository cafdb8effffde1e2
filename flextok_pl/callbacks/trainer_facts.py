"""Gets from a trainer the module, data and batches of an evaluation.

Unsuitable ones raise Lightning's `MisconfigurationException`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from flextok_pl.contracts import GenerationModule, Reconstructor, weights_hash
from flextok_pl.data import ShardDataModule
from flextok_pl.evaluation.protocol import model_hashes


def tokenizer_of(pl_module: LightningModule) -> Reconstructor:
    """The tokenizer of a module."""
    reconstructor = getattr(pl_module, "reconstructor", None)
    if not isinstance(reconstructor, Reconstructor):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} has no `reconstructor` that can tokenize and detokenize, so it has no token "
            "budgets to evaluate: use this callback with a TokenizerModule, and remove it for a VAE"
        )
    return reconstructor


def generator_of(pl_module: LightningModule) -> GenerationModule:
    """The module, if it generates tokens."""
    if not isinstance(pl_module, GenerationModule):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} generates no tokens, so it has no generated images to evaluate: use this "
            "callback with a PriorModule, and remove it otherwise (gfid: null)"
        )
    return pl_module


def split_size(trainer: Trainer, split: str) -> int:
    """Samples in a split, over all processes."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "num_samples"):
        raise MisconfigurationException(
            "evaluation checks that each sample is seen exactly once: give the trainer a data module with "
            "num_samples(split), such as ShardDataModule, instead of plain loaders"
        )
    return int(data.num_samples(split))


def source_of(trainer: Trainer, split: str) -> Any:
    """The source of a split, if the data module states it."""
    return getattr(trainer.datamodule, "sources", {}).get(split)  # type: ignore[attr-defined]


def is_limited(trainer: Trainer, split: str) -> bool:
    """Whether the user limits the batches that are evaluated."""
    limit = trainer.limit_val_batches if split == "val" else trainer.limit_test_batches
    return limit != 1.0 or isinstance(limit, int)  # 1 is one batch, 1.0 is all of them


def require_images(batch: Any, dataloader_idx: int = 0) -> None:
    """Raise an error for an evaluation batch without images (B, 3, H, W) in [-1, 1] and keys."""
    if dataloader_idx:
        raise MisconfigurationException("evaluation takes one dataloader per split; combine the shard sets into one")
    missing = [name for name in ("image", "key") if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise _without_images("an evaluation batch", missing, held)


def require_image_shards(trainer: Trainer) -> None:
    """Raise an error for a validation set without images."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, ShardDataModule) and data.sources["val"] is not None:
        for index in data.shard_set("val").indices:
            if "image" not in index.fields:
                raise _without_images(str(index.where), ["image"], sorted(index.fields))


def _without_images(source: str, missing: Sequence[str], held: object) -> MisconfigurationException:
    return MisconfigurationException(
        f"{source} has no {' and no '.join(missing)}, it holds {held}: evaluate on shards with images (data.val and "
        "data.test), even if training reads latents or tokens"
    )


def model_facts(pl_module: LightningModule) -> dict[str, str]:
    """The hashes of the weights of a module's tokenizer and prior, or of the module if it has neither."""
    hashes = model_hashes(tokenizer_of(pl_module), getattr(pl_module, "prior", None))
    return hashes or {"module_hash": weights_hash(pl_module)}
