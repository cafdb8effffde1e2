"""Classes by number and by name."""

import pytest

from flextok_pl.contracts import class_difference
from flextok_pl.data.conditions import class_index

NAMES = ("tabby cat", "tiger cat", "goldfish", "red fox")


@pytest.mark.parametrize(
    ("given", "expected"), [(2, 2), ("3", 3), ("goldfish", 2), ("Tabby CAT", 0), ("fox", 3), ("tabby", 0)]
)
def test_classes_that_are_there(given: int | str, expected: int) -> None:
    assert class_index(given, NAMES, 4) == expected


def test_names_of_digits() -> None:
    names = ("1", "10", "2")  # of folders, in their order
    assert [class_index(given, names, 3) for given in ("10", "2", 2, "0")] == [1, 2, 2, 0]
    assert class_difference(("0", "1", "2"), ("a", "b", "c")) is None and class_difference(names, ("a", "b", "c"))
    assert "is number" in str(class_difference(("0", "1", "10", "2"), ("0", "10", "1", "2")))


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        (4, NAMES, r"class 4 is not in 0..3"),
        ("-1", NAMES, "class -1 is not in"),
        ("cat", NAMES, "may be any of tabby cat, tiger cat"),
        ("goldfsh", NAMES, "did you mean goldfish"),
        ("", NAMES, "class '' is unknown"),
        ("fox", (), r"have no names; give a number in 0..3"),
    ],
)
def test_classes_that_are_not(given: int | str, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_index(given, names, 4)
