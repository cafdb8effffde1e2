"""Compare the parts of a FlexAR release: shapes of tensors, and sections of its configuration.

A section's class is identified by its last name, as text. Its options are those of the class's constructor. Options
without effect on the function may have any value; unknown options are refused.
"""

from collections.abc import Mapping
from typing import Any

HYDRA = ("_target_", "_partial_", "_convert_", "_recursive_")
BLOCKS = "models.ar_image_model.trunk.blocks."


class Shapes:
    """Shapes of a file's tensors by name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def sizes(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor, which must exist and have this many dimensions."""
        if name not in self._shapes:
            raise ValueError(f"missing tensors: {name}")
        shape = self._shapes[name]
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"tensor {name} has shape {list(shape)}; it must have {dimensions} dimensions")
        return shape

    def num_blocks(self) -> int:
        """The number of blocks, which are numbered from 0."""
        numbers = {name.removeprefix(BLOCKS).split(".")[0] for name in self._shapes if name.startswith(BLOCKS)}
        wanted = set(map(str, range(len(numbers))))
        if not numbers or numbers != wanted:
            raise ValueError(f"tensors {BLOCKS}* are of blocks {sorted(numbers)[:8]}, not 0, 1, 2, ...")
        return len(numbers)

    def same_in(self, name: str, *others: str) -> bool:
        """Check whether a tensor exists; the others must agree."""
        for other in others:
            if (other in self) != (name in self):
                there, lacking = (name, other) if name in self else (other, name)
                raise ValueError(f"there is a tensor {there} but no {lacking}; this model has both or neither")
        return name in self


class Section:
    """A mapping of the configuration, whose keys must all be taken or without effect."""

    def __init__(self, path: str, values: Any) -> None:
        if not isinstance(values, dict):
            kind = "missing" if values is None else f"a {type(values).__name__} instead of a mapping"
            raise ValueError(f"{path} is {kind}")
        self.path, self._values, self._taken = path, values, set(HYDRA)

    def name(self, *known: str) -> str:
        """The last name of its class, which must be a known one."""
        target = self._values.get("_target_")
        name = target.rsplit(".", 1)[-1] if isinstance(target, str) else ""
        if name not in known:
            raise ValueError(f"{self.path}._target_={_short(target)} is unknown; it must be {' or '.join(known)}")
        return name

    def take(self, key: str, default: Any = None) -> Any:
        """Take the value of a key, or the default if it is null or missing."""
        self._taken.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def part(self, key: str) -> "Section | None":
        """A mapping in it."""
        value = self.take(key)
        return None if value is None else Section(f"{self.path}.{key}", value)

    def required(self, key: str) -> "Section":
        """A mapping that must be in it."""
        return Section(f"{self.path}.{key}", self.take(key))

    def has(self, key: str) -> bool:
        """Check that a key exists, even if it is null."""
        return key in self._values

    def ignore(self, *keys: str) -> None:
        """Accept any value of these keys."""
        self._taken.update(keys)

    def must_be(self, key: str, wanted: Any, why: str, silent: bool = True) -> None:
        """Compare a key's value with the only supported one; with `silent` it may be missing."""
        value = self.take(key)
        if value is None and silent:
            return
        if isinstance(value, bool) != isinstance(wanted, bool) or value != wanted:
            raise ValueError(f"{self.path}.{key}={_short(value)} must be {wanted}: {why}")

    def number(self, key: str, default: float | None = None) -> float | None:
        """A positive number."""
        value = self.take(key, default)
        if value is not None and (type(value) not in (int, float) or not 0 < value < 1e9):
            raise ValueError(f"{self.path}.{key}={_short(value)} must be a positive number")
        return None if value is None else float(value)

    def whole(self, key: str, default: int | None = None) -> int | None:
        """A positive integer."""
        value = self.take(key, default)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise ValueError(f"{self.path}.{key}={_short(value)} must be a positive integer")
        return value

    def refuse(self, key: str, why: str) -> None:
        """Refuse any value of a key."""
        value = self.take(key)
        if value is not None and value is not False:
            raise ValueError(f"{self.path}.{key}={_short(value)} is not supported: {why}")

    def close(self, *ignored: str) -> None:
        """Refuse keys that were not taken and are not ignored."""
        self.ignore(*ignored)
        for key in self._values:
            if key not in self._taken:
                value = _short(self._values[key])
                raise ValueError(f"{self.path} has an unknown option {key}={value}; the function may depend on it")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:100] + "..."
