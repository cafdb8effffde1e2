"""Lists of class names that users write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flextok_pl.data.shards.index import INDEX_NAME, ShardIndex


def read_class_names(option: str, given: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Names of classes by number.

    Args:
        option: what they are given by, for errors.
        given: the names; or a UTF-8 text file with one per line; or a shard set, whose classes they are.

    Raises:
        ValueError: there are none, one is empty, or one is there twice; names the line.
    """
    if not isinstance(given, str | Path):
        return _checked(option, [str(name).strip() for name in given], "entry")
    path = Path(given).expanduser()
    if path.name == INDEX_NAME or (path / INDEX_NAME).is_file():
        return _checked(f"{option}={given}", ShardIndex.load(path).classes, "class")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={given} cannot be read: {error}; give a text file in UTF-8, or a list") from error
    return _checked(f"{option}={given}", [line.strip() for line in text.rstrip().split("\n")], "line")


def _checked(where: str, names: Sequence[str], unit: str) -> tuple[str, ...]:
    places: dict[str, int] = {}
    for place, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"{where}: {unit} {place} is empty; a class has a name, and its place is its number")
        if name in places:
            raise ValueError(f"{where}: {unit} {place} is {name!r}, as is {unit} {places[name]}; keep one")
        places[name] = place
    if not names:
        raise ValueError(f"{where} holds no classes; give one name per {unit}")
    return tuple(names)
