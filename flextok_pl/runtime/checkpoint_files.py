"""Checkpoint files: written completely or not at all, and checked before use."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from flextok_pl.files import whole_file
from flextok_pl.progress import announced

SHARDED_FILES = (".metadata", "meta.pt")
"""Contents of a complete sharded checkpoint's folder, besides the parts of the processes."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, flushes it to the disk, and then renames it.

    Whenever the process or the machine dies, the file of that name is a complete checkpoint, the previous one or the
    new one. Lightning's own plugin writes to the system's temporary folder, which may be on another disk, and holds a
    second copy in memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; if the disk is full or fails, earlier ones are unchanged."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(Path(path), "resume with --ckpt_path last") as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch hides the disk's own error behind one about its writer.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, also from a URL, as tensors and plain types; none of its code runs."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


def damage_of(path: Path, contents: bool = True) -> str | None:
    """Say what is damaged in a checkpoint (a file, or a folder of parts); None if it is whole.

    With `contents` all of a file is compared with its checksums; otherwise only its end is checked.
    """
    if path.is_dir():
        missing = [name for name in SHARDED_FILES if not (path / name).is_file()]
        return f"it has no {missing[0]}" if missing else None
    try:
        with announced(f"checking {path}"), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if contents else None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        return f"it is not a complete checkpoint: {error}"
    return None if damaged is None else f"{damaged} in it does not match its checksum"


def without_tensors(path: Path) -> dict[str, Any]:
    """Read what a checkpoint holds (of a folder of parts: what all share), without the values of its tensors."""
    file = path / SHARDED_FILES[1] if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # type: ignore[no-any-return]


def find_checkpoint(path: Path, contents: bool = True) -> Path | None:
    """The checkpoint to resume from: `path` itself, which must be whole, or the newest whole one of a folder of them.

    None for a folder without any. A path that does not exist is returned, for its reader to refuse. For `contents` see
    `damage_of`.
    """
    if path.is_dir() and not any((path / name).exists() for name in SHARDED_FILES) and path.suffix != ".ckpt":
        return newest_intact(path, contents)
    damage = damage_of(path, contents) if path.exists() else None
    if damage is not None:
        raise ValueError(
            f"ckpt_path={path} is damaged ({damage}); give another file of its folder, or `last` for the newest whole "
            "one"
        )
    return path


def newest_intact(folder: Path, contents: bool = True) -> Path | None:
    """The newest whole checkpoint in a folder, or None if it has none; warns of newer ones that are damaged.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    found = {file.resolve() for file in folder.glob("*.ckpt") if file.exists()}
    newest_first = sorted(found, key=lambda file: (file.stat().st_mtime_ns, file.name), reverse=True)
    for number, file in enumerate(newest_first):
        damage = damage_of(file, contents)
        if damage is None:
            return file
        before = newest_first[number + 1 : number + 2]
        warnings.warn(
            f"{file} is damaged ({damage}); " + (f"going back to {before[0].name}" if before else "nothing is left"),
            stacklevel=2,
        )
    if newest_first:
        raise ValueError(
            f"none of the {len(newest_first)} checkpoints in {folder} is whole; start a new training, or restore one"
        )
    return None
