"""Records: numbers, each with the protocol that made it, as lists in JSON files."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""At least `metric`, `value`, `num_samples`, `num_tokens` (the token budget), and the protocol."""


def read_records(path: Path) -> list[Record]:
    """Read the records that an evaluation wrote to a file."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as records: {error}") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) and {"metric", "value"} <= set(r) for r in records):
        raise ValueError(f"{path} is not a list of records with metric and value, as an evaluation writes them")
    return records
