"""Random generators and logging for the steps of every module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor

from flextok_pl.contracts import Batch
from flextok_pl.keys import sample_generators, text_generator
from flextok_pl.runtime.lightning_internals import logs_at


def step_generator(module: pl.LightningModule, seed: int, *position: int) -> torch.Generator:
    """A CPU generator that is a pure function of (seed, global step, position).

    The position separates what happens in one step: the index of the batch, if gradients are accumulated over several,
    and the rank, if ranks must draw different numbers.
    """
    return text_generator("/".join(map(str, (seed, module.global_step, *position))))


def evaluation_generators(seed: int, batch: Batch) -> list[torch.Generator]:
    """A CPU generator for each sample of an evaluation batch, from its key; batch, worker and rank do not matter."""
    if "key" not in batch:
        raise ValueError(
            f"evaluation draws the noise of a sample from its key, but the batches hold {sorted(batch)}: give each "
            "batch a list of keys as 'key', as ShardDataModule does"
        )
    return sample_generators(batch["key"], seed, "evaluation")


class SampleMeans:
    """Means over an evaluation's samples on all ranks, from means of batches.

    Lightning's `log` divides by a rounded number if ranks have seen different numbers of samples. Ranks communicate on
    `device`.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self._sums = torch.zeros(len(self.names) + 1, device=device)  # and the number of samples

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add the means of a batch of `count` samples."""
        row = torch.stack([values[name].detach().float() for name in self.names])
        self._sums += count * torch.cat([row, row.new_ones(1)])

    def log(self, module: pl.LightningModule) -> None:
        """Log the means. All ranks must call this, even without samples."""
        sums = module.trainer.strategy.reduce(self._sums, reduce_op="sum")
        module.log_dict(dict(zip(self.names, sums[:-1] / sums[-1], strict=True)), prog_bar=True, sync_dist=True)


def logging_now(module: pl.LightningModule) -> bool:
    """Whether the trainer writes its logs after the current step."""
    return logs_at(module.trainer, module.global_step + 1)


def log_means(module: pl.LightningModule, values: Mapping[str, Tensor], batch_size: int) -> None:
    """Log values of a training step when the trainer writes its logs, as means over all ranks."""
    if logging_now(module):
        reduce = module.trainer.strategy.reduce
        values = {name: reduce(value.detach().clone(), reduce_op="mean") for name, value in values.items()}
    module.log_dict(dict(values), batch_size=batch_size)
