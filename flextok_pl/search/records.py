"""Keep a search on disk, so that it can resume after a kill.

The folder of a run holds, for example for prompt 7:

- `images/00007/samples/0000.png`, the best image, `0001.png`, the next one, and so on, and `metadata.jsonl` with the
  facts of the prompt's source. This is the layout of GenEval (https://github.com/djghosh13/geneval), whose evaluator
  reads `images`;
- `records/00007.json`, the record of the search, written last; `search.jsonl` has those of all prompts;
- `trees/00007.png`, the picture of the search, for some prompts;
- `unfinished/00007.pt` and `.png`, during the search: its steps, and the best image so far.

`protocol.json` states the options of the run, which all records repeat. Several processes can work in one folder, each
on its own prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from flextok_pl.evaluation.generation import Prompt
from flextok_pl.evaluation.kept_files import keep, load_kept
from flextok_pl.evaluation.pictures import save_png
from flextok_pl.evaluation.report import Record, protocol_differences
from flextok_pl.files import remove, write_file
from flextok_pl.search.results import Cost, SearchResult, Step

FREE = ("device", "versions", "prior", "tokenizer")
"""Options that may change when a run resumes; prior and tokenizer are identified by their hashes."""

RUN_ONLY = ("class_names",)
"""Entries of the run's protocol that its records do not repeat."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, with the entries of all its records."""

    path: Path
    protocol: Mapping[str, Any]

    def open(self) -> None:
        """Make the folder, or resume in it; before the first finished step it may hold any protocol.

        Raises:
            ValueError: it holds a run with other options.
        """
        file = self.path / "protocol.json"
        if not (file.is_file() and any((self.path / begun).is_dir() for begun in ("records", "unfinished"))):
            write_file(file, _json(dict(self.protocol), indent=1))
        found = _read(file)
        former, wanted = ({k: v for k, v in each.items() if k not in FREE} for each in (found, _plain(self.protocol)))
        for name, (old, new) in protocol_differences(former, wanted).items():
            raise ValueError(f"out={self.path} holds a search with {name}={old}, not {new}: name another folder")

    def record(self, number: int, prompt: Prompt) -> Record | None:
        """The record of a prompt, if its search is finished.

        Raises:
            ValueError: another prompt has this number.
        """
        file = self.path / "records" / f"{number:05d}.json"
        return self._own(_read(file), number, prompt) if file.is_file() else None

    def steps(self, number: int, prompt: Prompt) -> list[Step]:
        """The steps of an unfinished search."""
        file = self._unfinished(number)
        if not file.is_file():
            return []
        state = self._own(load_kept(file, dict), number, prompt)
        return [Step(**{**step, "cost": Cost(**step["cost"])}) for step in state["steps"]]

    def keep_steps(self, number: int, prompt: Prompt, steps: Sequence[Step], best: Tensor | None) -> None:
        """Save the steps so far, and the best image of the last, (3, H, W) uint8."""
        if best is not None:
            save_png(best, self._unfinished(number).with_suffix(".png"))
        state = [{**step._asdict(), "cost": asdict(step.cost)} for step in steps]
        keep(self._unfinished(number), {"key": prompt.key, "steps": state})

    def finish(
        self, number: int, prompt: Prompt, result: SearchResult, images: Tensor, tree: Tensor | None = None
    ) -> Record:
        """Write the results: `images` (n, 3, H, W) uint8 of the result's sequences, and the search's picture."""
        place = self.path / "images" / f"{number:05d}"
        asked = {"prompt": prompt.text} | ({"label": prompt.label} if prompt.label >= 0 else {})
        write_file(place / "metadata.jsonl", _json({**asked, **prompt.metadata}))
        files = [place / "samples" / f"{i:04d}.png" for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            save_png(image, file, synced=True)
        if tree is not None:
            save_png(tree, self.path / "trees" / f"{number:05d}.png")
        found = zip(files, result.tokens, result.scores, result.log_probs, strict=True)
        record: Record = {
            "number": number,
            "key": prompt.key,
            "label": prompt.label,
            "text": prompt.text,
            "metadata": dict(prompt.metadata),
            "results": [
                {"image": str(file.relative_to(self.path)), "score": s, "log_prob": p, "tokens": tokens}
                for file, tokens, s, p in found
            ],
            "steps": [{**step._asdict(), "cost": asdict(step.cost)} for step in result.steps],
            "cost": asdict(result.cost),
            **{name: value for name, value in self.protocol.items() if name not in RUN_ONLY},
        }
        file = self.path / "records" / f"{number:05d}.json"
        write_file(file, _json(record))
        remove(self._unfinished(number))
        remove(self._unfinished(number).with_suffix(".png"))
        return _read(file)

    def gather(self, prompts: Sequence[Prompt]) -> list[Record] | None:
        """Collect the records of all prompts in `search.jsonl`; None while other processes still search."""
        records = [self.record(number, prompt) for number, prompt in enumerate(prompts)]
        finished = [record for record in records if record is not None]
        if len(finished) < len(prompts):
            return None
        write_file(self.path / "search.jsonl", "".join(_json(record) for record in finished))
        return finished

    def _unfinished(self, number: int) -> Path:
        return self.path / "unfinished" / f"{number:05d}.pt"

    def _own(self, found: dict[str, Any], number: int, prompt: Prompt) -> dict[str, Any]:
        if found["key"] != prompt.key:
            raise ValueError(
                f"out={self.path} holds the search for {found['key']!r} as number {number}, which is now "
                f"{prompt.key!r}: name another folder, or give the same prompts first"
            )
        return found


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Read the protocol of a finished run, and its records.

    Raises:
        ValueError: the folder holds no finished run.
    """
    try:
        lines = (folder / "search.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{folder} holds no finished search: {error}; run its command again") from error
    return _read(folder / "protocol.json"), [json.loads(line) for line in lines]


def mean_score(records: Sequence[Record]) -> float | None:
    """The mean score of the best results; None if one is infinite, which records state as None."""
    scores = [record["results"][0]["score"] for record in records]
    return None if None in scores else fmean(scores)


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; remove the folder and search again") from error
    return found


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Convert to JSON types: tensors become lists, paths texts, and numbers that are not finite None."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
