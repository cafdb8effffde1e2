"""Find the shard sets that a user's folders, patterns, URLs and commands name."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

import braceexpand

from flextok_pl.contracts import class_difference, same_maker
from flextok_pl.data.shards.index import ARRAYS, INDEX_NAME, ShardError, ShardIndex
from flextok_pl.data.shards.listing import matching_paths
from flextok_pl.data.shards.remote import PIPE, Remote, is_remote


def load_indices(
    source: str | Path | list[str], cache_dir: str | Path | None = None, labels: bool = True
) -> list[ShardIndex]:
    """Load one or several shard sets that fit together: one index per set, in the order given.

    The source is a folder, an `index.json`, a pattern of these (see `matching_paths`), or a list. A pattern may also
    name tar files, which restricts their sets to them. Instead of a folder you can give a URL, without `*`, or a
    command, see `Remote`; the shards of such sets stay in `cache_dir`. Without `labels` classes are left out, so sets
    with different classes fit together.
    """
    entries = source if isinstance(source, list) else [str(source)]
    indices = [index for entry in entries for index in _of_entry(str(entry), cache_dir)]
    if not labels:
        indices = [index.without_labels() for index in indices]
    for other in indices[1:]:
        require_same_kind(indices[0], other)
    return indices


def _of_entry(entry: str, cache_dir: str | Path | None) -> list[ShardIndex]:
    tars: dict[str, set[str]] = {}
    indices = []
    for match in _places(entry):
        if match.endswith(".tar") and not match.startswith(PIPE) and not Path(match).is_dir():
            folder, _, name = match.rpartition("/")
            tars.setdefault(folder, set()).add(name)
        else:
            indices.append(_load(match, cache_dir))
    return indices + [_load(folder or ".", cache_dir).restricted(names) for folder, names in tars.items()]


def _places(entry: str) -> list[str]:
    if is_remote(entry):
        return [entry] if entry.startswith(PIPE) else list(braceexpand.braceexpand(entry))
    try:
        return [str(path) for path in matching_paths(entry)]
    except ValueError as error:
        raise ShardError(
            f"{entry!r} matches no shard set: {error}. `flextok data` makes one; give the folder that holds its "
            f"{INDEX_NAME} (often DST/train or DST/val)"
        ) from None


def _load(place: str, cache_dir: str | Path | None) -> ShardIndex:
    if not is_remote(place):
        return ShardIndex.load(place)
    cache = None if cache_dir is None else Path(cache_dir).expanduser()
    remote = Remote(place.removesuffix(f"/{INDEX_NAME}"), cache)
    content, where = remote.read(INDEX_NAME), remote.locate(INDEX_NAME)
    # A set that was written again gets another cache folder.
    folder = Path(tempfile.gettempdir()) if cache is None else cache / hashlib.sha256(content).hexdigest()[:16]
    index = ShardIndex.parse(content, folder, where, remote)
    for shard in index.shards:  # their names become part of URLs and commands
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", shard.name):
            raise ShardError(f"{where}: shard name {shard.name!r} must be letters, digits, . _ -; write it again")
    return index


def require_same_kind(first: ShardIndex, other: ShardIndex) -> None:
    """Check that two sets can be read together: same fields, image size, classes, and makers of their fields."""
    for name in ("fields", "image_size"):
        if getattr(first, name) != getattr(other, name):
            raise ShardError(
                f"{first.where} and {other.where} differ in {name} ({getattr(first, name)} and "
                f"{getattr(other, name)}); sets read together must be of one kind"
            )
    require_same_classes(first, other)
    require_same_origin(first, other)


def require_same_classes(first: ShardIndex, other: ShardIndex) -> None:
    """Check that two sets number the same classes alike, if both have classes."""
    both = "label" in first.fields and "label" in other.fields
    difference = class_difference(first.classes, other.classes) if both else None
    if difference is not None:
        raise ShardError(
            f"{first.where} and {other.where} differ in classes: {difference}. Write one again with the classes of the "
            f"other (flextok data folder --classes {first.where}), or set data.labels=false for a model without classes"
        )


def require_same_origin(first: ShardIndex, other: ShardIndex) -> None:
    """Check that one model can train on both sets: their latents are from one autoencoder, and so on."""
    for field, (*_, role) in ARRAYS.items():
        makers = first.maker(field) or {}, other.maker(field) or {}
        # Compares hashes if there are any, and not the places of the weights.
        one, another = (maker.get("sha256", maker or None) for maker in makers)
        hashed = all("sha256" in maker for maker in makers)
        same = same_maker(*makers) if hashed else one == another
        if field in first.fields and field in other.fields and not same:
            raise ShardError(
                f"{first.where} and {other.where} hold {field} of different {role.replace('_', ' ')}s ({one} and "
                f"{another}), and one model cannot read both; write one of them again (flextok data latents or tokens)"
            )
