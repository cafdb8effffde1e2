"""Write WebDataset tars, or shard sets with other shards or smaller pictures, as a new shard set."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flextok_pl.contracts import checked_size, height_width
from flextok_pl.data.convert.classes import Labels, classes_of, read_class_names
from flextok_pl.data.convert.conversion import Conversion, Item, mixed
from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, INDEX_NAME, ShardError, ShardIndex
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.listing import listing_digest, matching_paths
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.shards.tars import Span, tar_samples
from flextok_pl.data.transforms import covering

_LOG = logging.getLogger(__name__)


def write_resharded(
    src: str,
    dst: Path | str,
    *,
    label_key: str | None = None,
    caption_key: str | None = None,
    class_names: Path | str | None = None,
    image_key: str | None = None,
    **options: Any,
) -> ShardIndex:
    """Write WebDataset tars, or a shard set, as a new shard set.

    In tars without an index, files with the same name up to the first dot are one sample. It has a picture, and
    optionally a label (`.cls`, or a key of `.json`) and a caption (`.txt`, or a key of `.json`). A shard set keeps all
    its fields. Samples are stored in an order that mixes the tars. Keys that occur in several tars are prefixed by the
    tar's name.

    Args:
        src: tar files, as a folder or a pattern with `*` or `{000..099}`; or shard sets, in the same way. An existing
            path is taken literally.
        dst: folder for the new set.
        label_key: take the label from this key of `.json`: a class index or a name.
        caption_key: take the caption from this key of `.json`.
        class_names: text file with the name of each class, one per line, or a shard set that has them; default the
            numbers or names found.
        image_key: part of a picture's name after the first dot, such as `input.jpg`, if samples have several pictures
            or longer names; default the sample's only picture.
        **options: those of `Conversion`.

    Raises:
        ValueError: an option, a tar or a sample is invalid; the message names it.
    """
    conversion = Conversion(**options)
    paths = matching_paths(src)
    foreign = {"label_key": label_key, "caption_key": caption_key, "class_names": class_names, "image_key": image_key}
    if all(((path if path.is_dir() else path.parent) / INDEX_NAME).is_file() for path in paths):
        for name, value in foreign.items():
            if value is not None:
                raise ValueError(f"{name}={value} is for tars without an {INDEX_NAME}, but src={src} has one")
        items, contents = _own(src, conversion)
    else:
        names = None if class_names is None else read_class_names("class_names", class_names)
        keys = _Keys(label_key, caption_key, None if image_key is None else image_key.lower())
        items, contents = _foreign(_tars(paths, src), conversion, keys, names)
    make = conversion.reader(Path("/"), needs_picture="image" in contents["fields"])
    return conversion.write(Path(dst).expanduser(), items, make, "shards", **contents)


def _tars(paths: Sequence[Path], src: str) -> list[Path]:
    tars = [tar for path in paths for tar in (sorted(path.rglob("*.tar")) if path.is_dir() else [path])]
    packed = [file for path in paths if path.is_dir() for file in (*path.rglob("*.tar.*"), *path.rglob("*.tgz"))]
    if not tars:
        held = f", but {len(packed)} compressed ones, such as {packed[0].name}; unpack them first" if packed else ""
        raise ValueError(f"src={src} holds no .tar files{held}")
    if packed:
        _LOG.warning("%d compressed tars are left out, such as %s: unpack them first", len(packed), packed[0])
    return [tar.resolve() for tar in tars]


@dataclass(frozen=True, slots=True)
class _Keys:
    """Names of the fields of foreign samples; see `write_resharded`."""

    label: str | None
    caption: str | None
    image: str | None

    def __post_init__(self) -> None:
        if self.image is not None and _ending(self.image) not in IMAGE_EXTENSIONS:
            raise ValueError(f"image_key={self.image} must end like a picture, such as png or input.jpg")


@dataclass(frozen=True, slots=True)
class _Raw:
    """One sample in a tar, with the fields that are read before any sample is written."""

    key: str
    files: dict[str, Span]
    label: int | str | None = None
    caption: str | None = None

    @property
    def first(self) -> Span:
        return next(iter(self.files.values()))

    @property
    def where(self) -> str:
        return f"{self.first.file}, {self.key}"

    @property
    def held(self) -> str:
        return f"it holds .{', .'.join(self.files)}"


def _own(src: str, conversion: Conversion) -> tuple[list[Item], dict[str, Any]]:
    """Read the samples of shard sets, and the facts of the new set."""
    indices = load_indices(src)
    first, size = indices[0], conversion.size
    if size is not None and "image" not in first.fields:
        raise ValueError(f"size={size} is for pictures, but src={src} holds {list(first.fields)}")
    if "shapes" in first.arguments:
        raise ShardError(
            f"{first.where} was made in several shapes, so its order is fixed; write it again with other "
            "samples_per_shard (flextok data latents or tokens)"
        )
    held = first.image_size
    if held is not None and size is not None:
        held = checked_size(covering(height_width(held)[::-1], size)[::-1])
    raw = _list_tars([path.resolve() for index in indices for path in index.paths], None, conversion)
    return mixed(Item(key, tuple(sample.files.items())) for key, sample in zip(_keys(raw), raw, strict=True)), {
        "fields": first.fields,
        "classes": first.classes,
        "image_size": held,
        "arguments": {"writer": "reshard", "source": [index.digest() for index in indices]},
        "provenance": {**first.provenance, "resharded": [str(index.folder.resolve()) for index in indices]},
    }


def _foreign(
    tars: Sequence[Path], conversion: Conversion, keys: _Keys, names: tuple[str, ...] | None
) -> tuple[list[Item], dict[str, Any]]:
    """Read the samples of tars without an index, and the facts of the new set."""
    raw = _list_tars(tars, keys, conversion)
    where = f"{tars[0].parent}"
    labels = [sample.label for sample in raw if sample.label is not None]
    texts = sum(sample.caption is not None for sample in raw)
    for name, key, number, meaning in (
        ("label", keys.label, len(labels), "-1, no class"),
        ("caption", keys.caption, texts, "the empty one"),
    ):
        if key is not None and not number:
            raise ValueError(f"{name}_key={key} is in none of the {len(raw)} samples; {_records(raw)}")
        if 0 < number < len(raw):
            _LOG.warning("%d of %d samples have no %s and get %s", len(raw) - number, len(raw), name, meaning)
    classes = (classes_of(labels, where) if names is None else names) if labels else ()
    if names is not None and not labels:
        raise ValueError(f"class_names has {len(names)} classes, but no sample has a label; {_records(raw)}")
    indices = Labels(classes)
    items = []
    for key, sample in zip(_keys(raw), raw, strict=True):
        try:
            label = indices.index(sample.label) if classes else None
        except ValueError as error:
            raise ValueError(f"{sample.where}: {error}") from error
        picture = _picture(sample, keys.image, conversion.on_error == "raise")
        items.append(Item(key, picture, label, (sample.caption or "") if texts else None))
    return mixed(items), {
        "fields": ("image", *(["label"] if classes else []), *(["text"] if texts else [])),
        "classes": classes,
        "arguments": {
            "writer": "reshard",
            "source": [str(tar) for tar in tars],
            "files": listing_digest(Path("/"), map(str, tars)),
            "label_key": keys.label,
            "caption_key": keys.caption,
            "class_names": None if names is None else list(names),
            **({} if keys.image is None else {"image_key": keys.image}),
        },
        "provenance": {"source": where},
    }


def _picture(sample: _Raw, image_key: str | None, required: bool) -> tuple[tuple[str, Span], ...]:
    """The only picture of a foreign sample, or another file if the sample is to be left out."""
    wanted, called = (IMAGE_EXTENSIONS, "picture") if image_key is None else ((image_key,), f"picture .{image_key}")
    found = [(name, span) for name, span in sample.files.items() if name in wanted]
    if len(found) > 1:
        raise ValueError(
            f"{sample.where}: it has several pictures ({sample.held}); name the one to take, as image_key={found[0][0]}"
        )
    if not found and required:
        longer = [name for name in sample.files if _ending(name) in IMAGE_EXTENSIONS]
        remedy = f"give image_key={longer[0]} if all have it, or " if longer else ""
        raise ValueError(
            f"{sample.where}: it has no {called} ({sample.held}, named from the first dot on); {remedy}rename "
            "the files, or pass on_error=skip"
        )
    return tuple((_ending(name), span) for name, span in found) or (("", sample.first),)


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _records(raw: Sequence[_Raw]) -> str:
    """Describe, for error messages, what a sample offers for labels and captions."""
    for sample in raw:
        if "json" in sample.files:
            return f"the .json of {sample.key} has the keys {', '.join(_record(sample.files))}"
    return f"none has a .json, such as {raw[0].where} ({raw[0].held})" if raw else "there are none"


def _record(files: Mapping[str, Span]) -> dict[str, Any]:
    """Read a sample's `.json`."""
    try:
        record = json.loads(files["json"].read(Path("/")))
    except ValueError as error:
        raise ValueError(f"its .json cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f'its .json is {str(record)[:40]!r}, but must have keys with values, such as {{"label": 3}}')
    return record


def _list_tars(tars: Sequence[Path], keys: _Keys | None, conversion: Conversion) -> list[_Raw]:
    listed = run_jobs(partial(_list_tar, keys), [str(tar) for tar in tars], conversion.num_workers, "list", "tar")
    return [sample for samples in listed for sample in samples]


def _list_tar(keys: _Keys | None, tar: str) -> list[_Raw]:
    """The samples of a tar, also if their files are apart; with label and caption if there are keys."""
    gathered: dict[str, dict[str, Span]] = {}
    for key, entries in tar_samples(Path("/"), tar):
        files = gathered.setdefault(key, {})
        for extension, span in entries:
            if extension in files:
                raise ValueError(
                    f"{tar} has two files {key}.{extension} (upper and lower case are one); pack it again with one of "
                    "them, or give them different names"
                )
            files[extension] = span
    samples = []
    for key, files in gathered.items():
        try:
            samples.append(_Raw(key, files, *(() if keys is None else _annotations(files, keys))))
        except ValueError as error:
            raise ValueError(f"{tar}, {key}: {error}") from error
    return samples


def _annotations(files: Mapping[str, Span], keys: _Keys) -> tuple[int | str | None, str | None]:
    """Label and caption of a foreign sample, None if it has none."""
    record: dict[str, Any] = {}
    if (keys.label is not None or keys.caption is not None) and "json" in files:
        record = _record(files)
    label = caption = None
    if keys.label is not None:
        label = _label(record.get(keys.label), f"{keys.label} of its .json")
    elif "cls" in files:
        label = _label(files["cls"].read(Path("/")).decode("utf-8-sig").strip(), ".cls")
    if keys.caption is not None:
        caption = record.get(keys.caption)
    elif "txt" in files:
        caption = files["txt"].read(Path("/")).decode("utf-8-sig")
    if not isinstance(caption, str | None):
        raise ValueError(f"its {keys.caption} {caption!r} is not a text")
    return label, caption


def _label(value: Any, where: str) -> int | str | None:
    """A label as a class index or a name; `10.0`, as in tables of numbers, becomes 10."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str | None) or value == "":
        raise ValueError(f"{where} is {value!r}, which is not a class index or a name")
    whole = re.fullmatch(r"([+-]?[0-9]+)(\.0*)?", value) if isinstance(value, str) else None
    return value if whole is None else int(whole[1])


def _keys(raw: Sequence[_Raw]) -> list[str]:
    """The samples' keys, with the tar's name as prefix if they occur in several tars."""
    keys = [sample.key.lstrip("/").replace(".", "_") for sample in raw]
    if len(set(keys)) != len(keys):
        tars = [sample.first.file.removesuffix(".tar") for sample in raw]
        above = os.path.commonpath([os.path.dirname(tar) for tar in tars])
        keys = [f"{os.path.relpath(tar, above).replace('.', '_')}/{key}" for tar, key in zip(tars, keys, strict=True)]
    return [f"file-{key}" if key.startswith("__") else key for key in keys]
