"""YAML as the command line reads it, so that a sweep and its trainings take the same text for the same value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader


def load_yaml(path: Path) -> Any:
    """Read a YAML file: `1e-4` is a number, and a date is a text, as in `flextok fit --config`.

    Raises:
        ValueError: it cannot be read, or a mapping has a key twice, of which the first would be lost without a word.
    """
    try:
        text = path.read_text(encoding="utf-8")
        for node in _mappings(yaml.compose(text, yaml.SafeLoader)):
            _require_unique_keys(path, node)
        return get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """All mappings in a document."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def _require_unique_keys(path: Path, node: yaml.MappingNode) -> None:
    found: dict[Any, str] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        value = get_loader("yaml")(key.value) if key.style is None else key.value
        if value in found:
            raise ValueError(
                f"{path}, line {key.start_mark.line + 1}: the key {key.value} is there as {found[value]} already; "
                "leave one of them out"
            )
        found[value] = key.value
