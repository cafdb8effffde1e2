"""Base of the evaluations of reconstructions and generated images: batches in, metrics per token budget out.

It measures each sample exactly once over all processes, and resumes after a kill.
"""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.contracts import ImageSize, Reconstructor, default_budgets
from flextok_pl.distributed import all_agree, gather_objects, gather_rows, rank, world_size
from flextok_pl.evaluation.decoding import decode, images_at_once
from flextok_pl.evaluation.kept_files import keep, kept_file, load_kept
from flextok_pl.evaluation.options import EvaluationOptions
from flextok_pl.evaluation.pictures import same_size
from flextok_pl.evaluation.protocol import bits_per_token, data_hash_text, decoding_facts, extractor_facts, versions
from flextok_pl.evaluation.report import Results
from flextok_pl.evaluation.statistics import BudgetStatistics, check_each_sample_once
from flextok_pl.flow.decoding import chosen_decoding
from flextok_pl.keys import choose_fraction, key_hash
from flextok_pl.metrics.feature_set import POOL_SIZE, FeatureSet
from flextok_pl.precision import MEASURED_IN
from flextok_pl.progress import announced
from flextok_pl.transfer import send

GRID_COLUMNS = 12
"""Most columns of the grid picture; with more budgets it shows powers of two."""

MEASURED = ("image", "key", "label", "text")
"""Fields of a batch that evaluations use."""

GridRow = tuple[Any, Any, dict[int, Tensor]]
"""Sort key of the row, its label, and its images by budget, (3, H, W) uint8."""


@dataclass(frozen=True)
class Context:
    """Facts of the data and the model for an evaluation."""

    num_samples: int  # samples of the data, over all processes
    split: Literal["val", "test"] = "test"
    limited: bool = False  # only some of the batches will come
    image_size: ImageSize | None = None  # in pixels; only a probe needs it
    data_hash: str | None = None  # identity of the data; None caches nothing of it on disk
    facts: Mapping[str, Any] = field(default_factory=dict)  # of data and model, for records
    in_fit: bool = False  # a validation of a training, which measures less and writes fewer files
    num_batches: float = math.inf  # batches that this process will give
    pause: Callable[[], None] = lambda: None  # called between decodings; may raise, to leave the evaluation


class BudgetEvaluation(ABC):
    """Base of the evaluations of reconstructions and generated images: `start`, `update` by batches, `finish`.

    The measuring networks are on `device`.
    """

    heading: ClassVar[str]  # heading of charts, and of the grid picture in TensorBoard
    picture: ClassVar[str]  # file of the grid picture
    tag: ClassVar[str] = ""  # part of a scalar's name between the split and the metric
    saved: ClassVar[tuple[str, ...]] = ("ids", "rows")
    """Attributes of plain types to save, with the statistics, for resuming."""

    context: Context
    budgets: list[int]
    statistics: BudgetStatistics[int]
    ids: list[int]  # of the finished samples
    rows: list[GridRow]  # of the grid picture
    num_made: int | None  # images to make over all processes; None for one of each sample

    def __init__(self, options: EvaluationOptions, device: torch.device | str = "cpu") -> None:
        self.options, self.device = options, torch.device(device)
        self.extractor = build_extractor(options.extractor, options.weights).to(self.device)

    @abstractmethod
    def start(self, model: Any, context: Context) -> None:
        """Start to measure a model, or resume an evaluation that was killed."""

    def _start(
        self,
        tokenizer: Reconstructor,
        context: Context,
        facts: Mapping[str, Any],
        num_made: int | None = None,
        reference: FeatureSet | None = None,
    ) -> None:
        """Start, with the facts of this kind of evaluation, and features of other real images than the data's."""
        options, expected = self.options, context.num_samples
        self.tokenizer, self.context, self.num_made = tokenizer, context, num_made
        self.decoding = options.decoding_of(tokenizer)
        self.budgets = options.budgets_up_to(tokenizer.num_registers, context.in_fit)
        self.fraction = min(1.0, (options.max_samples or expected) / expected) if context.in_fit else 1.0
        self.ids, self.rows = [], []
        self._waiting: list[dict[str, Any]] = []  # parts of batches, until there is a whole one
        self._batches_left = context.num_batches
        self._done_before: set[int] = set()  # samples of an earlier run that have not come again yet
        self._facts = {
            "split": context.split,
            "samples_in_split": expected,
            **extractor_facts(self.extractor),
            **decoding_facts(tokenizer, self.decoding),
            "seed": options.seed,
            "precision": MEASURED_IN,
            "device": self.device.type,
            "bits_per_token": bits_per_token(tokenizer),
            "model_weights": "loaded",
            **context.facts,
            **facts,
            "versions": versions(),
        }
        pool = min(1.0, POOL_SIZE / (expected * self.fraction))
        folder = options.cache_folder if context.data_hash else None
        self._kept: Path | None = None  # features of the real images
        if folder is not None and reference is None and not context.limited:
            network = self.extractor
            identity = [context.data_hash, network.name, network.weights_hash, network.resize, expected]
            self._kept = kept_file(folder, "", [*identity, self.fraction, pool])
            if all_agree(self._kept.is_file()):
                reference = load_kept(self._kept, FeatureSet.from_state_dict)
        self.statistics = self._statistics(pool, reference)
        self._unfinished: Path | None = None  # file of this evaluation's state
        if folder is not None and not context.in_fit and options.save_every_minutes is not None:
            self._go_on(folder)

    def _go_on(self, folder: Path) -> None:
        identity = {
            **self._facts,
            "kind": self.options.name,
            "options": self.options.identity,
            "data": self.context.data_hash,
            "process": [rank(), world_size()],
            "state": 2,  # version of the saved state
        }
        self._unfinished, self._saved_at = kept_file(folder, "unfinished_", identity), time.monotonic()
        state = load_kept(self._unfinished, dict) if self._unfinished.is_file() else None
        if state is not None and self.statistics.has_all_of(state["statistics"]):
            self.statistics.load_state_dict(state.pop("statistics"))
            vars(self).update(state)
            self._done_before = set(self.ids)
            if rank() == 0:
                name, count = self.options.name, len(self.ids)
                print(f"{name} resumes after {count} samples of an unfinished evaluation ({self._unfinished})")

    def _save_if_due(self) -> None:
        minutes = self.options.save_every_minutes
        if self._unfinished is not None and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes:
            state = {name: getattr(self, name) for name in self.saved}
            keep(self._unfinished, {"statistics": self.statistics.state_dict(), **state})
            self._saved_at = time.monotonic()

    def forget(self) -> None:
        """Delete the saved state, because the results are written."""
        if self._unfinished is not None:
            self._unfinished.unlink(missing_ok=True)

    @abstractmethod
    def _statistics(self, pool_fraction: float, real: FeatureSet | None) -> BudgetStatistics[int]:
        """Empty statistics that keep this share of the real images' features, or that already have all of them."""

    @abstractmethod
    def _measure(self, batch: Mapping[str, Any]) -> None:
        """Measure the samples of a batch, which may be empty."""

    @abstractmethod
    def _pictures(self) -> dict[str, Tensor]:
        """File name -> (3, H, W) uint8; called by all processes."""

    @abstractmethod
    def _measured(self) -> str:
        """Describe in a few words what was measured."""

    def update(self, batch: Mapping[str, Any]) -> None:
        """Measure the samples of a batch that were not measured before a kill.

        It has at least `image`, (B, 3, H, W) in [-1, 1], and `key`, B texts. A fit measures only a few
        samples of a batch. They wait for more of the same size, as long as further batches are expected.
        """
        keys = batch["key"]
        hashes = [key_hash(key) for key in keys]
        new = torch.tensor([number not in self._done_before for number in hashes], dtype=torch.bool)
        self.ids += [number for number in hashes if number not in self._done_before]
        self._done_before.difference_update(hashes)  # so that a repeated key is detected
        chosen = new & choose_fraction(keys, self.fraction, "subset")
        places = None if chosen.all() else chosen.nonzero().flatten()
        part = {name: _at(places, batch[name]) for name in MEASURED if batch.get(name) is not None}
        if self._waiting and part["image"].shape[1:] != self._waiting[0]["image"].shape[1:]:
            self._measure_waiting()
        self._waiting.append(part)
        self._batches_left -= 1
        may_wait = self.context.in_fit and 0 < self._batches_left < math.inf
        if not may_wait or sum(len(part["key"]) for part in self._waiting) >= len(keys):
            self._measure_waiting()

    def _measure_waiting(self) -> None:
        parts, self._waiting = self._waiting, []
        self._measure({name: _joined([part[name] for part in parts]) for name in parts[0]})
        self._save_if_due()

    def _decoded(
        self,
        tokens: Tensor,
        keys: Sequence[str],
        budgets: Sequence[int],
        seed: int,
        image_size: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Decode tokens (B, K), yielding budgets with (B, 3, H, W) uint8 images, of [H, W] pixels if given."""
        options, size = self.options, image_size or self.statistics.image_size
        at_once = options.decode_batch_size or images_at_once(len(keys), size, self.device)
        more = (at_once, self.context.pause, image_size)
        return decode(self.tokenizer, tokens, budgets, self.decoding, keys, seed, *more)

    def finish(self) -> Results | None:
        """Merge all processes, each of which must call this; returns None if too few images were measured."""
        context, statistics = self.context, self.statistics
        if self._waiting:
            raise RuntimeError(
                f"{self._batches_left:g} of {context.num_batches:g} batches of the {context.split} set did not come, "
                "and samples still wait for them; no number is reported: correct the length of its dataloader"
            )
        ids = gather_rows(torch.tensor(self.ids, dtype=torch.int64))
        seen = check_each_sample_once(ids, context.num_samples, context.limited, f"the {context.split} set")
        statistics.all_reduce()
        count = statistics.num_images
        if count < 2:
            if rank() == 0:
                warnings.warn(
                    f"{self.options.name} has {count} images to measure ({seen} samples were read), but a distance "
                    f"needs two: raise max_samples={self.options.max_samples} or limit_{context.split}_batches",
                    stacklevel=2,
                )
            return None
        if self.num_made not in (None, count):
            raise RuntimeError(
                f"{count} images were generated instead of {self.num_made}: one of {world_size()} processes had no "
                f"sample of the {context.split} set to start with; no number is reported: use fewer devices"
            )
        if rank() == 0 and self._kept is not None and seen == context.num_samples:
            _store_or_check(self._kept, statistics.real, statistics.data_hash)
        with announced("computing the distances"):
            return self._results(statistics.values(self.options.seed), seen)

    def _results(self, values: dict[int, dict[str, float]], seen: int) -> Results:
        statistics, network, expected = self.statistics, self.extractor, self.context.num_samples
        count = statistics.num_images
        full_rank = statistics.real.statistics.full_rank and count > network.dim
        protocol = {
            "num_samples": count,
            "samples_read": seen,
            "complete": self.fraction == 1 and seen == expected,
            "data_hash": data_hash_text(statistics.data_hash),
            "image_size": statistics.image_size,
            **self._facts,
        }
        steps, guidance, weights = (self._facts[name] for name in ("num_steps", "guidance", "model_weights"))
        notes, own = [], chosen_decoding(getattr(self.tokenizer, "config", None), self.decoding)
        if own != self.decoding:
            notes.append(
                f"the tokenizer was made for {own.num_steps} steps and guidance {own.guidance}, but "
                f"{self.options.name}.num_steps and {self.options.name}.guidance differ."
            )
        if not full_rank:
            notes.append(
                f"{network.metric_name} of {count} images and {network.dim} features is comparable only with values of "
                f"{count} images, because the covariance is singular; prefer {network.kernel_metric_name}."
            )
        if seen < expected:
            notes.append(f"limit_{self.context.split}_batches: only {seen} of {expected} samples were read.")
        return Results(
            values,
            protocol,
            {network.metric_name: {"full_rank": full_rank}, **statistics.how},
            self._pictures(),
            f"{self._measured()}, {steps} steps, guidance {guidance}, weights {weights}",
            notes,
        )

    @property
    def columns(self) -> list[int]:
        """The budgets of the grid picture."""
        if len(self.budgets) <= GRID_COLUMNS:
            return self.budgets
        return [budget for budget in default_budgets(self.budgets[-1]) if budget in self.budgets][-GRID_COLUMNS:]

    def _rows_of_all(self, count: int) -> list[GridRow]:
        """The first rows of the grid picture over all processes."""
        return first_rows([row for part in gather_objects(self.rows) for row in part], count)


def first_rows(rows: list[GridRow], count: int) -> list[GridRow]:
    """The first rows in order, which do not depend on which process saw which sample."""
    return sorted(rows, key=lambda row: row[0])[:count]


def places_of(rows: Sequence[GridRow], orders: Sequence[Any], count: int) -> list[int]:
    """Positions of the further rows with these different sort keys that are among the first ones."""
    first = sorted([order for order, *_ in rows] + list(orders))[:count]
    return [i for i, order in enumerate(orders) if order in first]


def stacked(rows: Sequence[GridRow], columns: Sequence[int]) -> list[tuple[str | int, Tensor]]:
    """Each budget with the rows' images, (B, 3, H, W) uint8."""
    return [(budget, same_size([images[budget] for *_, images in rows])) for budget in columns]


def _at(places: Tensor | None, rows: Any) -> Any:
    """Select B rows at these positions; None selects all."""
    if places is None:
        return rows
    return rows[send(places, rows.device)] if isinstance(rows, Tensor) else [rows[i] for i in places.tolist()]


def _joined(parts: Sequence[Any]) -> Any:
    """Join rows of several batches."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([*parts]) if isinstance(parts[0], Tensor) else [row for part in parts for row in part]


def _store_or_check(file: Path, features: FeatureSet, pixel_hash: int) -> None:
    """Cache features of real images, or check that cached ones belong to the evaluated images."""
    if not file.is_file():
        keep(file, {**features.state_dict(), "pixel_hash": torch.tensor(pixel_hash)})
    elif load_kept(file, lambda state: state["pixel_hash"]).item() != pixel_hash:
        file.unlink()
        raise RuntimeError(
            f"the cached statistics {file} belong to other images, so no number is reported; the file is deleted: run "
            "the evaluation again"
        )
