"""The classes of a source: names that users list, and indices of the labels that occur."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from flextok_pl.data.shards.index import INDEX_NAME, ShardIndex

MOST_CLASSES = 1_000_000
"""A number above this is no class index but something else."""


def read_class_names(option: str, given: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Names of classes by number: as given, from a UTF-8 text file with one per line, or those of a shard set.

    Errors call them by the option, and name the line.
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
            raise ValueError(f"{where}: {unit} {place} is empty; a class has a name, and its place is its number")
        if name in places:
            raise ValueError(f"{where}: {unit} {place} is {name!r}, as is {unit} {places[name]}; keep one")
        places[name] = place
    if not names:
        raise ValueError(f"{where} holds no classes; give one name per {unit}")
    return tuple(names)


def read_lines(option: str, file: str | Path) -> list[str]:
    """The lines of a UTF-8 text file without what surrounds them and without empty ones at its end."""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={file} cannot be read: {error}; give a text file in UTF-8, or a list") from error
    return [line.strip() for line in text.split("\n")]


def classes_of(labels: Iterable[int | str], where: str) -> tuple[str, ...]:
    """Class names by the labels of a source (-1 is no class): the numbers up to the largest, or the sorted words."""
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
    """Class indices of the labels of a source.

    Where labels are indices, several classes may have the same name. `source` has the names by the source's own
    indices, where these are others.
    """

    def __init__(self, classes: Sequence[str], source: Sequence[str] | None = None) -> None:
        self.count, self.numbers = len(classes), {name: i for i, name in enumerate(classes)}
        self.source = source

    def index(self, label: int | str | None) -> int:
        """The class index of a label, which is an index, a name, or None."""
        if self.source is not None and isinstance(label, int) and 0 <= label < len(self.source):
            label = self.source[label]
        number = -1 if label is None else self.numbers.get(label) if isinstance(label, str) else label
        if number is None or not -1 <= number < self.count:
            raise ValueError(f"its label {label!r} is none of the {self.count} classes")
        return number
