"""Find classes by number or name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def class_index(given: int | str, names: Sequence[str], num_classes: int) -> int:
    """The number of a class, given by name, by number, by name in any case, or by part of exactly one name."""
    text = str(given).strip()
    if isinstance(given, str) and text in names:  # which may be digits
        return names.index(text)
    if text.lstrip("-").isdecimal():
        if not 0 <= int(text) < num_classes:
            raise ValueError(f"class {text} is not in 0..{num_classes - 1}, the classes of this prior")
        return int(text)
    lower = [name.lower() for name in names]
    if text.lower() in lower:
        return lower.index(text.lower())
    matches = [i for i, name in enumerate(lower) if text and text.lower() in name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"class {text!r} may be any of {', '.join(names[i] for i in matches[:8])}; give one of them")
    if not names:
        raise ValueError(f"class {text!r}: this prior's classes have no names; give a number in 0..{num_classes - 1}")
    close = difflib.get_close_matches(text.lower(), lower, n=3, cutoff=0.5) or lower[:8]
    likely = ", ".join(names[lower.index(name)] for name in close)
    raise ValueError(f"class {text!r} is unknown; did you mean {likely}? There are {num_classes} classes")
