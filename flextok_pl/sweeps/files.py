"""Reads YAML as the command line does, so that a sweep and its trainings take the same text for the same value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

MERGE = "tag:yaml.org,2002:merge"


def load_yaml(path: Path) -> Any:
    """Read a YAML file: `1e-4` is a number, and a date is a text, as in `flextok fit --config`.

    A mapping with a key twice is refused: the first value would be lost silently.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _require_unique_keys(path, yaml.compose(text, yaml.SafeLoader))
        return get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error


def _require_unique_keys(path: Path, node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _require_unique_keys(path, item)
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, str] = {}
        for key, item in node.value:
            _require_unique_keys(path, item)
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            value = get_loader("yaml")(key.value) if key.style is None else key.value
            if value in found:
                raise ValueError(
                    f"{path}, line {key.start_mark.line + 1}: the key {key.value} is there as {found[value]} already; "
                    "leave one of them out"
                )
            found[value] = key.value
