"""Read the prompts of a search from options, text files, GenEval files, COCO captions or a shard set.

A prompt's key names its condition and its number among prompts of that condition. Its draws depend only on the key, so
other prompts and their order do not matter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flextok_pl.data import ShardDataModule
from flextok_pl.data.conditions import class_index
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.evaluation.generation import Prompt

SHOWN = 8
"""Default number of classes to search for; if there are at most twice as many, all of them."""

Row = tuple[int | str | None, str | None, Mapping[str, Any]]
"""Class by number or name, text, and all facts of its source; None for a missing one."""


class Conditions(NamedTuple):
    """Conditions that a prior accepts; a verifier also judges prompts by classes and texts."""

    kind: Literal["class", "text", "none"]
    num_classes: int = 0
    class_names: Sequence[str] = ()


def prompts_from_options(
    known: Conditions,
    classes: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    file: Path | None = None,
    limit: int | None = None,
    samples: int = 1,
) -> list[Prompt]:
    """Make the prompts that options name, each as often as there are samples; `limit` counts prompts of the file.

    Raises:
        ValueError: the options do not fit together or the prior, or the file cannot be read.
    """
    for name, value in (("samples", samples), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    options = {"--class": classes, "--text": texts, "--prompts": file}
    given = [option for option, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} both name prompts: give one of them")
    if limit is not None and file is None:
        raise ValueError(f"limit={limit} counts the prompts of a file: give --prompts, or leave it out")
    if file is not None:
        rows = read_prompts(file, known.kind == "class")[:limit]
    elif classes is not None and known.kind != "text":
        rows = [(each, None, {}) for each in classes]
    elif texts is not None and known.kind != "class":
        rows = [(None, each, {}) for each in texts]
    elif given:
        raise ValueError(f"{given[0]}: this prior is conditioned on {known.kind}; leave {given[0]} out")
    elif known.kind == "text":
        raise ValueError('this prior is conditioned on text: give a prompt, --text "red apple" or --prompts FILE')
    else:
        count = known.num_classes if known.num_classes <= 2 * SHOWN else SHOWN
        rows = [(number, None, {}) for number in range(count)] or [(None, "", {})]
    try:
        prompts = [_prompt(known, row) for row in rows]
    except ValueError as error:
        raise ValueError(f"prompts={file}: {error}" if file is not None else str(error)) from error
    return _with_keys([prompt for prompt in prompts for _ in range(samples)], by_text=known.kind != "class")


def read_prompts(file: Path, of_classes: bool = False) -> list[Row]:
    """Read the rows of a file, in UTF-8.

    `.txt` has a text on each line, or with `of_classes` a class. `.jsonl` has an object on each line, as GenEval's
    prompts (https://github.com/djghosh13/geneval), with `prompt` or `label` or both. `.json` holds captions of COCO
    (https://cocodataset.org); the first caption of each picture is taken, in the order of the pictures' ids. A folder
    is a shard set with captions or classes; with `of_classes` its own numbers are used.

    Raises:
        ValueError: the file is none of these; for JSON lines, the message names the line.
    """
    if file.is_dir():
        return _of_shards(file, by_name=of_classes)
    if file.suffix not in (".txt", ".jsonl", ".json"):
        raise ValueError(
            f"prompts={file} must be a file of lines (.txt), of JSON lines (.jsonl) or of COCO (.json), or a shard set"
        )
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if file.suffix == ".txt":
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            rows: list[Row] = [(line, None, {}) if of_classes else (None, line, {}) for line in lines]
        else:
            rows = _objects(text) if file.suffix == ".jsonl" else _captions(text)
        "".join(prompt or "" for _, prompt, _ in rows).encode()  # JSON can hold half of a surrogate pair
    except (ValueError, OSError) as error:  # invalid UTF-8 and invalid JSON are ValueErrors
        raise ValueError(f"prompts={file} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"prompts={file} holds no prompts")
    return rows


def _of_shards(folder: Path, by_name: bool) -> list[Row]:
    index = load_indices(str(folder))[0]
    # The pictures are not read.
    data = ShardDataModule(test=str(folder), image_size=index.image_size or 1, num_workers=0)
    rows: list[Row] = []
    for batch in data.test_dataloader():
        labels = batch["label"].tolist() if "label" in batch else [-1] * len(batch["key"])
        texts = batch.get("text", [None] * len(batch["key"]))
        for label, text, key in zip(labels, texts, batch["key"], strict=True):
            rows.append(((index.classes[label] if by_name else label) if label >= 0 else None, text, {"key": key}))
    return rows


def _objects(text: str) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(row, dict) or not (isinstance(prompt, str) or (prompt is None and "label" in row)):
            raise ValueError(f"line {number} must be an object with a text as prompt, or a label, not {line.strip()}")
        rows.append((row.get("label"), prompt, row))
    return rows


def _captions(text: str) -> list[Row]:
    content = json.loads(text)
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("image_id"), int) and isinstance(e.get("caption"), str)
        for e in entries
    ):
        raise ValueError("it needs `annotations` with image_id, a number, and caption, a text, as in COCO")
    first: dict[int, str] = {}
    for entry in entries:
        first.setdefault(entry["image_id"], entry["caption"])
    return [(None, first[image].strip(), {"image_id": image}) for image in sorted(first)]


def _prompt(known: Conditions, row: Row) -> Prompt:
    """Make the prompt of a row, without its key."""
    label, text, metadata = row
    if known.kind == "text" and text is None:
        raise ValueError(f"this prior is conditioned on text, but {label!r} has no prompt")
    if known.kind == "class" and label is None:
        raise ValueError(f"this prior is conditioned on class, but {text!r} has no label")
    number = -1
    if known.num_classes and label is not None:
        number = class_index(label, known.class_names, known.num_classes)
    elif label is not None:  # a verifier may use it
        number = int(label) if str(label).isdecimal() else -1
        if number < 0:
            raise ValueError(f"label {label!r} must be the number of a class: this prior's classes have no names")
    if text is None:
        text = known.class_names[number] if known.class_names else ""
    return Prompt("", number, text, metadata)


def _with_keys(prompts: Sequence[Prompt], by_text: bool) -> list[Prompt]:
    """Add the keys of prompts: the condition, and its number among equal ones."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        asked = f"text {prompt.text}" if by_text and prompt.text else f"class {max(0, prompt.label)}"
        found.append(prompt._replace(key=f"{asked} sample {seen[asked]}"))
        seen[asked] += 1
    return found
