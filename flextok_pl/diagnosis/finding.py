"""The result of a check. `docs/doctor.md` explains each check, its threshold and its remedy, under its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "look", "wrong"]

GUIDE = "docs/doctor.md"

EARLY = 0.25
"""Share of a training before which a network need not have learned everything yet."""


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    check: str  # its name, such as `token-use`, and the anchor in the guide
    verdict: Verdict
    says: str  # what was found, with numbers
    remedy: str = ""  # empty if there is nothing to do
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """Link to the explanation in the guide."""
        return f"{GUIDE}#{self.check}"

    @property
    def text(self) -> str:
        """The finding in one line."""
        return f"{self.check}: {self.says}. {self.remedy} ({self.link})"

    def as_dict(self) -> dict[str, Any]:
        """Plain types for a file."""
        return {
            "check": self.check,
            "verdict": self.verdict,
            "says": self.says,
            "remedy": self.remedy,
            "link": self.link,
            "values": dict(self.values),
        }


def graded(check: str, verdict: Verdict, says: str, remedy: str, **values: float) -> Finding:
    """Make a finding; its remedy counts only if the verdict is not `ok`."""
    return Finding(check, verdict, says, "" if verdict == "ok" else remedy, values)


def learning(verdict: Verdict, progress: float | None) -> Verdict:
    """The verdict about what a training must learn first: before `EARLY` of it nothing is `wrong` yet.

    `progress` is the finished share, None for a training without end.
    """
    return "look" if verdict == "wrong" and progress is not None and progress < EARLY else verdict
