"""Find safetensors files here or on the Hub, open them as data, and write them atomically, in one or several files."""

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextok_pl.files import whole_files
from flextok_pl.interop.hub import HubFiles, HubId, not_in_cache, reason
from flextok_pl.interop.shards import INDEX, check_shard, index_text, read_index, size_in_bytes, split
from flextok_pl.progress import announced


@dataclass(frozen=True)
class TensorFile:
    """An open file, or the files of an index; only headers are read."""

    path: Path
    beside: Mapping[str, Path]  # existing files that may describe the model, by name
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]  # shapes of its tensors, by name
    types: Mapping[str, str]  # types of its tensors, such as `F32`, by name
    handle: Any  # reads a tensor, by `get_tensor(name)`


def with_indices(names: Sequence[str]) -> list[str]:
    """Names of weights files, then of their indices: the order in which a folder is searched."""
    return [*names, *(name + INDEX for name in names)]


def find_file(
    path_or_hub_id: str | Path, names: Sequence[str], companions: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """Find a weights file or its index and, by name, existing files beside it; locally, or else on the Hub.

    `names` are the names that the weights file may have in a folder, in order of preference. The files of an index from
    the Hub are downloaded too.
    """
    candidates = with_indices(names)
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        path = next((path / name for name in candidates if (path / name).is_file()), path)
    if path.is_file():
        return path, {each: path.parent / each for each in companions if (path.parent / each).is_file()}
    name = str(path_or_hub_id)
    source = None if isinstance(path_or_hub_id, Path) else HubId.parse(name)
    if source is None:
        raise ValueError(
            f"no checkpoint {name!r}: give a .safetensors file, a folder with {' or '.join(names)}, or a Hub id "
            "owner/name or owner/name@revision"
        )
    files, failed = HubFiles(source), f"no folder {name!r} here, and it could not be fetched from the Hub"

    def fetched(file: str) -> Path | None:
        try:
            return files.fetch(file)
        except Exception as error:  # errors come from several network libraries
            raise ValueError(f"{failed}: {reason(error, source)}") from error

    weights = next((file for each in candidates if (file := fetched(each))), None)
    beside = {each: file for each in companions if weights and (file := fetched(each))}
    parts = dict.fromkeys(read_index(weights).values() if weights and weights.name.endswith(INDEX) else [])
    lacking = [each for each in parts if fetched(each) is None] if weights else list(names)
    if lacking and files.away is not None:
        raise ValueError(f"{failed}: {not_in_cache(source, lacking[0], files.away)}")
    if weights is None:
        raise ValueError(f"{name!r} of the Hub has no {' or '.join(names)}")
    if lacking:
        raise ValueError(f"{name!r} of the Hub is incomplete: {weights.name} names {lacking[0]}, which is missing")
    return weights, beside


@contextmanager
def open_tensors(path: Path, beside: Mapping[str, Path]) -> Iterator[TensorFile]:
    """Open a safetensors file, memory-mapped, or the files of an index.

    Raises ValueError if one is damaged, missing or of another format, or does not fit the index.
    """
    if not path.name.endswith(INDEX):
        with _open(path, beside) as file:
            yield file
        return
    index = read_index(path)
    with ExitStack() as opened:
        parts: dict[str, TensorFile] = {}
        for name in dict.fromkeys(index.values()):
            if not (path.parent / name).is_file():
                raise ValueError(f"{path} names {name}, which is not beside it: copy all its files, or save it again")
            parts[name] = opened.enter_context(_open(path.parent / name, {}))
            check_shard(path, name, [each for each, file in index.items() if file == name], parts[name].shapes)
        first = next(iter(parts.values()))
        for part in parts.values():
            if part.metadata != first.metadata:
                raise ValueError(f"{part.path} and {first.path} have different metadata: they are of different models")
        shapes = {name: parts[file].shapes[name] for name, file in index.items()}
        types = {name: parts[file].types[name] for name, file in index.items()}
        yield TensorFile(path, beside, first.metadata, shapes, types, _Parts(index, parts))


class _Parts:
    """Reads each tensor from its file."""

    def __init__(self, index: Mapping[str, str], parts: Mapping[str, TensorFile]) -> None:
        self._index, self._parts = index, parts

    def get_tensor(self, name: str) -> Tensor:
        return self._parts[self._index[name]].handle.get_tensor(name)  # type: ignore[no-any-return]


@contextmanager
def _open(path: Path, beside: Mapping[str, Path]) -> Iterator[TensorFile]:
    try:
        opened = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not an intact safetensors file: {error}") from error
    with opened as handle, announced(f"reading {path}"):
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  not a dict
        shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        types = {name: each.get_dtype() for name, each in slices.items()}
        yield TensorFile(path, beside, handle.metadata() or {}, shapes, types, handle)


def write_tensors(
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: Mapping[str, str],
    max_shard_size: int | str | None = None,
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file, or several with an index if they are larger; returns the file or the index.

    All are written by `whole_files`, together with the texts `beside` them: a reader never sees half of a model, and an
    old model stays if writing fails. Afterwards, files of an old model in the other layout are removed.
    """
    most = None if max_shard_size is None else size_in_bytes(max_shard_size)
    shards = {file: list(tensors)} if most is None else split(tensors, file, most)
    index, former = file.with_name(file.name + INDEX), files_of(file)
    texts = {file.with_name(name): text for name, text in (beside or {}).items()}
    last = [index] if len(shards) > 1 else []
    with whole_files([*texts, *shards, *last], shared=True) as temporaries:
        places = dict(zip([*texts, *shards, *last], temporaries, strict=True))
        for place, text in texts.items():
            places[place].write_text(text, encoding="utf-8")
        for shard, names in shards.items():
            part = {name: tensors[name].detach().cpu().contiguous() for name in names}
            try:
                save_file(part, places[shard], metadata=dict(metadata))
            except SafetensorError as error:
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]) if number else errno.EIO, f"cannot write {shard}: {error}") from error
        for place in last:
            places[place].write_text(index_text(shards, tensors), encoding="utf-8")
    for each in sorted(former - {*shards, *last}, key=lambda each: each != index):  # an index before its files
        each.unlink(missing_ok=True)
    return index if last else file


def files_of(file: Path) -> set[Path]:
    """The files of a model with this name, in one or in several with an index."""
    index = file.with_name(file.name + INDEX)
    try:
        named = [name for name in read_index(index).values() if name.startswith(f"{file.stem}-")]
    except ValueError:
        named = []
    return {file, index, *map(file.with_name, named)}
