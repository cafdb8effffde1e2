"""Safetensors files: found here or on the Hub, opened as data, written atomically."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextok_pl.files import whole_file
from flextok_pl.progress import announced


@dataclass(frozen=True)
class TensorFile:
    """An open file; only its header has been read."""

    path: Path
    beside: Mapping[str, Path]  # the files there that may describe the model, by name
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, by name
    types: Mapping[str, str]  # likewise, such as `F32`
    handle: Any  # reads a tensor, by `get_tensor(name)`


def find_file(
    path_or_hub_id: str | Path, names: Sequence[str], companions: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """A weights file and, by name, those beside it that there are; on this machine, or else on the Hub.

    `names` are those that the weights file may have in a folder, in order of preference.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), path)
    if path.is_file():
        return path, {each: path.parent / each for each in companions if (path.parent / each).is_file()}
    name = str(path_or_hub_id)
    if (
        isinstance(path_or_hub_id, Path)
        or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
        or name.endswith(".safetensors")
    ):
        raise ValueError(
            f"no checkpoint {name!r}: give a .safetensors file, a folder with {' or '.join(names)}, or a Hub id "
            "owner/name"
        )
    try:
        weights = next((file for each in names if (file := _fetched(name, each))), None)
        beside = {each: file for each in companions if (file := _fetched(name, each))}
    except Exception as error:  # its errors come from several network libraries
        raise ValueError(
            f"no folder {name!r} here, and it could not be fetched from the Hub: {type(error).__name__}: {error}"
        ) from error
    if weights is None:
        raise ValueError(f"{name!r} of the Hub has no {' or '.join(names)}")
    return weights, beside


def _fetched(repository: str, name: str) -> Path | None:
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except LocalEntryNotFoundError:  # a sort of the next one, but of a Hub out of reach
        raise
    except EntryNotFoundError:
        return None


@contextmanager
def open_tensors(path: Path, beside: Mapping[str, Path]) -> Iterator[TensorFile]:
    """Open a safetensors file, memory-mapped; ValueError where it is damaged or of another format."""
    try:
        opened = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no intact safetensors file: {error}") from error
    with opened as handle, announced(f"reading {path}"):
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  not a dict
        shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        types = {name: each.get_dtype() for name, each in slices.items()}
        yield TensorFile(path, beside, handle.metadata() or {}, shapes, types, handle)


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as `whole_file` does: a reader never sees half of it."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(file, shared=True) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from error
