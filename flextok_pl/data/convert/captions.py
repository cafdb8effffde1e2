"""Read captions of pictures from a table or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("file", "caption")
Row = tuple[int, dict[str, Any]]
"""A line's number and its fields by name."""


def read_captions(path: Path, src: Path) -> dict[str, str]:
    """Read the caption of each file, relative to `src`, from `.csv`, `.tsv` or `.jsonl` in UTF-8.

    A `.csv` follows RFC 4180: a field with a comma, quote or line break is in quotes, and quotes in it are doubled. In
    a `.tsv` each line is an entry; a field in quotes is read in the same way, and other quotes are plain characters.
    An error names the line.
    """
    readers = {".csv": _csv_rows, ".tsv": _tsv_rows, ".jsonl": _json_rows}
    if path.suffix not in readers or not path.is_file():
        raise ValueError(f"captions={path} must be an existing .csv, .tsv or .jsonl file")
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    folders = (Path(os.path.abspath(src)), src.resolve())  # which differ if links lead to it
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"captions={path} cannot be read: {error}; save it as UTF-8") from error
    try:
        for number, (line, row) in enumerate(readers[path.suffix](text), start=1):
            if not all(isinstance(row.get(name), str) for name in COLUMNS):
                raise ValueError(f"line {line} needs the texts file and caption, but is {row!r}")
            name = _relative(row["file"], folders)
            if name in captions:
                raise ValueError(
                    f"entry {number} is the second for {name}; keep one caption per image (lines {lines[name]} and "
                    f"{line})"
                )
            captions[name], lines[name] = row["caption"], line
    except ValueError as error:
        raise ValueError(f"captions={path}: {error}") from error
    return captions


def _relative(file: str, folders: Sequence[Path]) -> str:
    path = Path(os.path.normpath(file))
    return next((path.relative_to(folder) for folder in folders if path.is_relative_to(folder)), path).as_posix()


def _csv_rows(text: str) -> Iterator[Row]:
    return _table(_csv_fields(text), "put a caption with commas in quotes")


def _csv_fields(text: str) -> Iterator[tuple[int, list[str]]]:
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"line {line} cannot be read: {error}; put a field that contains a quote in quotes, and double the quote"
        ) from error


def _tsv_rows(text: str) -> Iterator[Row]:
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    return _table(((number, _tsv_fields(line.rstrip("\n"))) for number, line in lines), "write a tab in it as a space")


def _tsv_fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="\t", strict=True)) if '"' in line else line.split("\t")
    except csv.Error:
        return line.split("\t")  # its quotes are plain characters


def _table(rows: Iterator[tuple[int, list[str]]], remedy: str) -> Iterator[Row]:
    """Line number and named fields of each row after the header; skips empty lines."""
    filled = ((line, fields) for line, fields in rows if fields not in ([], [""]))
    line, header = next(filled, (1, []))
    if twice := _twice(header):
        raise ValueError(f"line {line}, the header, has the column {twice!r} twice; rename or remove one")
    if not set(COLUMNS) <= set(header):
        raise ValueError(f"line {line}, the header, needs the columns file and caption, but has {header}")
    for line, fields in filled:
        if fields == header:
            raise ValueError(f"line {line} repeats the header; remove it")
        if len(fields) != len(header):
            raise ValueError(
                f"line {line} has {len(fields)} fields, but the header {len(header)}: {fields}; make them equal, and "
                f"{remedy}"
            )
        yield line, dict(zip(header, fields, strict=True))


def _json_rows(text: str) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except ValueError as error:
                raise ValueError(f"line {number} cannot be read: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} must be an object with the keys file and caption, but is {row!r}")
            yield number, row


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _twice([name for name, _ in pairs]):
        raise ValueError(f"the key {twice!r} occurs twice")
    return dict(pairs)


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name, number in Counter(names).items() if number > 1), None)
