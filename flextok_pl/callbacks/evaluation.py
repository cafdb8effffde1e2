"""What the evaluation callbacks share: checks of module, data and batch, and the facts that a protocol states."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.callbacks.ema import EMA
from flextok_pl.contracts import Reconstructor, weights_hash
from flextok_pl.data import ShardDataModule
from flextok_pl.runtime.sharding import CURRENT_STATE


def module_reconstructor(pl_module: LightningModule) -> Reconstructor:
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


def model_hashes(pl_module: LightningModule) -> dict[str, str]:
    """`weights_hash` of the tokenizer, as token shards name it, and of the prior; of the module if it has neither."""
    parts = {"tokenizer_hash": module_reconstructor(pl_module), "prior_hash": getattr(pl_module, "prior", None)}
    known = {name: weights_hash(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    return known or {"module_hash": weights_hash(pl_module)}


def extractor_facts(network: FeatureExtractor) -> dict[str, str]:
    """What a protocol states of the features."""
    return {
        "extractor": network.name,
        "extractor_weights_hash": network.weights_hash,
        "extractor_resize": network.resize,
    }


def bits_per_token(reconstructor: Reconstructor) -> float | None:
    """log2 of the vocabulary, the most that a token can say; None where the tokenizer does not state it."""
    vocab_size = getattr(getattr(reconstructor, "config", None), "vocab_size", None)
    return None if vocab_size is None else math.log2(vocab_size)


def decoding_facts(
    reconstructor: Reconstructor, num_steps: int, guidance: str, guidance_scale: float
) -> dict[str, Any]:
    """What a protocol states of the decoding, given what was asked for: a tokenizer that regresses takes one step."""
    if getattr(getattr(reconstructor, "config", None), "objective", "flow") == "mse":
        num_steps, guidance, guidance_scale = 1, "none", 1.0
    return {"num_steps": num_steps, "solver": "euler", "guidance": guidance, "guidance_scale": guidance_scale}


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


def batch_images(batch: Any, dataloader_idx: int = 0) -> tuple[Tensor, list[str]]:
    """Images (B, 3, H, W) in [-1, 1] and keys of an evaluation batch.

    Raises:
        MisconfigurationException: there are none, or there are several loaders.
    """
    if dataloader_idx:
        raise MisconfigurationException("evaluation takes one dataloader per split; combine the shard sets into one")
    missing = [name for name in ("image", "key") if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        held = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise _without_images("an evaluation batch", missing, held)
    return batch["image"], list(batch["key"])


def check_images(trainer: Trainer) -> None:
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


def versions() -> dict[str, str]:
    """Versions of the packages that a number depends on, and the commit where they run from a checkout."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for package in ("flextok_pl", "lightning", "torchmetrics", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists() and shutil.which("git"):
        asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
        found["commit"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
    return found
