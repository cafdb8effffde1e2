"""Find the files of a data set by part: on this machine, or on the Hugging Face Hub."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flextok_pl.data.shards.listing import matching_paths

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "val"),
    "test": "test",
}
"""Part by a word in a file's path, as in `data/train-00000-of-00010.parquet`; the Hub uses the same words
(https://huggingface.co/docs/hub/datasets-file-names-and-splits)."""


def find_parts(src: str, files: str, revision: str | None, split: str | None) -> dict[str, list[Path]]:
    """Find the files of `train`, `val` and `test`, or all of them as `all`, in order; downloads those of the Hub.

    The options are those of `write_parquet`.
    """
    if split not in (None, *SPLITS.values()):
        raise ValueError(f"split={split} must be train, val or test")
    from_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", src) is not None and not Path(src).exists()
    if from_hub:
        with _hub(f"no file or folder src={src} here, and no such data set on the Hub") as hub:
            names = hub.list_repo_files(src, repo_type="dataset", revision=revision)
        found = [(name, Path(name)) for name in sorted(names)]
    else:
        found = []
        for path in matching_paths(src):
            root = path if path.is_dir() else path.parent
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
            found += [(file.relative_to(root).as_posix(), file.absolute()) for file in inside]
    by_part: dict[str, list[Path]] = {}
    for name, path in found:
        if name == files or fnmatch.fnmatch(name, files):
            by_part.setdefault(part_of(name), []).append(path)
    if not by_part:
        hint = "; revision=refs/convert/parquet may have some" if from_hub else ""
        raise ValueError(f"src={src} has no files {files}{hint}")
    if "all" in by_part and len(by_part) > 1:
        raise ValueError(
            f"src={src}: {by_part.pop('all')[0]} names no part, but others do ({', '.join(by_part)}); choose files"
        )
    if split is not None and split not in by_part:
        raise ValueError(f"split={split} is not among the parts of src={src}: {', '.join(by_part)}")
    chosen = {part: paths for part, paths in by_part.items() if split in (None, part)}
    if from_hub:
        wanted = [path.as_posix() for paths in chosen.values() for path in paths]
        problem = f"src={src} could not be fetched from the Hub; finished files are kept: run the same command again"
        with _hub(problem) as hub:
            folder = hub.snapshot_download(src, repo_type="dataset", revision=revision, allow_patterns=wanted)
        chosen = {part: [Path(folder) / path for path in paths] for part, paths in chosen.items()}
    return chosen


def part_of(name: str) -> str:
    """The part that a path names, by its last word that does; `all` if it names none."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "all")


@contextmanager
def _hub(problem: str) -> Iterator[Any]:
    """Import the Hub's library, and turn the errors of its several network libraries into one."""
    import huggingface_hub

    try:
        yield huggingface_hub
    except Exception as error:
        raise ValueError(f"{problem}: {type(error).__name__}: {error}") from error
