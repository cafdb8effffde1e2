"""Write ImageNet-1k (ILSVRC 2012, https://www.image-net.org/challenges/LSVRC/2012/) as shards, from tars or folders.

A class is a WordNet synset, named by its wnid. Its index is the wnid's position in alphabetical order, as in nearly all
published models. It is not the ILSVRC2012_ID of the development kit.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import scipy.io

from flextok_pl.data.convert.classes import read_lines
from flextok_pl.data.convert.conversion import Conversion, Item, check_choice, mixed
from flextok_pl.data.image_files import find_images, split_ending
from flextok_pl.data.shards.index import IMAGE_EXTENSIONS, ShardIndex
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.shards.listing import listing_digest
from flextok_pl.data.shards.tars import Span, tar_members

FOLDERS = ("", "ILSVRC/Data/CLS-LOC/")
"""Folders that may hold train and val; the second is Kaggle's."""

KAGGLE = ("LOC_synset_mapping.txt", "LOC_val_solution.csv")
"""Files of Kaggle's package that replace the development kit: the synsets, and the classes of val."""

WNID, VAL_NAME = r"n\d{8}", r"ILSVRC2012_val_\d{8}"
"""Patterns of synset names, and of picture names in val."""

TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"

Pictures = list[tuple[str, str, Span]]
"""Wnid (empty if only the development kit knows it), file name and place of each picture."""


def write_imagenet(
    src: Path | str,
    dst: Path | str,
    part: Literal["all", "train", "val"] = "all",
    *,
    classes: Path | str | None = None,
    **options: Any,
) -> dict[str, ShardIndex]:
    """Write ImageNet-1k (ILSVRC 2012) as shards, from its tar files or its folders: `DST/train` and `DST/val`.

    SRC holds one of these:

    - ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which are read in place;
    - the folders train, with one folder per wnid, and val, flat or with such folders;
    - Kaggle's package, unpacked: ILSVRC/Data/CLS-LOC, LOC_synset_mapping.txt and LOC_val_solution.csv.

    A tar is preferred to its folder. A flat val needs the development kit or Kaggle's two files. With either, classes
    are named by the first word of their synset, else by their wnid. A class's number is the position of its wnid in
    alphabetical order.

    Args:
        src: folder with the tars or folders.
        dst: folder for the shards.
        part: `train`, `val`, or `all` parts in SRC.
        classes: text file with one wnid per line: take only these classes, as in ImageNet-100. Default those of train.
        **options: those of `Conversion`.

    Raises:
        ValueError: an option, a file of SRC or a picture is invalid; the message names it.
    """
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    check_choice("part", part, ("all", "train", "val"))
    conversion = Conversion(**options)
    asked = [name for name in TARS if part in ("all", name)]
    parts = [name for name in asked if (src / TARS[name]).is_file() or (src / _folder(src, name)).is_dir()]
    if not parts:
        wanted = [f"{TARS[name]}, {name}/ or {FOLDERS[1]}{name}/" for name in asked]
        raise ValueError(f"src={src} holds no {' and no '.join(wanted)}")
    devkit = read_devkit(src) or read_kaggle(src)
    pictures = {name: _with_wnids(_list_part(src, name, conversion), src, devkit) for name in parts}
    wnids = _wnids(src, classes, pictures, devkit)
    names = class_names(wnids, devkit)
    result = {}
    for name in parts:
        items = _items(pictures[name], wnids, all_of_them=classes is None, where=f"{name} of src={src}")
        arguments = {
            "writer": "imagenet",
            "part": name,
            "source": str(src.resolve()),
            "files": listing_digest(src, sorted({span.file for *_, span in pictures[name]})),
            "classes": hashlib.sha256(json.dumps([wnids, names]).encode()).hexdigest(),
        }
        result[name] = conversion.write(
            dst / name,
            items,
            conversion.reader(src),
            f"{name} shards",
            fields=("image", "label"),
            classes=names,
            arguments=arguments,
            provenance={"source": str(src.resolve()), "wnids": wnids},
        )
    return result


@dataclass(frozen=True)
class Devkit:
    """The classes in the development kit."""

    words: dict[str, str]  # synsets without narrower ones, by wnid: "tench, Tinca tinca"
    val: dict[str, str]  # wnid of each validation picture, by its name without the ending


def read_devkit(src: Path) -> Devkit | None:
    """Read the development kit in a folder, unpacked or not; None if there is none."""
    packed = src / f"{DEVKIT}.tar.gz"
    names = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    try:
        if packed.is_file():
            with tarfile.open(packed, "r:gz") as tar:
                meta, truth = (cast(IO[bytes], tar.extractfile(f"{DEVKIT}/data/{name}")).read() for name in names)
        elif (src / DEVKIT).is_dir():
            meta, truth = ((src / DEVKIT / "data" / name).read_bytes() for name in names)
        else:
            return None
        # Of the 1860 synsets, those that have narrower ones are not classes.
        synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        classes = [synset for synset in synsets if int(synset["num_children"]) == 0]
        wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in classes}
        val = {f"ILSVRC2012_val_{i:08d}": wnids[int(n)] for i, n in enumerate(truth.split(), start=1)}
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:
        raise ValueError(
            f"the development kit {DEVKIT} in src={src} cannot be read ({error!r}); fetch it again"
        ) from error
    return Devkit({str(synset["WNID"]): str(synset["words"]) for synset in classes}, val)


def read_kaggle(src: Path) -> Devkit | None:
    """Read the files of Kaggle's package that replace the development kit; None if there are none."""
    if not any((src / name).is_file() for name in KAGGLE):
        return None
    # A picture's wnid is followed by boxes, each with the same wnid: "n03995372 85 1 499 272".
    patterns = (rf"({WNID})\s+(\S.*)", rf'"?({VAL_NAME})"?,"?({WNID})\b.*|ImageId,PredictionString')
    words, val = (_pairs(src / name, pattern) for name, pattern in zip(KAGGLE, patterns, strict=True))
    return Devkit(words, val)


def _pairs(file: Path, pattern: str) -> dict[str, str]:
    """Match a pattern of two groups in each line of a file, if the file exists."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read ({error}); fetch it again") from error
    pairs: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(pattern, line.strip())
        if match is None:
            raise ValueError(f"{file}, line {number}: {line[:60]!r} does not name a synset; fetch it again")
        if match[1] is not None:
            pairs[match[1]] = match[2]
    return pairs


def class_names(wnids: Sequence[str], devkit: Devkit | None) -> tuple[str, ...]:
    """Names by which users ask for a class: the first word of its synset.

    If several classes share it in any case (crane: a bird, and a machine), the wnid follows.
    """
    if devkit is None:
        return tuple(wnids)
    first = {wnid: devkit.words.get(wnid, wnid).partition(",")[0].strip() for wnid in wnids}
    number = Counter(name.lower() for name in first.values())
    return tuple(name if number[name.lower()] == 1 else f"{name} ({wnid})" for wnid, name in first.items())


def _folder(src: Path, part: str) -> str:
    """The folder of a part, relative to the source; it may not exist."""
    return next((f"{above}{part}" for above in FOLDERS if (src / above / part).is_dir()), part)


def _list_part(src: Path, part: str, conversion: Conversion) -> Iterator[tuple[str, Span]]:
    """Path within the part, with an ending, and place of each file."""
    tar = TARS[part]
    if not (src / tar).is_file():
        folder = _folder(src, part)
        found = find_images(src / folder)
        found.tell_rest()
        for file, extension in found.extensions.items():
            yield file if split_ending(file)[1] else f"{file}.{extension}", Span(f"{folder}/{file}")
    elif part == "val":
        yield from tar_members(src, tar)
    else:
        inner = list(tar_members(src, tar))
        for members in run_jobs(partial(_list_class, src), inner, conversion.num_workers, tar, "class"):
            yield from members


def _list_class(src: Path, tar: tuple[str, Span]) -> list[tuple[str, Span]]:
    """The pictures in one of the tars within the training tar."""
    name, place = tar
    members = tar_members(src, place.file, place.offset, place.size)
    return [(f"{Path(name).stem}/{Path(file).name}", span) for file, span in members]


def _with_wnids(files: Iterator[tuple[str, Span]], src: Path, devkit: Devkit | None) -> Pictures:
    pictures = []
    for path, span in files:
        folder, _, file = f"/{path}".rpartition("/")
        wnid = folder.rpartition("/")[2]
        stem, _, extension = file.rpartition(".")
        if extension.lower() not in IMAGE_EXTENSIONS:
            continue
        if not re.fullmatch(WNID, wnid):
            wnid = _wnid_of_val(stem, f"{span.file}: {path}", src, devkit)
        pictures.append((wnid, file, span))
    return pictures


def _wnid_of_val(stem: str, where: str, src: Path, devkit: Devkit | None) -> str:
    if re.fullmatch(VAL_NAME, stem) is None:
        raise ValueError(
            f"{where} is not in the folder of a synset (such as n01440764), and is not an ILSVRC2012_val_<8 digits>; "
            "convert other pictures with `flextok data folder`"
        )
    if devkit is None or not devkit.val:
        raise ValueError(
            f"{where}: its class is in the development kit; put {DEVKIT}.tar.gz into src={src}, or Kaggle's "
            f"{' and '.join(KAGGLE)}"
        )
    if stem not in devkit.val:
        raise ValueError(
            f"{where}: it is not among the {len(devkit.val)} validation pictures whose classes src={src} has"
        )
    return devkit.val[stem]


def _wnids(src: Path, classes: Path | str | None, pictures: dict[str, Pictures], devkit: Devkit | None) -> list[str]:
    """The wnids of the classes: those asked for, or of train, the development kit or the folders of val."""
    if classes is not None:
        wnids = [line.split()[0] for line in read_lines("classes", classes) if line]
        wrong = [wnid for wnid in wnids if not re.fullmatch(WNID, wnid)]
        if wrong or not wnids:
            raise ValueError(f"classes={classes} must have one wnid per line, such as n01440764, not {wrong[:1]}")
        return sorted(set(wnids))
    if "train" in pictures:
        return sorted({wnid for wnid, *_ in pictures["train"]})
    train = src / _folder(src, "train")
    if (src / TARS["train"]).is_file():
        names = [Path(name).stem for name, _ in tar_members(src, TARS["train"])]
    elif train.is_dir():
        names = [folder.name for folder in train.iterdir() if folder.is_dir() and any(folder.iterdir())]
    elif devkit is not None and devkit.words:
        names = list(devkit.words)
    else:
        names = [wnid for wnid, *_ in pictures["val"]]
    return sorted({name for name in names if re.fullmatch(WNID, name)})


def _items(pictures: Pictures, wnids: Sequence[str], all_of_them: bool, where: str) -> list[Item]:
    number = {wnid: i for i, wnid in enumerate(wnids)}
    found = {wnid for wnid, *_ in pictures}
    more, without = sorted(found - number.keys()), sorted(number.keys() - found)
    if more and all_of_them:
        raise ValueError(
            f"{where} has pictures of {len(more)} classes that train lacks, such as {more[0]}; give the classes to "
            "take as classes=FILE"
        )
    if without and not all_of_them:
        raise ValueError(f"{where} has no pictures of {len(without)} of the classes asked for, such as {without[0]}")
    items = []
    for wnid, file, span in pictures:
        if wnid in number:
            stem, _, extension = file.rpartition(".")
            key = f"{wnid}/{stem.replace('.', '_')}"
            items.append(Item(key, ((extension.lower(), span),), number[wnid]))
    return mixed(items)
