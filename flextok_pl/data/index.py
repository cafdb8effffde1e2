"""The index of a shard set: what `index.json` holds, read and checked.

A shard set is a folder with WebDataset tar files and one `index.json`, which is written last: a folder without it is no
shard set. Every sample is `<key>.<extension>` files, side by side in one tar:

| field         | extension             | content                                                       |
|---------------|-----------------------|---------------------------------------------------------------|
| `image`       | `png`, `jpg`, `webp`… | an encoded picture                                            |
| `latent`      | `latent.npy`          | (2C, h, w) float16/float32, posterior mean and log-variance   |
| `tokens`      | `tokens.npy`          | (K,) integers                                                 |
| `label`       | `cls`                 | class index as decimal text, -1 for a picture without a class |
| `text`        | `txt`                 | caption, UTF-8                                                |
| `text_states` | `states.npy`          | (L, E) floats, the caption under a text encoder, not padded   |
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand

INDEX_NAME = "index.json"
FORMAT = "flextok_pl.shards"
FORMAT_VERSION = 1
FIELDS = ("image", "latent", "tokens", "label", "text", "text_states")
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")


class ShardError(ValueError):
    """A shard set that is missing, incomplete, damaged or of the wrong kind."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a shard set.

    Args:
        name: file name inside the set's folder.
        count: number of samples.
        bytes: file size.
        sha256: digest of the file, hexadecimal.
    """

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """What is in one shard set.

    Args:
        folder: where the tar files lie.
        fields: which of `image`, `latent`, `tokens`, `label`, `text`, `text_states` each sample has.
        shards: the tar files, in order.
        classes: class names by label, empty for a set without classes.
        image_size: side in pixels of the (square) pictures that the samples hold or were made from; None for pictures
            of any size.
        arguments: what the writer was called with; equal arguments make an equal set.
        provenance: where the content comes from: source, licence, versions, the autoencoder of latents, the tokenizer
            of tokens, the text encoder of text states.
    """

    folder: Path
    fields: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...] = ()
    image_size: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples in all shards together."""
        return sum(shard.count for shard in self.shards)

    @property
    def paths(self) -> list[Path]:
        """The tar files."""
        return [self.folder / shard.name for shard in self.shards]

    @property
    def tokenizer(self) -> Mapping[str, Any] | None:
        """What made the tokens: at least `sha256`, `vocab_size` and `num_tokens` (K); None where that is unknown."""
        return self.provenance.get("tokenizer")

    @property
    def tokenizer_hash(self) -> str | None:
        """Tells whose tokens these are."""
        return (self.tokenizer or {}).get("sha256")

    @property
    def text_encoder(self) -> Mapping[str, Any] | None:
        """What made the text states: at least `name`; None where that is unknown."""
        return self.provenance.get("text_encoder")

    def to_json(self) -> str:
        """The text of `index.json`."""
        record = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "num_samples": self.num_samples,
            "fields": list(self.fields),
            "image_size": self.image_size,
            "classes": list(self.classes),
            "arguments": dict(self.arguments),
            "provenance": dict(self.provenance),
            "shards": [vars(shard) for shard in self.shards],
        }
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> ShardIndex:
        """Read an index and check that its shards are there with the right size.

        Args:
            path: a shard set's folder, or its `index.json`.

        Raises:
            ShardError: there is no index, it is damaged or of another version, or a shard is missing, empty or of
                the wrong size.
        """
        path = Path(path)
        file = path if path.name == INDEX_NAME else path / INDEX_NAME
        if not file.is_file():
            reason = "is no folder" if not file.parent.is_dir() else f"has no {INDEX_NAME}"
            raise ShardError(
                f"{file.parent} {reason}: a shard set is made by `flextok data`, which writes {INDEX_NAME} last; give "
                "the folder of a finished one (often DST/train or DST/val)"
            )
        index = cls.parse(file.read_bytes(), file.parent, str(file))
        index._check_files()
        return index

    @classmethod
    def parse(cls, content: bytes, folder: Path, where: str) -> ShardIndex:
        """Read the content of an index; the shards are not looked at.

        Args:
            content: of `index.json`.
            folder: of the shards.
            where: what the index is called in messages.

        Raises:
            ShardError: it is damaged or of another version.
        """
        try:
            return cls._from_record(folder, json.loads(content.decode("utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{where} is damaged ({error!r}); write the set again with overwrite") from error

    @classmethod
    def _from_record(cls, folder: Path, record: Mapping[str, Any]) -> ShardIndex:
        if record["format"] != FORMAT or record["version"] != FORMAT_VERSION:
            raise ShardError(
                f"{folder / INDEX_NAME} has format {record['format']!r} version {record['version']}, "
                f"this release reads {FORMAT!r} version {FORMAT_VERSION}; write the set again"
            )
        unknown = sorted(set(record["fields"]) - set(FIELDS))
        if unknown or not record["fields"]:
            raise ShardError(f"{folder / INDEX_NAME}: fields {record['fields']} must be some of {FIELDS}")
        shards = tuple(
            ShardInfo(str(s["name"]), int(s["count"]), int(s["bytes"]), str(s["sha256"])) for s in record["shards"]
        )
        for shard in shards:
            if Path(shard.name).name != shard.name:
                raise ShardError(f"{folder / INDEX_NAME}: shard name {shard.name!r} leaves the set's folder")
        return cls(
            folder=folder,
            fields=tuple(record["fields"]),
            shards=shards,
            classes=tuple(record["classes"]),
            image_size=record["image_size"],
            arguments=dict(record["arguments"]),
            provenance=dict(record["provenance"]),
        )

    def _check_files(self) -> None:
        if self.num_samples == 0:
            raise ShardError(f"{self.folder} holds no samples; write the set again from a source with pictures")
        for shard, path in zip(self.shards, self.paths, strict=True):
            if not path.is_file():
                raise ShardError(f"shard {path} is missing; restore it, or write the set again with overwrite")
            size = path.stat().st_size
            if size != shard.bytes:
                raise ShardError(
                    f"shard {path} has {size:,} bytes instead of the {shard.bytes:,} in {INDEX_NAME}: it is truncated "
                    "or was changed; copy it again, or write the set again with overwrite"
                )

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            ShardError: a shard differs from what was written.
        """
        for shard, path in zip(self.shards, self.paths, strict=True):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise ShardError(
                    f"shard {path} does not match its checksum in {INDEX_NAME}; copy it again, or write the set again "
                    "with overwrite"
                )


def load_indices(source: str | Path | list[str]) -> list[ShardIndex]:
    """Load one or several shard sets.

    Args:
        source: a folder, an `index.json`, a pattern of such with `*` or `{a,b}`, or a list of these. A pattern may also
            name tar files; then the sets that they lie in are restricted to them.

    Returns:
        One index per set, in the order given.

    Raises:
        ShardError: nothing matches, a set is unusable, or the sets do not fit together.
    """
    indices: list[ShardIndex] = []
    for entry in source if isinstance(source, list) else [str(source)]:
        matches: list[str] = []
        for pattern in braceexpand.braceexpand(str(entry)):
            matches += sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise ShardError(f"{entry!r} matches no shard set; give the folder that holds {INDEX_NAME}")
        tars = [Path(match) for match in matches if match.endswith(".tar")]
        indices += [ShardIndex.load(match) for match in matches if not match.endswith(".tar")]
        for folder in dict.fromkeys(path.parent for path in tars):
            indices.append(_restricted(ShardIndex.load(folder), {p.name for p in tars if p.parent == folder}))
    first = indices[0]
    for other in indices[1:]:
        for name in ("fields", "classes", "image_size"):
            if getattr(first, name) != getattr(other, name):
                raise ShardError(
                    f"{first.folder} and {other.folder} differ in {name} ({getattr(first, name)} and "
                    f"{getattr(other, name)}); sets read together must be of one kind"
                )
        require_same_origin(first, other)
    return indices


def require_same_origin(first: ShardIndex, other: ShardIndex) -> None:
    """Check that one model can be trained on both sets.

    Raises:
        ShardError: they hold tokens of different tokenizers, or text states of different encoders.
    """
    origins = (
        ("tokens", "tokenizer", first.tokenizer_hash, other.tokenizer_hash),
        ("text_states", "text encoder", first.text_encoder, other.text_encoder),
    )
    for name, maker, one, another in origins:
        if name in first.fields and name in other.fields and one != another:
            raise ShardError(
                f"{first.folder} and {other.folder} hold {name} of different {maker}s ({one} and {another}), and one "
                f"model cannot read both; write one of them again by `flextok data tokens` with the other's {maker}"
            )


def _restricted(index: ShardIndex, names: set[str]) -> ShardIndex:
    unknown = sorted(names - {shard.name for shard in index.shards})
    if unknown:
        raise ShardError(f"shard {index.folder / unknown[0]} is not in {index.folder / INDEX_NAME}")
    chosen = tuple(shard for shard in index.shards if shard.name in names)
    return ShardIndex(**{**vars(index), "shards": chosen})
