"""Write data sets of the Hugging Face Hub, or any parquet files with pictures, as shards.

Files are read in batches of rows within a row group, through a small buffer. So memory is a page or two of the file,
even if row groups are large (Arrow puts up to 1,024 pictures into a page). pyarrow is an optional dependency.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from flextok_pl.data.convert.classes import Labels, classes_of, read_class_names
from flextok_pl.data.convert.conversion import Conversion, condition_files
from flextok_pl.data.convert.hub import find_parts
from flextok_pl.data.image_files import extension_of
from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, ShardIndex
from flextok_pl.data.shards.listing import listing_digest
from flextok_pl.data.shards.writer import Sample
from flextok_pl.data.transforms import inspect_image
from flextok_pl.keys import text_hash

_LOG = logging.getLogger(__name__)

ROWS_AT_ONCE = 32


def write_parquet(
    src: str,
    dst: Path | str,
    *,
    files: str = "*.parquet",
    revision: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str = "auto",
    caption_column: str | None = None,
    classes: list[str] | Path | str | None = None,
    **options: Any,
) -> dict[str, ShardIndex]:
    """Write parquet files with pictures as shards: `DST`, or `DST/train`, `DST/val` and `DST/test`.

    The files' paths name the parts, as in `data/train-00000-of-00010.parquet` (also validation, valid, dev). Without
    such a word all rows go to DST. Pictures are stored in an order that mixes the row groups, but not the rows of one.
    If rows are sorted by class, mix the result with `flextok data reshard`.

    Args:
        src: id of a data set on the Hub, owner/name; or a folder, a file, or a pattern with `*` or `{a,b}`.
        dst: folder for the shards.
        files: pattern of the paths to take, from a folder or the Hub; `*` matches folders too.
        revision: branch, tag or commit on the Hub; refs/convert/parquet has other formats as parquet.
        split: take only this part: train, val or test.
        image_column: column of the encoded pictures; default the one described as such, or named image.
        label_column: column of class indices or names. `auto` takes the one described as such, `none` takes none.
        caption_column: column of texts; default none.
        classes: names of the classes by number, so that separately converted sets number them alike: a text file with
            one per line, a shard set that has them, or a list. Default those noted in the files, or the labels found.
        **options: those of `Conversion`.

    Returns:
        The index of each part; `all` if the files have no parts.

    Raises:
        ValueError: an option, a file or a row is invalid, and the message names it; or pyarrow is missing.
    """
    conversion = Conversion(**options)
    paths = find_parts(src, files, revision, split)
    features = _features(next(iter(paths.values()))[0])
    columns = _columns(features, image_column, label_column, caption_column)
    groups = {part: _groups(chosen, features) for part, chosen in paths.items()}
    if classes is not None and columns.label is None:
        raise ValueError(f"classes={classes} needs labels: give label_column")
    given = None if classes is None else read_class_names("classes", classes)
    found = _classes(columns.label, features, [group for chosen in groups.values() for group in chosen])
    labels = _labels(columns.label, features, found, given)
    names = given or found
    folder, result = Path(dst).expanduser(), {}
    for part, chosen in groups.items():
        arguments = {
            "writer": "parquet",
            "part": part,
            "source": [str(path) for path in paths[part]],
            "files": listing_digest(Path("/"), map(str, paths[part])),
            "columns": vars(columns),
            **({} if given is None else {"classes": list(given)}),
        }
        reader = _RowReader(chosen, columns, labels, "" if part == "all" else f"{part}-", conversion)
        if not reader.stops or not reader.stops[-1]:
            _LOG.warning("%s: the files of split=%s have no rows; it is left out", src, part)
            continue
        result[part] = conversion.write(
            folder if part == "all" else folder / part,
            range(reader.stops[-1]),
            reader,
            f"{part} shards",
            fields=("image", *(["label"] if names else []), *(["text"] if columns.caption else [])),
            classes=names,
            arguments=arguments,
            provenance={"source": src, "revision": revision},
        )
    if not result:
        raise ValueError(f"src={src} has no rows; give files with pictures")
    return result


@dataclass(frozen=True)
class _Columns:
    """Names of the columns to read."""

    image: str
    label: str | None
    caption: str | None


class _Group(NamedTuple):
    """A row group of a file."""

    path: str
    number: int  # number in the file
    rows: int
    first: int  # number of its first row within the part


def _open(path: Path | str) -> Any:
    """Open a parquet file through a small buffer, for this process only."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet files need the package pyarrow: pip install 'flextok_pl[hub]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _features(path: Path) -> dict[str, Any]:
    """Columns of a file: the note of the library `datasets` on each, and its arrow type as text."""
    with _open(path) as file:
        schema = file.schema_arrow
        notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    described = notes.get("info", {}).get("features", {})
    features = {}
    for name in schema.names:
        noted = described.get(name)
        known = noted if isinstance(noted, dict) else {}  # nested features are lists
        features[name] = {
            "kind": known.get("_type"),
            "names": known.get("names"),
            "arrow": str(schema.field(name).type),
        }
    return features


def _columns(features: Mapping[str, Any], image: str | None, label: str, caption: str | None) -> _Columns:
    held = ", ".join(features)
    for option, name in (("image_column", image), ("label_column", label), ("caption_column", caption)):
        if name is not None and name not in features and (option != "label_column" or name not in ("auto", "none")):
            raise ValueError(f"{option}={name} is not among the columns {held}")
    by_kind = {kind: [name for name in features if features[name]["kind"] == kind] for kind in ("Image", "ClassLabel")}
    images = [image] if image else by_kind["Image"] or [name for name in ("image",) if name in features]
    labels = by_kind["ClassLabel"] if label == "auto" else [] if label == "none" else [label]
    if len(images) != 1:
        raise ValueError(f"image_column must be given: {len(images)} of the columns {held} are described as pictures")
    if len(labels) > 1:
        raise ValueError(f"label_column must be given: it may be any of {', '.join(labels)}, or none")
    columns = _Columns(images[0], labels[0] if labels else None, caption)
    _check_type("image_column", columns.image, features, r"(large_)?binary|struct<.*bytes: (large_)?binary.*>")
    _check_type("label_column", columns.label, features, r"u?int\d+|(large_)?string")
    _check_type("caption_column", columns.caption, features, r"(large_)?string")
    return columns


def _check_type(option: str, name: str | None, features: Mapping[str, Any], pattern: str) -> None:
    if name is not None and not re.fullmatch(pattern, features[name]["arrow"]):
        raise ValueError(f"{option}={name} holds {features[name]['arrow']}, which does not fit")


def _groups(paths: Sequence[Path], features: Mapping[str, Any]) -> list[_Group]:
    """The row groups of the files, in an order that mixes them."""
    groups, first = [], 0
    for path in paths:
        if _features(path) != features:
            raise ValueError(f"{path} differs from the first file in its columns or classes; choose files")
        with _open(path) as file:
            rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        for number, count in enumerate(rows):
            groups.append(_Group(str(path), number, count, first))
            first += count
    return sorted(groups, key=lambda group: text_hash(str(group.first)))


def _classes(label: str | None, features: Mapping[str, Any], groups: Iterable[_Group]) -> tuple[str, ...]:
    if label is None:
        return ()
    if features[label]["names"]:
        return tuple(features[label]["names"])
    found: set[int | str] = set()
    for group in groups:
        with _open(group.path) as file:
            column = file.read_row_group(group.number, columns=[label], use_threads=False).column(0)
        found.update(value for value in column.unique().to_pylist() if value is not None)
    return classes_of(found, f"label_column={label}")


def _labels(
    label: str | None, features: Mapping[str, Any], found: Sequence[str], given: Sequence[str] | None
) -> Labels:
    """Class indices of the files' labels, numbered as in `given` if that is given."""
    labels = Labels(found if given is None else given)
    if given is None or label is None:
        return labels
    noted = features[label]["names"]
    if not noted and "int" in features[label]["arrow"]:
        if len(found) > len(given):
            raise ValueError(f"classes: {len(given)} names, but label_column={label} has labels up to {len(found) - 1}")
        return labels
    unknown = [name for name in found if name not in given]
    if unknown:
        raise ValueError(
            f"classes: label_column={label} has {len(unknown)} labels that are not among the {len(given)} classes, "
            f"such as {unknown[0]!r}; add them to the list"
        )
    return Labels(given, noted)


class _RowReader:
    """Makes samples of the rows of ordered groups; a plain class, so that workers can receive it."""

    def __init__(
        self, groups: Sequence[_Group], columns: _Columns, labels: Labels, prefix: str, conversion: Conversion
    ) -> None:
        self.groups, self.columns, self.prefix, self.conversion = groups, columns, prefix, conversion
        self.stops = list(accumulate(group.rows for group in groups))
        self.labels = labels

    def __call__(self, rows: Sequence[int]) -> Iterator[Sample]:
        """Read the samples of consecutive rows, in the order of the groups."""
        return self.conversion.samples(self._rows(rows[0], rows[-1] + 1))

    def _rows(self, start: int, stop: int) -> Iterator[tuple[str, Callable[[], Sample]]]:
        number = bisect_right(self.stops, start)
        while start < stop:
            group, end = self.groups[number], self.stops[number]
            begin = end - group.rows
            for row, values in self._read(group, start - begin, min(stop, end) - begin):
                yield f"{group.path}, row {row}", partial(self._sample, row, values)
            start, number = end, number + 1

    def _read(self, group: _Group, start: int, stop: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Read rows of a group, with their numbers within the part."""
        names = [name for name in vars(self.columns).values() if name is not None]
        done = 0
        try:
            with _open(group.path) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE, [group.number], names, use_threads=False):
                    first, last = max(start - done, 0), min(stop - done, len(batch))
                    if first < last:
                        yield from enumerate(batch.slice(first, last - first).to_pylist(), group.first + done + first)
                    done += len(batch)
                    if done >= stop:
                        return
        except (ValueError, OSError) as error:
            raise ValueError(f"row group {group.number} of {group.path} cannot be read: {error}") from error

    def _sample(self, row: int, values: Mapping[str, Any]) -> Sample:
        value = values[self.columns.image]
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise ValueError("it holds no picture (perhaps a path to one)")
        extension, stored = self.conversion.stored(content, _extension(content))
        label = caption = None
        if self.columns.label is not None and self.labels.count:
            label = self.labels.index(values[self.columns.label])
        if self.columns.caption is not None:
            caption = values[self.columns.caption] or ""
        return Sample(f"{self.prefix}{row:09d}", {extension: stored, **condition_files(label, caption)})


def _extension(content: bytes) -> str:
    """The file extension of a picture's format."""
    name, _ = inspect_image(content)
    extension = extension_of(name)
    if extension is None:
        raise ValueError(f"its format {name} is not among {', '.join(IMAGE_EXTENSIONS)}")
    return extension
