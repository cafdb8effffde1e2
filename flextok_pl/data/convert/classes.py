"""Read the classes of a source: lists of names, and indices of labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from flextok_pl.data.shards.index import INDEX_NAME, ShardIndex

MOST_CLASSES = 1_000_000
"""Largest number that is taken for a class index."""


def read_class_names(option: str, given: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Read class names by number: a sequence, a UTF-8 text file with one per line, or a shard set.

    Errors call the names by their option, and give the line.
    """
    where, unit = option, "entry"
    if not isinstance(given, str | Path):
        names = [str(name).strip() for name in given]
    elif Path(given).name == INDEX_NAME or (Path(given).expanduser() / INDEX_NAME).is_file():
        where, unit, names = f"{option}={given}", "class", list(ShardIndex.load(Path(given).expanduser()).classes)
    else:
        where, unit, names = f"{option}={given}", "line", read_lines(option, given)
    places: dict[str, int] = {}
    for place, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"{where}: {unit} {place} is empty; name each class, as its place is its number")
        if name in places:
            raise ValueError(f"{where}: {unit} {place} is {name!r}, like {unit} {places[name]}; keep one")
        places[name] = place
    if not names:
        raise ValueError(f"{where} holds no classes; give one name per {unit}")
    return tuple(names)


def read_lines(option: str, file: str | Path) -> list[str]:
    """Read the lines of a UTF-8 text file, stripped, without empty lines at the end."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={file} cannot be read: {error}; give a text file in UTF-8, or a list") from error
    return [line.strip() for line in text.split("\n")]


def classes_of(labels: Iterable[int | str], where: str) -> tuple[str, ...]:
    """Class names by the labels of a source (-1 is no class): numbers up to the largest, or sorted words."""
    distinct = set(labels)
    numbers = {label for label in distinct if isinstance(label, int)}
    if numbers and numbers != distinct:
        words = sorted(label for label in distinct if isinstance(label, str))
        raise ValueError(f"{where} has numbers and words as labels, such as {min(numbers)} and {words[0]!r}")
    if not numbers:
        return tuple(sorted(map(str, distinct)))
    if min(numbers) < -1 or max(numbers) > MOST_CLASSES:
        raise ValueError(
            f"{where} has labels {min(numbers)}..{max(numbers)}; class indices are 0, 1, 2, ... (or -1, no class)"
        )
    return tuple(str(number) for number in range(max(numbers) + 1))


class Labels:
    """Maps the labels of a source to class indices.

    If labels are indices, several classes may share a name. `source` has the names by the source's own indices, if
    these differ.
    """

    def __init__(self, classes: Sequence[str], source: Sequence[str] | None = None) -> None:
        self.count, self.numbers = len(classes), {name: i for i, name in enumerate(classes)}
        self.source = source

    def index(self, label: int | str | None) -> int:
        """Find the class index of a label: an index, a name or None."""
        if self.source is not None and isinstance(label, int) and 0 <= label < len(self.source):
            label = self.source[label]
        number = -1 if label is None else self.numbers.get(label) if isinstance(label, str) else label
        if number is None or not -1 <= number < self.count:
            raise ValueError(f"its label {label!r} is not among the {self.count} classes")
        return number
