"""WebDataset tars as a shard set: those of others, and sets of ours with other shards or smaller pictures."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flextok_pl.data.convert import (
    Conversion,
    ImageFormat,
    Item,
    ItemReader,
    Labels,
    OnError,
    classes_of,
    mixed,
)
from flextok_pl.data.index import IMAGE_EXTENSIONS, INDEX_NAME, ShardIndex
from flextok_pl.data.listing import Span, listing_digest, matching_paths, tar_samples
from flextok_pl.data.shards import run_jobs, worker_processes
from flextok_pl.data.sources import load_indices

_LOG = logging.getLogger(__name__)


def write_resharded(
    src: str,
    dst: Path | str,
    label_key: str | None = None,
    caption_key: str | None = None,
    class_names: Path | str | None = None,
    size: int | None = None,
    image_format: ImageFormat = "jpg",
    quality: int = 95,
    on_error: OnError = "raise",
    num_workers: int | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> ShardIndex:
    """Write WebDataset tars, or a shard set, as a new shard set.

    Samples of tars without an index are a picture, and where all have them a label (`.cls`, or a key of `.json`) and a
    caption (`.txt`, or a key of `.json`). Of a shard set everything is kept. Samples are stored in an order that mixes
    the tars. Keys that occur in several tars get the tar's name before them.

    Args:
        src: tar files, as a folder or a pattern with `*` or `{000..099}`; or shard sets, likewise.
        dst: folder of the new set.
        label_key: take the label from this key of `.json`: a class index, or a name.
        caption_key: take the caption from this key of `.json`.
        class_names: text file with the name of each class, one per line; default the numbers or names that occur.
        size: shrink pictures whose shorter side is longer than this to it, antialiased; default keeps the files' bytes.
        image_format: format of the pictures that were shrunk; `png` is lossless.
        quality: of `jpg` and `webp`, 1..100.
        on_error: `raise` stops at a broken picture, `skip` leaves it out, with a message and a count in the index.
        num_workers: processes; default one per core.
        samples_per_shard: most samples of a tar file.
        overwrite: replace a set that was made with other arguments.

    Returns:
        The index of the new set.

    Raises:
        ValueError: an option, a tar or a sample is unusable; names it.
    """
    conversion = Conversion(size, image_format, quality, on_error, num_workers, samples_per_shard, overwrite)
    paths = matching_paths(src)
    foreign = {"label_key": label_key, "caption_key": caption_key, "class_names": class_names}
    if all(((path if path.is_dir() else path.parent) / INDEX_NAME).is_file() for path in paths):
        for name, value in foreign.items():
            if value is not None:
                raise ValueError(f"{name}={value} is for tars without an {INDEX_NAME}; src={src} has one")
        items, plan = _own(src, conversion)
    else:
        names = None if class_names is None else _read_names(Path(class_names))
        items, plan = _foreign(_tars(paths, src), conversion, label_key, caption_key, names)
    return conversion.write(Path(dst), items, ItemReader(Path("/"), conversion, "image" in plan.fields), plan, "shards")


def _tars(paths: Sequence[Path], src: str) -> list[Path]:
    tars = [tar for path in paths for tar in (sorted(path.rglob("*.tar")) if path.is_dir() else [path])]
    if not tars:
        raise ValueError(f"src={src} holds no .tar files")
    return [tar.resolve() for tar in tars]


@dataclass(frozen=True, slots=True)
class _Raw:
    """One sample as it lies in a tar, with what is to be read of it before any is written."""

    key: str
    files: tuple[tuple[str, Span], ...]
    label: int | str | None = None
    caption: str | None = None


def _own(src: str, conversion: Conversion) -> tuple[list[Item], ShardIndex]:
    indices = load_indices(src)
    first, size = indices[0], conversion.size
    if size is not None and "image" not in first.fields:
        raise ValueError(f"size={size} is for pictures, and src={src} holds {list(first.fields)}")
    raw = _list_tars([path.resolve() for index in indices for path in index.paths], _list_tar, conversion)
    arguments = {
        "writer": "reshard",
        "source": [hashlib.sha256(index.to_json().encode()).hexdigest() for index in indices],
    }
    side = first.image_size if size is None or first.image_size is None else min(size, first.image_size)
    provenance = {**first.provenance, "resharded": [str(index.folder.resolve()) for index in indices]}
    items = [Item(key, sample.files) for key, sample in zip(_keys(raw), raw, strict=True)]
    return mixed(items), ShardIndex(first.folder, first.fields, (), first.classes, side, arguments, provenance)


def _foreign(
    tars: Sequence[Path],
    conversion: Conversion,
    label_key: str | None,
    caption_key: str | None,
    names: tuple[str, ...] | None,
) -> tuple[list[Item], ShardIndex]:
    raw = _list_tars(tars, partial(_list_foreign_tar, label_key, caption_key), conversion)
    where = f"{tars[0].parent}"
    labels = [sample.label for sample in raw if sample.label is not None]
    texts = sum(sample.caption is not None for sample in raw)
    for name, number, meaning in (("label", len(labels), "-1, no class"), ("caption", texts, "the empty one")):
        if 0 < number < len(raw):
            _LOG.warning("%d of %d samples have no %s and get %s", len(raw) - number, len(raw), name, meaning)
    classes = (classes_of(labels, where) if names is None else names) if labels else ()
    indices = Labels(classes)
    items = []
    for key, sample in zip(_keys(raw), raw, strict=True):
        try:
            label = indices.index(sample.label) if classes else None
        except ValueError as error:
            raise ValueError(f"{sample.files[0][1].file}, {sample.key}: {error}") from error
        pictures = [entry for e in IMAGE_EXTENSIONS for entry in sample.files if entry[0] == e]
        items.append(Item(key, (*pictures, *sample.files)[:1], label, (sample.caption or "") if texts else None))
    fields = ("image", *(["label"] if classes else []), *(["text"] if texts else []))
    arguments = {
        "writer": "reshard",
        "source": [str(tar) for tar in tars],
        "files": listing_digest(Path("/"), map(str, tars)),
        "label_key": label_key,
        "caption_key": caption_key,
        "class_names": None if names is None else list(names),
    }
    return mixed(items), ShardIndex(tars[0].parent, fields, (), classes, None, arguments, {"source": where})


def _list_tars(tars: Sequence[Path], job: Callable[[int, str], list[_Raw]], conversion: Conversion) -> list[_Raw]:
    listed: dict[int, list[_Raw]] = {}
    jobs = [(number, str(tar)) for number, tar in enumerate(tars)]
    for number, samples in tqdm(
        run_jobs(job, jobs, worker_processes(conversion.num_workers)), total=len(jobs), desc="list", unit="tar"
    ):
        listed[number] = samples
    return [sample for number in range(len(jobs)) for sample in listed[number]]


def _list_tar(_: int, tar: str) -> list[_Raw]:
    return [_Raw(key, tuple(files)) for key, files in tar_samples(Path("/"), tar)]


def _list_foreign_tar(label_key: str | None, caption_key: str | None, number: int, tar: str) -> list[_Raw]:
    samples = []
    for sample in _list_tar(number, tar):
        try:
            label, caption = _annotations(dict(sample.files), label_key, caption_key)
        except ValueError as error:
            raise ValueError(f"{tar}, {sample.key}: {error}") from error
        samples.append(_Raw(sample.key, sample.files, label, caption))
    return samples


def _annotations(
    files: Mapping[str, Span], label_key: str | None, caption_key: str | None
) -> tuple[int | str | None, str | None]:
    """Label and caption of a foreign sample, None where it has none."""
    record: Any = {}
    if (label_key is not None or caption_key is not None) and "json" in files:
        record = json.loads(files["json"].read(Path("/")))
    label = caption = None
    if label_key is not None:
        label = record.get(label_key)
    elif "cls" in files:
        text = files["cls"].read(Path("/")).decode().strip()
        label = int(text) if text.removeprefix("-").isdecimal() else text
    if caption_key is not None:
        caption = record.get(caption_key)
    elif "txt" in files:
        caption = files["txt"].read(Path("/")).decode()
    if not isinstance(label, int | str | None) or isinstance(label, bool):
        raise ValueError(f"its {label_key} {label!r} is no class index or name")
    if not isinstance(caption, str | None):
        raise ValueError(f"its {caption_key} {caption!r} is no text")
    return label, caption


def _keys(raw: Sequence[_Raw]) -> list[str]:
    """The samples' keys, with the name of their tar before them where they occur in several."""
    keys = [sample.key.lstrip("/").replace(".", "_") for sample in raw]
    if len(set(keys)) != len(keys):
        tars = [Path(sample.files[0][1].file).stem.replace(".", "_") for sample in raw]
        keys = [f"{tar}/{key}" for tar, key in zip(tars, keys, strict=True)]
    return [f"file-{key}" if key.startswith("__") else key for key in keys]


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"class_names={path} cannot be read: {error}") from error
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice or not names:
        held = f"{twice[0]!r} twice" if twice else "none"
        raise ValueError(f"class_names={path} must have one name per class, each another; it has {held}")
    return names
