"""Measures how much of the codebook a tokenizer uses, and the information of each token position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from flextok_pl.callbacks.evaluation import EvaluationCallback, Split
from flextok_pl.callbacks.loggers import log_results
from flextok_pl.callbacks.trainer_facts import model_facts, require_image_shards, source_of, tokenizer_of
from flextok_pl.contracts import run_folder
from flextok_pl.distributed import gather_rows
from flextok_pl.evaluation.options import validations_between
from flextok_pl.evaluation.pictures import figure_to_image, save_png
from flextok_pl.evaluation.protocol import versions
from flextok_pl.evaluation.report import write_json
from flextok_pl.metrics.codes import class_information, codebook_use, distinct_tokens, perplexity, position_entropy
from flextok_pl.precision import MEASURED_IN


@dataclass(eq=False)
class CodebookReport(EvaluationCallback):
    """Report the use of the codebook over a validation or test set.

    Logs scalars under the split: `codes/distinct`, `codes/use` (fraction of the vocabulary, if the tokenizer's config
    states it), `codes/perplexity`, and `codes/entropy` (bits per token, mean over positions). Adds a picture of the
    entropy by position and a histogram of the tokens. A test also measures the information of each position about the
    class, if samples have one, and writes `codes.json` and `codes.png`. Only the encoder runs, while batches are
    evaluated, so that it has averaged weights.

    Args:
        every_n_validations: during a fit, report in every n-th validation; 0 for never.
        max_batches: batches per process to tokenize; null for all.
        output_dir: folder for the files of a test; null for the trainer's log directory.
        every_n_epochs: the former name of `every_n_validations`.
    """

    every_n_validations: int = 1
    max_batches: int | None = None
    output_dir: Path | str | None = None
    every_n_epochs: int | None = None

    def __post_init__(self) -> None:
        self.every_n_validations = validations_between(self.every_n_validations, self.every_n_epochs)
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(f"max_batches={self.max_batches} must be at least 1")
        self.values: dict[str, float] = {}  # tag -> value of the latest report
        self._tokens: list[Tensor] = []
        self._labels: list[Tensor] = []

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without tokens, and a validation set without images."""
        tokenizer_of(pl_module)
        require_image_shards(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Forget the tokens of the previous pass."""
        self._tokens, self._labels = [], []

    def measure(self, pl_module: LightningModule, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Tokenize one batch."""
        if self.max_batches is None or batch_idx < self.max_batches:
            images = batch["image"]
            self._tokens.append(tokenizer_of(pl_module).tokenize(images).cpu())
            self._labels.append(batch["label"].cpu() if "label" in batch else torch.full((len(images),), -1))

    def report(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Report on the tokens of all processes; a test writes files."""
        tokenizer = tokenizer_of(pl_module)
        none = torch.zeros(0, dtype=torch.int64)
        tokens = gather_rows(torch.cat(self._tokens or [none.reshape(0, tokenizer.num_registers)]))  # (N, K)
        labels = gather_rows(torch.cat(self._labels or [none]))  # (N,)
        if len(tokens) == 0:
            return
        entropy = position_entropy(tokens)
        vocab_size = getattr(getattr(tokenizer, "config", None), "vocab_size", None)
        tell = split == "test" and bool((labels >= 0).any())  # twenty permutations are too many for every validation
        information = class_information(tokens, labels) if tell else None
        totals = {
            "distinct": float(distinct_tokens(tokens)),
            "perplexity": perplexity(tokens),
            "entropy": float(entropy.mean()),
        }
        if vocab_size is not None:
            totals["use"] = codebook_use(tokens, vocab_size)
        self.values = {f"{split}/codes/{name}": value for name, value in totals.items()}
        picture = plot_positions(entropy, information, len(tokens), vocab_size)
        pictures = {f"{split}/codes/entropy_by_position": picture}
        histograms = {f"{split}/codes/tokens": tokens}
        log_results(trainer, pl_module, self.step_of(trainer), self.values, pictures, histograms)
        folder = run_folder(trainer) if self.output_dir is None else Path(self.output_dir).expanduser()
        if split == "test" and trainer.is_global_zero:
            protocol = {
                "num_samples": len(tokens),
                "split": split,
                "reference": source_of(trainer, split),
                "vocab_size": vocab_size,
                "precision": MEASURED_IN,
                **model_facts(pl_module),
                "model_weights": self.weights_of(trainer),
                "step": self.step_of(trainer),
                "versions": versions(),
            }
            rows = {"position_entropy": entropy, "class_information": information}
            records = [{"metric": f"codes_{name}", "value": value, **protocol} for name, value in totals.items()]
            for name, row in rows.items():
                by_position = [] if row is None else enumerate(row.tolist(), start=1)
                records += [{"metric": name, "value": value, "position": i, **protocol} for i, value in by_position]
            write_json(records, folder / "codes.json")
            save_png(picture, folder / "codes.png")


def plot_positions(entropy: Tensor, information: Tensor | None, num_samples: int, vocab_size: int | None) -> Tensor:
    """Draw the entropy of each position below its upper limit, and its information about the class.

    Both are (K,) bits, estimated from as many samples; the picture is (3, H, W) uint8.
    """
    rows = {"entropy (bits)": entropy, "about the class (bits)": information}
    shown = {name: row for name, row in rows.items() if row is not None}
    figure = Figure(figsize=(6, 1 + 2 * len(shown)), layout="constrained")
    charts = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, (name, row) in zip(charts, shown.items(), strict=True):
        axes.bar(range(1, len(row) + 1), row.tolist(), width=1.0, edgecolor="white", linewidth=0.3)
        axes.set_ylabel(name)
    limit = min(num_samples, vocab_size or num_samples)
    charts[0].axhline(float(np.log2(limit)), color="gray", linestyle="--")
    charts[0].set_title(f"{num_samples} images; dashed: log2 {limit}, the upper limit", fontsize=9)
    charts[-1].set_xlabel("token position")
    return figure_to_image(figure)
