"""Read and check the index of a shard set, `index.json`.

A shard set is a folder with WebDataset tar files and one `index.json`. The index is written last: a folder without it
is not a shard set. Every sample is a set of `<key>.<extension>` files, side by side in one tar:

| field              | extension             | content                                                       |
|--------------------|-----------------------|---------------------------------------------------------------|
| `image`            | `png`, `jpg`, `webp`… | an encoded picture                                            |
| `latent`           | `latent.npy`          | (2C, h, w) float16/float32, posterior mean and log-variance   |
| `teacher_features` | `features.npy`        | (F, h', w') float16/float32, a teacher's features of patches  |
| `tokens`           | `tokens.npy`          | (K,) integers                                                 |
| `label`            | `cls`                 | class index as decimal text, -1 for a picture without a class |
| `text`             | `txt`                 | caption, UTF-8                                                |
| `text_states`      | `states.npy`          | (L, E) floats, the caption under a text encoder, not padded   |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

INDEX_NAME = "index.json"
FORMAT = "flextok_pl.shards"
FORMAT_VERSION = 1
ARRAYS = {
    "latent": ("latent.npy", "f", 3, "autoencoder"),
    "teacher_features": ("features.npy", "f", 3, "teacher"),
    "tokens": ("tokens.npy", "iu", 1, "tokenizer"),
    "text_states": ("states.npy", "f", 2, "text_encoder"),
}
"""Of each field that a model makes: file, kinds of numbers, number of axes, and the model's name in the provenance."""
FIELDS = ("image", "label", "text", *ARRAYS)
IMAGE_EXTENSIONS = (
    *("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "avif", "jpe", "jfif", "jp2", "tga"),
    *("heic", "heif", "hif", "apng", "avifs", "blp", "bw", "cur", "dcx", "dds", "dib", "flc", "fli", "ftc", "ftu"),
    *("gbr", "icb", "icns", "ico", "im", "j2c", "j2k", "jpc", "jpf", "jpx", "mpo", "msp", "pbm", "pcd", "pcx", "pnm"),
    *("heics", "heifs", "psd", "pxr", "qoi", "ras", "rgb", "rgba", "sgi", "vda", "vst", "xbm", "xpm"),
)
"""Endings of pictures of pixels; the build of Pillow decides which can be read."""


def is_utf8(name: str) -> bool:
    """Check that a name is valid UTF-8: Python turns other bytes of file names into surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def file_sha256(path: Path) -> str:
    """Hash a file, as in `ShardInfo`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardError(ValueError):
    """A shard set that is missing, incomplete, damaged or of the wrong kind."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a shard set: its name in the set's folder, number of samples, size, and hexadecimal digest.

    `sizes` are those of the pictures that the samples hold or were made from, see `sizes`; empty if they are unknown,
    or all `image_size`.
    """

    name: str
    count: int
    bytes: int
    sha256: str
    sizes: str = ""


class Opener(Protocol):
    """Access to the files of a set that is not in a local folder, such as `remote.Remote`."""

    @property
    def address(self) -> str:
        """Name of the set in messages."""

    def locate(self, name: str) -> str:
        """Name of a file in messages."""

    def open(self, shard: ShardInfo, folder: Path) -> BufferedReader:
        """Open a shard as a local file."""


@dataclass(frozen=True)
class ShardIndex:
    """The contents of one shard set.

    Args:
        folder: folder of the tar files, or the one to which they are brought.
        fields: the ones of `FIELDS` that each sample has.
        shards: the tar files, in order.
        classes: class names by label, empty for a set without classes.
        image_size: side in pixels of the pictures that the samples hold or were made from, or (H, W); None for pictures
            of several sizes.
        arguments: arguments of the writer; equal arguments make an equal set.
        provenance: origin of the content: source, licence, versions, the autoencoder of latents, the teacher of its
            features, the tokenizer of tokens, the text encoder of text states.
        remote: access to the tar files; None if they are in the folder.
    """

    folder: Path
    fields: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...] = ()
    image_size: int | tuple[int, int] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    remote: Opener | None = None

    @property
    def where(self) -> str:
        """Name of the set in messages: its folder, URL or command."""
        return str(self.folder) if self.remote is None else self.remote.address

    @property
    def num_samples(self) -> int:
        """Samples in all shards together."""
        return sum(shard.count for shard in self.shards)

    @property
    def paths(self) -> list[Path]:
        """The tar files, which must be on this machine."""
        if self.remote is not None:
            raise ShardError(f"{self.where} is not a folder on this machine; copy the set and give the copy's folder")
        return [self.folder / shard.name for shard in self.shards]

    def maker(self, field: str) -> Mapping[str, Any] | None:
        """Identity of the model that made a field; None if the set lacks the field or its maker is unknown.

        Autoencoder, teacher and tokenizer have at least `sha256`, a tokenizer also `vocab_size` and `num_tokens` (K), a
        teacher and a text encoder `name`.
        """
        return self.provenance.get(ARRAYS[field][-1]) if field in self.fields else None

    def to_json(self) -> str:
        """The text of `index.json`; paths that are not UTF-8 are escaped in it, and `load` restores them."""
        record = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "num_samples": self.num_samples,
            "fields": list(self.fields),
            "image_size": self.image_size,
            "classes": list(self.classes),
            "arguments": dict(self.arguments),
            "provenance": dict(self.provenance),
            "shards": [{name: value for name, value in vars(shard).items() if value != ""} for shard in self.shards],
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        return text.encode("utf-8", "backslashreplace").decode("utf-8")

    def digest(self) -> str:
        """Hash of the set: the SHA-256 of its index without sizes, which sets of older releases lack."""
        plain = replace(self, shards=tuple(replace(shard, sizes="") for shard in self.shards))
        return hashlib.sha256(plain.to_json().encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> ShardIndex:
        """Read the index of a shard set, given as its folder or its `index.json`.

        Raises:
            ShardError: the index is missing or invalid, or a shard is missing or of the wrong size.
        """
        path = Path(path).expanduser()
        file = path if path.name == INDEX_NAME else path / INDEX_NAME
        if not file.is_file():
            reason = "is not a folder" if not file.parent.is_dir() else f"has no {INDEX_NAME}"
            raise ShardError(
                f"{file.parent} {reason}: `flextok data` makes shard sets and writes {INDEX_NAME} last; give the "
                "folder of a finished one (often DST/train or DST/val)"
            )
        index = cls.parse(file.read_bytes(), file.parent, str(file))
        for shard, place in zip(index.shards, index.paths, strict=True):
            if not place.is_file():
                raise ShardError(f"shard {place} is missing; restore it, or write the set again with overwrite")
            size = place.stat().st_size
            if size != shard.bytes:
                raise ShardError(
                    f"shard {place} has {size:,} bytes instead of the {shard.bytes:,} in {INDEX_NAME}: it is truncated "
                    "or was changed; copy it again, or write the set again with overwrite"
                )
        return index

    @classmethod
    def parse(cls, content: bytes, folder: Path, where: str, remote: Opener | None = None) -> ShardIndex:
        """Read the content of an index, which messages call `where`; see `load`."""
        try:
            record = json.loads(content.decode("utf-8"))
            if (record["format"], record["version"]) != (FORMAT, FORMAT_VERSION):
                raise ShardError(
                    f"{where} has format {record['format']!r} version {record['version']}, but this release reads "
                    f"{FORMAT!r} version {FORMAT_VERSION}; write the set again"
                )
            shards = [
                ShardInfo(str(s["name"]), int(s["count"]), int(s["bytes"]), str(s["sha256"]), str(s.get("sizes", "")))
                for s in record["shards"]
            ]
            size = record["image_size"]
            index = cls(
                folder=folder,
                fields=tuple(record["fields"]),
                shards=tuple(shards),
                classes=tuple(record["classes"]),
                image_size=(int(size[0]), int(size[1])) if isinstance(size, list) else size,
                arguments=dict(record["arguments"]),
                provenance=dict(record["provenance"]),
                remote=remote,
            )
        except ShardError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{where} is damaged ({error!r}); write the set again with overwrite") from error
        if not index.fields or not set(index.fields) <= set(FIELDS):
            raise ShardError(f"{where}: fields {list(index.fields)} must be some of {FIELDS}")
        for shard in shards:
            if Path(shard.name).name != shard.name:
                raise ShardError(f"{where}: shard name {shard.name!r} leaves the set's folder")
        if index.num_samples == 0:
            raise ShardError(f"{where} holds no samples; write the set again from a source with pictures")
        return index

    def locate(self, number: int) -> str:
        """Name of a shard in messages."""
        name = self.shards[number].name
        return str(self.folder / name) if self.remote is None else self.remote.locate(name)

    def open(self, number: int) -> BufferedReader:
        """Open a shard; a remote one is first compared with its size and checksum."""
        shard = self.shards[number]
        return (self.folder / shard.name).open("rb") if self.remote is None else self.remote.open(shard, self.folder)

    def restricted(self, names: Set[str]) -> ShardIndex:
        """The index of some shards, by name."""
        unknown = sorted(names - {shard.name for shard in self.shards})
        if unknown:
            raise ShardError(f"{self.where} has no shard {unknown[0]} in its {INDEX_NAME}")
        return replace(self, shards=tuple(shard for shard in self.shards if shard.name in names))

    def without_labels(self) -> ShardIndex:
        """The index of the same shards without classes."""
        return replace(self, fields=tuple(name for name in self.fields if name != "label"), classes=())

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            ShardError: a shard differs from what was written.
        """
        for number, shard in enumerate(self.shards):
            with self.open(number) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise ShardError(
                    f"shard {self.locate(number)} does not match its checksum in {INDEX_NAME}; copy it again, or write "
                    "the set again with overwrite"
                )
