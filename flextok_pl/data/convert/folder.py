"""Write a folder of images as shards."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flextok_pl.data.convert.captions import read_captions
from flextok_pl.data.convert.classes import read_class_names
from flextok_pl.data.convert.conversion import Conversion, Item, check_choice
from flextok_pl.data.image_files import find_images, split_ending
from flextok_pl.data.shards.index import ShardIndex
from flextok_pl.data.shards.listing import listing_digest
from flextok_pl.data.shards.tars import Span
from flextok_pl.keys import text_hash

_LOG = logging.getLogger(__name__)


def write_folder(
    src: Path | str,
    dst: Path | str,
    *,
    labels: Literal["auto", "folders", "none"] = "auto",
    captions: Path | str | None = None,
    val_fraction: float = 0.0,
    classes: list[str] | Path | str | None = None,
    **options: Any,
) -> dict[str, ShardIndex]:
    """Write a folder of images as shards: `DST`, or `DST/train` and `DST/val` with `val_fraction`.

    Every picture is decoded once, so you learn of a broken one now and not in training. Pictures are stored in an order
    that mixes the folders. Classes are the folders directly under SRC, in alphabetical order. All formats that Pillow
    reads are taken, at any depth; a message counts the other files by ending.

    Args:
        src: folder of images, searched recursively.
        dst: folder for the shards.
        labels: `folders` takes classes from folders, `none` stores no labels, `auto` takes classes if all pictures are
            in folders.
        captions: `.csv` or `.tsv` with the columns file and caption, or `.jsonl` with these keys. Give file relative to
            SRC, or absolute. Every picture needs an entry. Put a field with a comma or a quote in quotes.
        val_fraction: share of the pictures for `DST/val`, chosen by a hash of the file name.
        classes: names of the classes by number, so that separately converted sets number them alike: a text file with
            one per line, a shard set that has them, or a list. Default the folders' names. A class may be empty.
        **options: those of `Conversion`.

    Returns:
        The index of each part: `all`, or `train` and `val`.

    Raises:
        ValueError: an option, a picture or a caption is invalid; the message names it.
    """
    conversion = Conversion(**options)
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    if not src.is_dir():
        raise ValueError(f"src={src} is not a folder")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be a share in [0, 1)")
    check_choice("labels", labels, ("auto", "folders", "none"))
    if classes is not None and labels == "none":
        raise ValueError(f"classes={classes} and labels=none: leave one of them out")
    given = None if classes is None else read_class_names("classes", classes)
    beside = [Path(path) for path in (captions, classes) if isinstance(path, str | Path)]
    found = find_images(src, beside)
    files = list(found.extensions)
    names = _classes(src, files, labels, given)
    texts = None if captions is None else _captions(src, files, Path(captions))
    items = _items(found.extensions, names, texts)
    arguments = {
        "writer": "folder",
        "source": str(src.resolve()),
        "files": listing_digest(src, files),
        "labels": "folders" if names else "none",
        **({} if given is None else {"classes": list(given)}),
        "captions": None if texts is None else hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "val_fraction": val_fraction,
    }
    contents: dict[str, Any] = {
        "fields": ("image", *(["label"] if names else []), *(["text"] if texts is not None else [])),
        "classes": names,
        "arguments": arguments,
        "provenance": {"source": str(src.resolve())},
    }
    sets = {}
    for part, chosen in _parts(items, val_fraction).items():
        folder = dst if part == "all" else dst / part
        sets[part] = conversion.write(folder, chosen, conversion.reader(src), f"{part} shards", **contents)
    found.tell_rest()
    without = sorted(set(names) - {file.partition("/")[0] for file in files})
    if without:
        _LOG.warning("%d of the %d classes have no pictures here, such as %s", len(without), len(names), without[0])
    return sets


def _classes(src: Path, files: Sequence[str], labels: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes by number; empty without classes."""
    loose = [file for file in files if "/" not in file]
    if labels == "none" or (labels == "auto" and given is None and len(loose) == len(files)):
        return ()
    if loose:
        raise ValueError(
            f"src={src} has {len(loose)} images directly in it, such as {loose[0]}, but its folders are classes: "
            "move them into a class folder, or set labels=none"
        )
    found = sorted({file.partition("/")[0] for file in files})
    if given is None:
        return tuple(found)
    unknown = [name for name in found if name not in given]
    if unknown:
        raise ValueError(
            f"classes: src={src} has {len(unknown)} folders that are not among the {len(given)} classes, such as "
            f"{unknown[0]!r}; add them to the list, or move them out of SRC"
        )
    return tuple(given)


def _captions(src: Path, files: Sequence[str], path: Path) -> dict[str, str]:
    """The caption of every file."""
    texts = read_captions(path, src)
    without = [file for file in files if file not in texts]
    if without:
        raise ValueError(
            f"captions={path} has no entry for {len(without)} of {len(files)} images, such as {without[0]}; add "
            "them (an empty caption is allowed), or move these images out of SRC"
        )
    unused = sorted(texts.keys() - set(files))
    if unused:
        _LOG.warning("captions=%s: %d entries name no image under %s, such as %s", path, len(unused), src, unused[0])
    return {file: texts[file] for file in files}


def _items(extensions: Mapping[str, str], classes: Sequence[str], texts: dict[str, str] | None) -> list[Item]:
    number = {name: i for i, name in enumerate(classes)}
    keys: dict[str, str] = {}
    items = []
    for file, extension in extensions.items():
        stem, ending = split_ending(file)
        key = stem.replace(".", "_")
        if key in keys or key.startswith("__"):
            key = f"file-{key}_{ending or extension}"
        if key in keys:
            raise ValueError(f"{keys[key]} and {file} give the same sample key {key!r}; rename one of them")
        keys[key] = file
        label = number[file.partition("/")[0]] if classes else None
        caption = None if texts is None else texts[file]
        items.append(Item(key, ((extension, Span(file)),), label, caption))
    return sorted(items, key=lambda item: text_hash(item.name))


def _parts(items: list[Item], val_fraction: float) -> dict[str, list[Item]]:
    if val_fraction == 0:
        return {"all": items}
    bound = int(val_fraction * 2**64)
    parts: dict[str, list[Item]] = {"train": [], "val": []}
    for item in items:
        parts["val" if text_hash(f"val {item.name}") < bound else "train"].append(item)
    empty = [part for part, chosen in parts.items() if not chosen]
    if empty:
        raise ValueError(f"val_fraction={val_fraction} of {len(items)} images leaves {empty[0]} empty; change it")
    return parts
