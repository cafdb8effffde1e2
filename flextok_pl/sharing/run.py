"""Reads from a run's folders what its card states: results with their protocol, pictures, data, and the training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flextok_pl.records import Record, read_records

RESULTS = {"tokenizer": ("rfid", "tokenizer_hash"), "prior": ("gfid", "prior_hash")}
"""Kind of model -> name of the records that measure it, and their field for its weights."""

PICTURES = {
    "rfid": {
        "grid.png": "Held-out pictures and their reconstructions, from one token to all",
        "rfid.png": "Results by token budget",
        "extremes.png": "Smallest and largest squared error at each budget",
    },
    "gfid": {
        "gfid_grid.png": "Generated pictures at each budget: the first tokens of one sample per row",
        "gfid.png": "Results by token budget",
    },
}
"""Name of records -> pictures that an evaluation writes beside them, and their captions."""

TRAINING = "training.json"
"""File in a run's folder: steps, time and devices of each start."""


@dataclass(frozen=True)
class RunFacts:
    """Recorded facts about a model; empty fields were not recorded."""

    records: Sequence[Record] = ()
    pictures: Mapping[Path, str] = field(default_factory=dict)  # file -> caption
    config: Mapping[str, Any] = field(default_factory=dict)  # the run's options
    data: Mapping[str, Any] = field(default_factory=dict)  # the index of the training set
    credits: Sequence[str] = ()  # of the pictures in both
    attempts: Sequence[Mapping[str, Any]] = ()  # see `TRAINING`

    @property
    def train(self) -> str:
        """The training set that the run's options name; empty if they name none."""
        return _training_set(self.config)


def read_run(folder: Path | None, kind: str, digest: str, results: str | Path | None = None) -> RunFacts:
    """Collect the recorded facts about the weights with this hash.

    Args:
        folder: the run that made them; None for none.
        kind: kind of the model: `tokenizer`, `prior` or `autoencoder`.
        digest: `weights_hash` of the model in float32.
        results: folder of an evaluation; default that of the run, or the newest one beside it with records of these
            weights.

    Raises:
        ValueError: `results` has no records, or they are of other weights; a file is damaged.
    """
    file = _file_of_records(folder, kind, digest, results)
    records = read_records(file) if file is not None else []
    pictures = {file.parent / name: text for name, text in PICTURES[file.stem].items()} if file is not None else {}
    config = read_mapping(folder / "config.yaml") if folder is not None else {}
    attempts = read_mapping(folder / TRAINING).get("attempts", []) if folder is not None else []
    data = _index(_training_set(config))
    sets = [data, _index(str(records[0].get("reference") or "")) if records else {}]
    sources = [source for each in sets for source in _sources(each.get("provenance"))]
    credits = [str(each["credit"]) for each in sources if each.get("credit")]
    shown = {picture: text for picture, text in pictures.items() if picture.is_file()}
    return RunFacts(records, shown, config, data, list(dict.fromkeys(credits)), attempts)


def _file_of_records(folder: Path | None, kind: str, digest: str, results: str | Path | None) -> Path | None:
    if kind not in RESULTS:
        if results is not None:
            raise ValueError(f"records={results}: no command measures an {kind} alone; leave records out")
        return None
    name, stated = RESULTS[kind]
    if results is not None:
        file = Path(results).expanduser() / f"{name}.json"
        if not file.is_file():
            raise ValueError(f"records={results} has no {name}.json: give a folder that `flextok test` wrote")
        if others := sorted({str(record.get(stated)) for record in read_records(file)} - {digest}):
            raise ValueError(
                f"records={results} are of the weights {others[0]}, and these are {digest}: evaluate these with "
                "`flextok test`"
            )
        return file
    if folder is None:
        return None

    def are_of_these(file: Path) -> bool:
        records = read_records(file)
        return bool(records) and all(record.get(stated) == digest for record in records)

    own = folder / f"{name}.json"
    if own.is_file() and are_of_these(own):
        return own
    for file in sorted(folder.parent.glob(f"*/{name}.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(ValueError):  # another run's damage
            if are_of_these(file):
                return file
    return None


def _training_set(config: Mapping[str, Any]) -> str:
    given = (config.get("data") or {}).get("train")
    return ", ".join(map(str, given)) if isinstance(given, list) else str(given or "")


def _sources(provenance: Any) -> list[Mapping[str, Any]]:
    """The sources of a set's pictures; a set of latents or tokens states those of its images."""
    found = [provenance] if isinstance(provenance, Mapping) else []
    images = found[0].get("images") if found else None
    return [*found, *(each for each in (images if isinstance(images, list) else []) if isinstance(each, Mapping))]


def _index(data: str) -> dict[str, Any]:
    """The index of a shard set, from its folder; empty if it is not on this machine."""
    return read_mapping(Path(data).expanduser() / "index.json") if data else {}


def read_mapping(file: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def without_places(value: Any) -> Any:
    """A value without paths of this machine: of each only the last part, which names the thing."""
    if isinstance(value, Mapping):
        return {name: without_places(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each) for each in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or Path(value).is_absolute()):
        return "/".join(Path(value).parts[-2:])
    return value
