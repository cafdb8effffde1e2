"""Any folder of images as shards."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from flextok_pl.data.index import IMAGE_EXTENSIONS, ShardError, ShardIndex
from flextok_pl.data.shards import Sample, start_set, write_index, write_shards
from flextok_pl.data.transforms import decode_image

_LOG = logging.getLogger(__name__)


def write_folder(
    src: Path | str,
    dst: Path | str,
    size: int | None = None,
    image_format: Literal["png", "jpg", "webp"] = "jpg",
    quality: int = 95,
    labels: Literal["auto", "folders", "none"] = "auto",
    captions: Path | str | None = None,
    val_fraction: float = 0.0,
    on_error: Literal["raise", "skip"] = "raise",
    num_workers: int | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> dict[str, ShardIndex]:
    """Write a folder of images as shards: `DST`, or `DST/train` and `DST/val` with `val_fraction`.

    Every picture is decoded once, so that a broken one is found now and not in training. They are stored in an
    order that mixes the folders. Classes are the names of the folders directly under SRC, in alphabetical order.

    Args:
        src: folder of images, searched recursively.
        dst: where the shards go.
        size: shrink pictures whose shorter side is longer than this to it, antialiased; default keeps the files' bytes.
        image_format: format of the pictures that were shrunk; `png` is lossless.
        quality: of `jpg` and `webp`, 1..100.
        labels: `folders` takes classes from folders, `none` stores no labels, `auto` decides by whether all pictures
            lie in folders.
        captions: `.csv` or `.tsv` with the columns file and caption, or `.jsonl` with these keys; file is relative to
            SRC.
        val_fraction: share of the pictures that goes to `DST/val`, by a hash of the file name.
        on_error: `raise` stops at a broken picture, `skip` leaves it out, with a message and a count in the index.
        num_workers: processes; default one per core.
        samples_per_shard: pictures per tar file.
        overwrite: replace a set that was made with other arguments.

    Returns:
        The index by part: `all`, or `train` and `val`.

    Raises:
        ValueError: an option, a picture or a caption is unusable; names it.
    """
    src, dst = Path(src), Path(dst)
    _check_options(src, size, quality, val_fraction, image_format, labels, on_error)
    files = list_images(src)
    classes = _classes(src, files, labels)
    texts = None if captions is None else read_captions(Path(captions))
    items = _items(files, classes, texts, captions)
    arguments: dict[str, Any] = {
        "writer": "folder",
        "source": str(src.resolve()),
        "files": _listing_digest(src, files),
        "size": size,
        "image_format": image_format if size is not None else None,
        "quality": quality if size is not None else None,
        "labels": "folders" if classes else "none",
        "captions": None if texts is None else hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "val_fraction": val_fraction,
        "on_error": on_error,
        "samples_per_shard": samples_per_shard,
    }
    fields = ("image", *(["label"] if classes else []), *(["text"] if texts is not None else []))
    make = _MakeSample(src, size, image_format, quality, on_error)
    workers = os.cpu_count() or 1 if num_workers is None else num_workers
    result = {}
    for part, chosen in _parts(items, val_fraction).items():
        folder = dst if part == "all" else dst / part
        ready = start_set(folder, arguments, overwrite)
        if ready is None:
            shards = write_shards(
                folder,
                chosen,
                make,
                samples_per_shard=samples_per_shard,
                num_workers=0 if workers == 1 else workers,
                description=f"{part} shards",
            )
            skipped = len(chosen) - sum(shard.count for shard in shards)
            provenance = {"source": str(src.resolve()), "skipped": skipped}
            ready = ShardIndex(folder, fields, tuple(shards), tuple(classes), None, arguments, provenance)
            if not ready.num_samples:
                raise ShardError(f"none of the {len(chosen)} pictures for {folder} could be decoded")
            write_index(ready)
        result[part] = ready
    return result


def _check_options(
    src: Path, size: int | None, quality: int, val_fraction: float, image_format: str, labels: str, on_error: str
) -> None:
    if not src.is_dir():
        raise ValueError(f"src={src} is no folder")
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel, or null to keep the pictures as they are")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality} must be in 1..100")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be a share in [0, 1)")
    for name, value, known in (
        ("image_format", image_format, ("png", "jpg", "webp")),
        ("labels", labels, ("auto", "folders", "none")),
        ("on_error", on_error, ("raise", "skip")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {known}")


def list_images(src: Path) -> list[str]:
    """Paths of the images under a folder, relative to it, ordered; hidden files and folders are left out.

    Raises:
        ValueError: there is none.
    """
    files = []
    for root, folders, names in os.walk(src, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        relative = Path(root).relative_to(src)
        files += [
            (relative / name).as_posix()
            for name in names
            if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
        ]
    if not files:
        raise ValueError(f"src={src} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    return sorted(files)


def _classes(src: Path, files: Sequence[str], labels: str) -> list[str]:
    loose = [file for file in files if "/" not in file]
    if labels == "none" or (labels == "auto" and len(loose) == len(files)):
        return []
    if loose:
        raise ValueError(
            f"src={src} has images in folders and {len(loose)} directly under it, such as {loose[0]}: move them into a "
            "class folder, or set labels=none"
        )
    return sorted({file.partition("/")[0] for file in files})


def read_captions(path: Path) -> dict[str, str]:
    """Caption by file from `.csv`, `.tsv` or `.jsonl`.

    Raises:
        ValueError: the file cannot be read, or a row lacks file or caption.
    """
    if path.suffix not in (".csv", ".tsv", ".jsonl") or not path.is_file():
        raise ValueError(f"captions={path} must be an existing .csv, .tsv or .jsonl file")
    with path.open(encoding="utf-8", newline="") as file:
        try:
            rows = (
                [json.loads(line) for line in file if line.strip()]
                if path.suffix == ".jsonl"
                else list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
            )
        except (json.JSONDecodeError, csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"captions={path} cannot be read: {error}") from error
    captions = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("file", "caption")):
            raise ValueError(f"captions={path}: entry {number} needs the columns file and caption, it is {row!r}")
        captions[Path(row["file"]).as_posix()] = row["caption"]
    return captions


def _items(
    files: Sequence[str], classes: Sequence[str], texts: dict[str, str] | None, captions: Path | str | None
) -> list[Item]:
    number = {name: i for i, name in enumerate(classes)}
    without = [file for file in files if texts is not None and file not in texts]
    if without:
        raise ValueError(
            f"captions={captions} has no entry for {len(without)} of {len(files)} images, such as {without[0]}; add "
            "them (an empty caption is allowed)"
        )
    keys: dict[str, str] = {}
    items = []
    for file in files:
        stem, _, extension = file.rpartition(".")
        key = stem.replace(".", "_")
        if key in keys or key.startswith("__"):
            key = f"file-{key}_{extension}"
        if key in keys:
            raise ValueError(f"{keys[key]} and {file} give the same sample key {key!r}; rename one of them")
        keys[key] = file
        label = number[file.partition("/")[0]] if classes else None
        items.append(Item(file, key, label, None if texts is None else texts[file]))
    return sorted(items, key=lambda item: _hash(item.file))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _listing_digest(src: Path, files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        status = (src / file).stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _parts(items: list[Item], val_fraction: float) -> dict[str, list[Item]]:
    if val_fraction == 0:
        return {"all": items}
    bound = int(val_fraction * 2**64)
    parts = {
        "train": [item for item in items if _hash(f"val {item.file}") >= bound],
        "val": [item for item in items if _hash(f"val {item.file}") < bound],
    }
    empty = [part for part, chosen in parts.items() if not chosen]
    if empty:
        raise ValueError(f"val_fraction={val_fraction} of {len(items)} images leaves {empty[0]} empty; change it")
    return parts


@dataclass(frozen=True)
class Item:
    """One image to write.

    Args:
        file: path relative to the source folder.
        key: sample key.
        label: class index, or None in a set without classes.
        caption: or None in a set without captions.
    """

    file: str
    key: str
    label: int | None
    caption: str | None


class _MakeSample:
    """Reads, checks and where asked shrinks one image; a plain class so that it can go to a worker process."""

    def __init__(self, src: Path, size: int | None, image_format: str, quality: int, on_error: str) -> None:
        self.src, self.size, self.image_format, self.quality = src, size, image_format, quality
        self.on_error = on_error

    def __call__(self, item: Item) -> Sample | None:
        path = self.src / item.file
        try:
            extension, content = self.encode(path)
        except (ValueError, OSError) as error:
            if self.on_error == "raise":
                raise ValueError(f"{path}: {error}; repair or remove it, or pass on_error=skip") from error
            _LOG.warning("left out %s: %s", path, error)
            return None
        files = {extension: content}
        if item.label is not None:
            files["cls"] = str(item.label).encode()
        if item.caption is not None:
            files["txt"] = item.caption.encode()
        return Sample(item.key, files)

    def encode(self, path: Path) -> tuple[str, bytes]:
        """Extension and bytes to store."""
        content = path.read_bytes()
        image = decode_image(content)
        shorter = min(image.size)
        if self.size is None or shorter <= self.size:
            return path.suffix[1:].lower(), content
        width, height = (round(side * self.size / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        if self.image_format == "jpg":
            image.save(buffer, "JPEG", quality=self.quality, subsampling=0)
        elif self.image_format == "webp":
            image.save(buffer, "WEBP", quality=self.quality)
        else:
            image.save(buffer, "PNG")
        return self.image_format, buffer.getvalue()
