"""One pass over the evaluation data: what it has measured so far, and how another process goes on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from flextok_pl.contracts import default_budgets
from flextok_pl.evaluation.budget_statistics import BudgetStatistics
from flextok_pl.evaluation.statistics_cache import StatisticsCache
from flextok_pl.evaluation.unfinished import Unfinished
from flextok_pl.keys import key_hash

GRID_COLUMNS = 12
"""Most columns of the grid picture; beyond, powers of two are shown."""

GridRow = tuple[Any, Any, dict[int, Tensor]]
"""What orders the row, what stands at its left, and its images by budget, (3, H, W) uint8."""

StatisticsT = TypeVar("StatisticsT", bound=BudgetStatistics)


@dataclass
class Pass(Generic[StatisticsT]):
    """One evaluation of the data, from its first batch to the report."""

    split: Literal["val", "test"]
    in_fit: bool
    budgets: list[int]
    expected: int
    fraction: float
    num_made: int | None
    """Images to make where that is not one of each chosen sample."""
    cache: StatisticsCache | None
    statistics: StatisticsT
    facts: dict[str, Any]
    """What the records say that was known before the first batch."""
    unfinished: Unfinished | None = None
    ids: list[int] = field(default_factory=list)
    """Of the samples that are done."""
    resumed: set[int] = field(default_factory=set)
    """Those of them that an earlier run has done and this one has not come across yet."""
    pending: list[Any] = field(default_factory=list)
    """What is still to be made, beside what comes with the batches; tuples of plain types."""
    grid: list[GridRow] = field(default_factory=list)
    extremes: dict[str, list[GridRow]] = field(default_factory=dict)
    """Rows of further pictures, by what they are the first of."""

    def save_if_due(self) -> None:
        """Let a later run go on from here, now and then."""
        if self.unfinished is not None:
            self.unfinished.save_if_due(self.state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors that `load_state_dict` takes."""
        return {
            "statistics": self.statistics.state_dict(),
            "ids": self.ids,
            "pending": [tuple(entry) for entry in self.pending],
            "grid": self.grid,
            "extremes": self.extremes,
        }

    def can_go_on_from(self, state: Mapping[str, Any]) -> bool:
        """Whether a state lacks nothing; features of real images that were known then may not be now."""
        return self.statistics.has_all_of(state["statistics"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another process was."""
        self.statistics.load_state_dict(state["statistics"])
        self.ids, self.pending = state["ids"], state["pending"]
        self.grid, self.extremes = state["grid"], state["extremes"]
        self.resumed = set(self.ids)

    def take_new(self, keys: Sequence[str]) -> Tensor:
        """(B,) bool, which samples no earlier run has done; they count as done."""
        hashes = [key_hash(key) for key in keys]
        new = [number not in self.resumed for number in hashes]
        self.ids += [number for number, is_new in zip(hashes, new, strict=True) if is_new]
        self.resumed.difference_update(hashes)  # a key that comes twice is then found out
        return torch.tensor(new, dtype=torch.bool)

    @property
    def columns(self) -> list[int]:
        """The budgets that the grid picture shows."""
        if len(self.budgets) <= GRID_COLUMNS:
            return self.budgets
        return [budget for budget in default_budgets(self.budgets[-1]) if budget in self.budgets][-GRID_COLUMNS:]


def first_rows(rows: list[GridRow], count: int) -> list[GridRow]:
    """The rows that come first, which are the same whoever saw which sample."""
    return sorted(rows, key=lambda row: row[0])[:count]


def chosen_rows(batch: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """The samples of a batch for which `chosen` (B,) bool holds."""
    numbers = chosen.nonzero().flatten().tolist()
    return {
        name: value[chosen.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in numbers]
        for name, value in batch.items()
        if value is not None
    }
