"""Records: numbers, each with the protocol that made it, as lists in JSON files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flextok_pl.files import write_file

Record = dict[str, Any]
"""At least `metric`, `value`, `num_samples`, `num_tokens` of a token budget, and the protocol."""


def read_records(path: Path) -> list[Record]:
    """The records of a file that `write_json` wrote."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as records: {error}") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) and {"metric", "value"} <= set(r) for r in records):
        raise ValueError(f"{path} holds no list of records with metric and value, as an evaluation writes them")
    return records


def write_json(records: Sequence[Record], path: Path) -> None:
    """Write a list of records; a value that is not a finite number raises ValueError."""
    write_file(path, json.dumps(list(records), indent=1, allow_nan=False).encode() + b"\n")
