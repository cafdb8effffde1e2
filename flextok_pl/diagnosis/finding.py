"""What a check finds. `docs/doctor.md` explains each check, its threshold and what to do, under the check's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "look", "wrong"]

GUIDE = "docs/doctor.md"

EARLY = 0.25
"""Share of a training before which a network need not have learned what it learns in the end."""


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    check: str  # its name, such as `token-use`, and the anchor in the guide
    verdict: Verdict
    says: str  # what was found, with numbers
    remedy: str = ""  # empty where nothing is to be done
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """Where the guide explains it."""
        return f"{GUIDE}#{self.check}"

    @property
    def text(self) -> str:
        """What to tell the user in one line."""
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
    """A finding whose remedy counts only where the verdict is not `ok`."""
    return Finding(check, verdict, says, "" if verdict == "ok" else remedy, values)


def learning(verdict: Verdict, progress: float | None) -> Verdict:
    """The verdict about what a training must first learn: before `EARLY` of it nothing is `wrong` yet.

    `progress` is the share that is done, None for a training without end.
    """
    return "look" if verdict == "wrong" and progress is not None and progress < EARLY else verdict
