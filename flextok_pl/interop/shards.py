"""Read and write weights in several safetensors files with an index, as Hugging Face's libraries do.

`model.safetensors.index.json` holds `weight_map`, tensor -> name of the file beside it that has the tensor.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

INDEX = ".index.json"
"""Suffix of an index, after the name that the weights would have in one file."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")  # a name, not a path
_MAX_INDEX_BYTES = 50_000_000


def read_index(path: Path) -> dict[str, str]:
    """Map tensors to files beside the index; ValueError if it is damaged, ambiguous, or names other places."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {_MAX_INDEX_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of weights: {error}") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(each, str) for each in found.values()):
        raise ValueError(f"{path} is not an index of weights: it has no weight_map from tensors to names of files")
    for tensor, file in found.items():
        if not _FILE.fullmatch(file):
            raise ValueError(f"{path} places {tensor} in {file!r}; it must be a .safetensors file beside it")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def check_shard(index: Path, shard: str, wanted: Collection[str], there: Collection[str]) -> None:
    """Refuse a file that holds other tensors than the index states."""
    missing, extra = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
    if missing or extra:
        what = f"does not hold {missing[0]}" if missing else f"also holds {extra[0]}"
        raise ValueError(f"{index} does not describe {shard}, which {what}: they are of different models")


def size_in_bytes(size: int | str) -> int:
    """Convert `5GB`, or a number of bytes, to bytes; ValueError for anything else."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?) *([KMGT]B)", str(size).strip().upper())
    number = 0 if match is None else int(match[1] or float(match[2]) * _UNITS[match[3]])
    if number < 1:
        raise ValueError(f"max_shard_size={size!r} must be a number of bytes, or a size such as 500MB or 5GB")
    return number


def split(tensors: Mapping[str, Tensor], file: Path, most: int) -> dict[Path, list[str]]:
    """File -> names of its tensors, in order; a tensor larger than `most` bytes gets its own file."""
    parts: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= size
    if len(parts) <= 1:
        return {file: list(tensors)}
    suffixes = [f"-{number:05d}-of-{len(parts):05d}" for number in range(1, len(parts) + 1)]
    return {file.with_stem(file.stem + suffix): part for suffix, part in zip(suffixes, parts, strict=True)}


def index_text(shards: Mapping[Path, list[str]], tensors: Mapping[str, Tensor]) -> str:
    """Write the text of an index."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    places = {name: file.name for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1) + "\n"
