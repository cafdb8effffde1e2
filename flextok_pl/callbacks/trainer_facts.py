"""What evaluations take of a trainer: the module, data and batches that suit them, the weights in use, the loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from flextok_pl.callbacks.ema import EMA
from flextok_pl.contracts import GenerationModule, Reconstructor, weights_hash
from flextok_pl.data import ShardDataModule
from flextok_pl.evaluation.protocol import model_hashes
from flextok_pl.runtime.sharding import CURRENT_STATE


def tokenizer_of(pl_module: LightningModule) -> Reconstructor:
    """The tokenizer of a module.

    Raises:
        MisconfigurationException: it has none.
    """
    reconstructor = getattr(pl_module, "reconstructor", None)
    if not isinstance(reconstructor, Reconstructor):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} has no `reconstructor` that can tokenize and detokenize, so it has no token "
            "budgets to evaluate: use this callback with a TokenizerModule, and remove it for a VAE"
        )
    return reconstructor


def generator_of(pl_module: LightningModule) -> GenerationModule:
    """A module that generates tokens.

    Raises:
        MisconfigurationException: it does not.
    """
    if not isinstance(pl_module, GenerationModule):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} generates no tokens, so it has no generated images to evaluate: use this "
            "callback with a PriorModule, and remove it otherwise (gfid: null)"
        )
    return pl_module


def split_size(trainer: Trainer, split: str) -> int:
    """Samples in a split, over all processes.

    Raises:
        MisconfigurationException: the data cannot say.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "num_samples"):
        raise MisconfigurationException(
            "evaluation checks that each sample is seen exactly once: give the trainer a data module with "
            "num_samples(split), such as ShardDataModule, instead of plain loaders"
        )
    return int(data.num_samples(split))


def source_of(trainer: Trainer, split: str) -> Any:
    """Where a split is from, where the data module says."""
    return getattr(trainer.datamodule, "sources", {}).get(split)  # type: ignore[attr-defined]


def is_limited(trainer: Trainer, split: str) -> bool:
    """Whether the user has only some of the batches evaluated."""
    limit = trainer.limit_val_batches if split == "val" else trainer.limit_test_batches
    return limit != 1.0 or isinstance(limit, int)  # 1 is one batch, 1.0 is all of them


def require_images(batch: Any, dataloader_idx: int = 0) -> None:
    """Refuse an evaluation batch without images (B, 3, H, W) in [-1, 1] and keys.

    Raises:
        MisconfigurationException: there are none, or there are several loaders.
    """
    if dataloader_idx:
        raise MisconfigurationException("evaluation takes one dataloader per split; combine the shard sets into one")
    missing = [name for name in ("image", "key") if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise _without_images("an evaluation batch", missing, held)


def require_image_shards(trainer: Trainer) -> None:
    """Refuse a validation set of shards without images.

    Raises:
        MisconfigurationException: it is one.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, ShardDataModule) and data.sources["val"] is not None:
        for index in data.shard_set("val").indices:
            if "image" not in index.fields:
                raise _without_images(str(index.where), ["image"], sorted(index.fields))


def _without_images(source: str, missing: Sequence[str], held: object) -> MisconfigurationException:
    return MisconfigurationException(
        f"{source} has no {' and no '.join(missing)}, it holds {held}: evaluate on shards with images (data.val and "
        "data.test), also where training reads latents or tokens"
    )


def checkpoint_facts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a protocol needs of a loaded checkpoint: whether it holds averaged weights, and its step."""
    return {"averaged": CURRENT_STATE in checkpoint, "global_step": int(checkpoint.get("global_step", 0))}


def model_facts(
    trainer: Trainer, pl_module: LightningModule, loaded: Mapping[str, Any] | None, hashed: bool = True
) -> dict[str, Any]:
    """What a protocol states of the model.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        loaded: `checkpoint_facts` of what it has loaded since its setup, if anything.
        hashed: also the hashes of the weights of its tokenizer and prior, or of the module where they have none.
    """
    hashes: dict[str, str] = {}
    if hashed:
        hashes = model_hashes(tokenizer_of(pl_module), getattr(pl_module, "prior", None))
        hashes = hashes or {"module_hash": weights_hash(pl_module)}
    return hashes | {"model_weights": weights_in_use(trainer, loaded), "step": evaluated_step(trainer, loaded)}


def weights_in_use(trainer: Trainer, loaded: Mapping[str, Any] | None) -> str:
    """Name the weights that the module has while batches are evaluated.

    Args:
        trainer: the running trainer.
        loaded: `checkpoint_facts` of what it has loaded since its setup, if anything.

    Returns:
        `ema`, `raw`, `initial` (an average that has not been updated yet holds the weights that training started from)
        or `loaded` (the module's own, about which the trainer knows nothing more).
    """
    average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    if trainer.state.fn == TrainerFn.FITTING:
        if average is None:
            return "raw"
        return "ema" if average.num_updates else "initial"
    from_average = average is not None and average.in_place if loaded is None else loaded["averaged"]
    return "ema" if from_average else "loaded"


def evaluated_step(trainer: Trainer, loaded: Mapping[str, Any] | None) -> int:
    """The training step whose weights are evaluated; 0 where nobody knows."""
    return trainer.global_step or (0 if loaded is None else int(loaded["global_step"]))


def log_evaluation(
    trainer: Trainer,
    pl_module: LightningModule,
    scalars: Mapping[str, float],
    pictures: Mapping[str, Tensor],
    loaded: Mapping[str, Any] | None,
    histograms: Mapping[str, Tensor] | None = None,
) -> None:
    """Give results to the loggers, and during a fit to the trainer, so that a checkpoint can be chosen by them.

    Args:
        trainer: the running trainer.
        pl_module: its module.
        scalars: tag -> value, equal on all ranks.
        pictures: tag -> (3, H, W) uint8.
        loaded: `checkpoint_facts`, or None.
        histograms: tag -> values, of any shape.
    """
    in_fit = trainer.state.fn == TrainerFn.FITTING
    if in_fit:
        pl_module.log_dict(dict(scalars), sync_dist=True)
    step = evaluated_step(trainer, loaded)
    for logger in trainer.loggers:
        if not in_fit:  # Lightning would print every one of them in a table of its own
            logger.log_metrics(dict(scalars), step=step)
        if not trainer.is_global_zero:
            continue
        if isinstance(logger, TensorBoardLogger):
            for tag, picture in pictures.items():
                logger.experiment.add_image(tag, picture, step)
            for tag, values in (histograms or {}).items():
                logger.experiment.add_histogram(tag, values, step)
        elif isinstance(logger, WandbLogger):
            for tag, picture in pictures.items():
                logger.log_image(tag, [picture.permute(1, 2, 0).cpu().numpy()], step)
