"""Read YAML with OmegaConf's interpolations as plain data, without importing, building or reading the environment.

`${a.b.0}` refers to another value of the file, `${.a}` and `${..a}` to one beside it and one level up. `${mul:${a}, 2}`
computes with one of the resolvers of l3m, whose configurations use them
(https://github.com/apple/ml-l3m/blob/e6376a3/src/l3m/helpers/omegaconf_resolvers.py).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import reduce
from operator import mul, sub, truediv
from pathlib import Path
from typing import Any

import yaml

from flextok_pl.interop.plain_data import MAX_CHARACTERS, check_plain

_RESOLVERS: Mapping[str, Callable[..., Any]] = {
    "add": lambda *values: sum(values),
    "subtract": lambda *values: reduce(sub, values),
    "mul": lambda *values: reduce(mul, values),
    "mul_int": lambda *values: int(reduce(mul, values)),
    "div_int": lambda *values: int(reduce(truediv, values)),
    "div_float": lambda *values: reduce(truediv, values),
    "sqrt_div": lambda a, b: math.sqrt(a / b),
}
_MOST_STEPS = 10_000  # values visited, as interpolations can turn a small text into an enormous tree
_DEEPEST = 30
_RESOLVER = re.compile(r"([A-Za-z_][\w.]*)\s*:")
_KEY = re.compile(r"[\w.\-\[\]/@ ]+")


class _Loader(yaml.SafeLoader):
    """Loads plain types only. Everything except numbers, booleans and null is a string; repeated keys are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        for key, count in keys.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # 1e-5 is a string in YAML 1.1, but a number for OmegaConf
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file with a mapping of plain data; interpolations stay as they are."""
    try:
        text = file.read_text(encoding="utf-8")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it has {len(text)} characters; a configuration has at most {MAX_CHARACTERS}")
        values = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OSError) as error:
        raise ValueError(f"{file.name} is not YAML of plain data: {str(error)[:300]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} holds a {type(values).__name__} instead of a mapping")
    check_plain(file.name, values)
    return values


class Resolver:
    """Resolves the interpolations of requested values of a configuration."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._tree = tree
        self._steps = 0

    def get(self, path: str) -> Any:
        """The value at a dotted path as plain data; None if there is none."""
        keys = tuple(path.split("."))
        node: Any = self._tree
        for i, key in enumerate(keys):
            node = self._whole(node, keys[:i], 0) if isinstance(node, str) else node
            if not isinstance(node, Mapping) or node.get(key) is None:
                return None
            node = node[key]
        return self._resolved(node, keys, 0)

    def _resolved(self, node: Any, place: tuple[str, ...], depth: int) -> Any:
        """Resolve the value at a place of the tree."""
        self._steps += 1
        if depth > _DEEPEST or self._steps > _MOST_STEPS:
            raise ValueError(f"{'.'.join(place)}: interpolations form a cycle, or are too many")
        if isinstance(node, str):
            return self._whole(node, place, depth)
        if isinstance(node, Mapping):
            return {key: self._resolved(value, (*place, key), depth + 1) for key, value in node.items()}
        if isinstance(node, list):
            return [self._resolved(value, (*place, str(i)), depth + 1) for i, value in enumerate(node)]
        return node

    def _whole(self, text: str, place: tuple[str, ...], depth: int) -> Any:
        """Resolve a text: to a value if it is one interpolation, else to the text with values inserted."""
        parts: list[Any] = []
        rest = text
        while (start := rest.find("${")) >= 0:
            if start and rest[start - 1] == "\\":
                parts.append(rest[: start - 1] + "${")
                rest = rest[start + 2 :]
                continue
            stop = _end(rest, start, place)
            parts += [rest[:start], self._interpolation(rest[start + 2 : stop].strip(), place, depth + 1)]
            rest = rest[stop + 1 :]
        parts = [part for part in (*parts, rest) if part != ""]
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, dict | list) for part in parts):
            raise ValueError(f"{'.'.join(place)}={text[:100]!r} inserts a mapping or list into a text")
        joined = "".join(map(str, parts))
        if len(joined) > MAX_CHARACTERS:
            raise ValueError(f"{'.'.join(place)} becomes a text of {len(joined)} characters")
        return joined

    def _interpolation(self, inner: str, place: tuple[str, ...], depth: int) -> Any:
        """Resolve the text between the braces of an interpolation."""
        where = f"{'.'.join(place)}=${{{inner[:100]}}}"
        if depth > _DEEPEST:
            raise ValueError(f"{where}: interpolations form a cycle, or are too many")
        resolver = _RESOLVER.match(inner)
        if resolver is None:
            key = self._whole(inner, place, depth)
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ValueError(f"{where} is not a known interpolation")
            return self._looked_up(key, place, depth, where)
        name = resolver.group(1)
        if name not in _RESOLVERS:
            raise ValueError(f"{where} uses the resolver {name!r}; known ones are {', '.join(_RESOLVERS)}")
        values = [self._argument(each, place, depth) for each in _arguments(inner[resolver.end() :])]
        if any(type(value) not in (int, float) for value in values):
            raise ValueError(f"{where} computes with {values}, which are not all numbers")
        try:
            result = _RESOLVERS[name](*values)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot be computed: {error}") from error
        if isinstance(result, complex) or abs(result) > 2**63 or not math.isfinite(result):
            raise ValueError(f"{where} is a number that no configuration has")
        return result

    def _argument(self, text: str, place: tuple[str, ...], depth: int) -> Any:
        value = self._whole(text.strip(), place, depth)
        for kind in (int, float):
            try:
                return kind(value) if isinstance(value, str) else value
            except ValueError:
                continue
        return value

    def _looked_up(self, key: str, place: tuple[str, ...], depth: int, where: str) -> Any:
        """The value of another key, relative to the root, or to the place if it starts with dots."""
        dots = len(key) - len(key.lstrip("."))
        keys = [part for part in re.split(r"[.\[\]]+", key[dots:]) if part]
        if dots > len(place):
            raise ValueError(f"{where} goes above the root")
        target = (*(place[: len(place) - dots] if dots else ()), *keys)
        node: Any = self._tree
        for i, part in enumerate(target):
            node = self._whole(node, target[:i], depth) if isinstance(node, str) else node
            if isinstance(node, list) and re.fullmatch(r"-?\d{1,6}", part) and -len(node) <= int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, Mapping) and part in node:
                node = node[part]
            else:
                raise ValueError(f"{where} names a key that does not exist")
        return self._resolved(node, target, depth)


def _end(text: str, start: int, place: tuple[str, ...]) -> int:
    """End of the interpolation that begins at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0 and text[i] == "}":
            return i
    raise ValueError(f"{'.'.join(place)}={text[:100]!r} has an interpolation without an end")


def _arguments(text: str) -> list[str]:
    """Split at commas outside braces."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
