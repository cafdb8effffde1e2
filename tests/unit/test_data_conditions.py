"""Classes by number and by name."""

import pytest

from flextok_pl.data.conditions import class_index

NAMES = ("tabby cat", "tiger cat", "goldfish", "red fox")


@pytest.mark.parametrize(
    ("given", "expected"), [(2, 2), ("3", 3), ("goldfish", 2), ("Tabby CAT", 0), ("fox", 3), ("tabby", 0)]
)
def test_classes_that_are_there(given: int | str, expected: int) -> None:
    assert class_index(given, NAMES, 4) == expected


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
