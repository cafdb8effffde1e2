"""Find the pictures in a folder, and count its other files."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from flextok_pl.data.shards.index import IMAGE_EXTENSIONS
from flextok_pl.progress import announced

_LOG = logging.getLogger(__name__)

_SIGNATURES = {
    "jpg": rb"\xff\xd8\xff",
    "png": rb"\x89PNG\r\n\x1a\n",
    "webp": rb"RIFF.{4}WEBP",
    "gif": rb"GIF8[79]a",
    "tif": rb"II[*+]\0|MM\0[*+]",
    "bmp": rb"BM.{4}\0{4}",
    "avif": rb".{4}ftypavi[fs]",
    "heic": rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "jp2": rb"\0\0\0\x0cjP  ",
    "j2k": rb"\xff\x4f\xff\x51",
    "ppm": rb"P[1-6][\s#]",
    "qoi": rb"qoif",
    "psd": rb"8BPS",
}
"""First bytes of kinds of pictures, by their extension."""


@dataclass
class ImageFiles:
    """Contents of a folder: the pictures, and the number and an example of the other files."""

    src: Path
    extensions: dict[str, str] = field(default_factory=dict)  # in lower case, by path relative to the folder, in order
    rest: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def leave_out(self, kind: str, name: str) -> None:
        """Count something that is not a picture."""
        self.example = self.example or name
        self.rest[kind] += 1

    def tell_rest(self) -> None:
        """Log what was left out, if anything."""
        if self.rest:
            kinds = ", ".join(f"{number} {kind}" for kind, number in self.rest.most_common())
            unread = ", ".join(kind for kind in self.rest if kind[1:] in IMAGE_EXTENSIONS)
            more = f"; Pillow lacks a reader of {unread} here (of .heic: pip install pillow-heif)" if unread else ""
            _LOG.warning("%s: left out %s, which are not pictures; such as %s%s", self.src, kinds, self.example, more)


def extension_of(kind: str) -> str | None:
    """The extension of a Pillow format; None if `IMAGE_EXTENSIONS` has none."""
    known = Image.registered_extensions()
    return next((name for name in IMAGE_EXTENSIONS if known.get(f".{name}") == kind.upper()), None)


def list_images(src: Path) -> list[str]:
    """List the images under a folder by relative path, in order; logs what else is there. See `find_images`."""
    found = find_images(src)
    found.tell_rest()
    return list(found.extensions)


@announced("looking for pictures")
def find_images(src: Path, besides: Sequence[Path] = ()) -> ImageFiles:
    """Find the images under a folder.

    A file is a picture by its ending or, without one, by its first bytes. Hidden files and folders are left out. A link
    to a folder is followed unless that folder is read elsewhere or holds `src`. The count of other files excludes
    `besides`, files known to be something else, and files named like a picture beside them, such as its caption.
    """
    found, known_extensions = ImageFiles(src), Image.registered_extensions()
    readable = {name for name in IMAGE_EXTENSIONS if known_extensions.get(f".{name}") in Image.OPEN}
    known = {os.path.abspath(path) for path in besides}
    images: dict[str, str] = {}
    others: list[str] = []
    for relative, names in _folders(src, found):
        for name in names:
            path = (relative / name).as_posix()
            extension = split_ending(name)[1].lower() or _extension_by_content(src / path)
            if extension in readable and not name.startswith("."):
                images[path] = extension
            elif os.path.abspath(src / path) not in known:
                others.append(path)
    if not images:
        raise ValueError(f"src={src} holds no images ({', '.join(sorted(readable))})")
    found.extensions = {path: images[path] for path in sorted(images)}
    stems = {split_ending(path)[0] for path in images}
    for path in sorted(others):
        stem, ending = split_ending(path)
        if path.rpartition("/")[2].startswith("."):
            if ending.lower() in readable:
                found.leave_out("hidden", path)
        elif stem not in stems and stem not in images:
            found.leave_out(f".{ending.lower()}" if ending else "without an ending", path)
    return found


def split_ending(name: str) -> tuple[str, str]:
    """Split a path at the last dot of its name; an ending such as `12.5` that is not a word stays whole."""
    match = re.search(r"(?<=[^/])\.([a-zA-Z]\w{0,15})\Z", name)
    return (name[: match.start()], match[1]) if match else (name, "")


def _extension_by_content(path: Path) -> str:
    """The extension that fits a file's first bytes; empty if it is not a picture or cannot be read."""
    if not path.is_file():  # reading a pipe would block
        return ""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        return ""
    return next((name for name, begin in _SIGNATURES.items() if re.match(begin, start, re.DOTALL)), "")


def _folders(src: Path, found: ImageFiles) -> Iterator[tuple[Path, list[str]]]:
    """Each folder once, relative to `src`, with the names of its files; folders reached without links come first."""
    seen = {_identity(folder) for folder in src.resolve().parents}
    links = [src]
    while links:
        top = links.pop(0)
        if top is not src and _identity(top) in seen:
            found.leave_out("links to folders that are read elsewhere", top.relative_to(src).as_posix())
            continue
        for root, folders, names in os.walk(top, onerror=_cannot_read):
            here = Path(root)
            seen.add(_identity(here))
            visible = sorted(name for name in folders if not name.startswith("."))
            links += [here / name for name in visible if (here / name).is_symlink()]
            real = [name for name in visible if not (here / name).is_symlink()]
            folders[:] = [name for name in real if _identity(here / name) not in seen]
            yield here.relative_to(src), names


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _cannot_read(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be read ({error.strerror}); change its permissions, or move it away")
