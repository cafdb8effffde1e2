"""Parse the text of an untrusted checkpoint as plain data; nothing is imported, instantiated or evaluated."""

import ast
import json
from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 50_000
_MAX_NODES = 5_000
_MAX_DEPTH = 20


def parse_text(label: str, text: str) -> Any:
    """Parse dicts, lists, strings, numbers, booleans and None from a Python literal or else YAML (and so JSON).

    `label` names the text in the ValueError for a text that is too long, too deeply nested, or not plain data.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{label} has {len(text)} characters; a configuration has at most {MAX_CHARACTERS}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{label} is neither a python literal nor YAML: {str(error)[:200]}") from error
    check_plain(label, value)
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file with a mapping of plain data."""
    if not file.is_file():
        raise ValueError(f"no configuration file {str(file)!r}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} instead of a mapping")
    check_plain(str(file), values)
    return values


def check_plain(label: str, value: Any) -> None:
    """Refuse values that are not plain data, or too many or too deep to be a configuration."""
    waiting, seen = [(value, 0)], 0
    while waiting:  # aliases of YAML can make a small text an enormous tree, so visits are counted
        node, depth = waiting.pop()
        seen += 1
        if seen > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError(f"{label} is too large or too deeply nested to be a configuration")
        if isinstance(node, dict):
            for key in node:
                if type(key) is not str:
                    raise ValueError(f"{label} has a key {key!r} that is not a string")
            waiting += [(item, depth + 1) for item in node.values()]
        elif isinstance(node, list | tuple):
            waiting += [(item, depth + 1) for item in node]
        elif node is not None and type(node) not in (str, int, float, bool):
            raise ValueError(f"{label} holds a {type(node).__name__}, which no configuration has")
