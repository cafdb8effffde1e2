"""Open pictures to measure from a folder, shard sets or an array file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flextok_pl.contracts import Batch, ImageSize, checked_size
from flextok_pl.data.datamodule import ShardDataModule
from flextok_pl.data.image_files import list_images
from flextok_pl.data.shards.index import INDEX_NAME
from flextok_pl.data.shards.remote import is_remote
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.transforms import MODES, center_crop, check_channels, decode_image, to_tensor

ARRAY = "arr_0"
"""Name of the (N, H, W, 3) uint8 pictures in guided diffusion's `.npz` files (https://arxiv.org/abs/2105.05233)."""


def open_pictures(
    source: str,
    image_size: ImageSize | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    channels: int = 3,
) -> tuple[DataLoader[Batch], int]:
    """Make a loader of the pictures, each once and in a fixed order; returns also their number.

    The source is a folder of images, searched recursively; a shard set, also remote, or a pattern of sets; or a `.npz`
    file with `arr_0`. Batches have `image` (B, channels, H, W) in [-1, 1] and `key`. With `image_size` each picture is
    cropped to it, see `center_crop`. A broken picture raises `ValueError` when it is read.
    """
    for name, value, minimum in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < minimum:
            raise ValueError(f"{name}={value} must be at least {minimum}")
    check_channels(channels)
    image_size = None if image_size is None else checked_size(image_size)
    if is_remote(source):
        return _of_shards(source, image_size, batch_size, num_workers, channels)
    path = Path(source).expanduser()
    pictures: _Pictures
    if path.suffix == ".npz":
        pictures = _of_array(path, image_size, channels)
    elif path.is_dir() and not (path / INDEX_NAME).is_file():
        pictures = _Pictures(list_images(path), partial(_read_file, path, channels), image_size)
    else:
        return _of_shards(str(path), image_size, batch_size, num_workers, channels)
    loader: Any = DataLoader(pictures, batch_size, num_workers=num_workers, collate_fn=_collate)
    return loader, len(pictures)


class _Pictures(Dataset[tuple[str, Image.Image]]):
    """Pictures by name, read one by one and cropped to `image_size` if that is given."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Image.Image], image_size: ImageSize | None) -> None:
        self.names, self.read, self.image_size = names, read, image_size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[str, Image.Image]:
        image = self.read(self.names[number])
        return self.names[number], image if self.image_size is None else center_crop(image, self.image_size)


def _collate(pictures: Sequence[tuple[str, Image.Image]]) -> Batch:
    first_name, first = pictures[0]
    for name, image in pictures:
        if image.size != first.size:
            raise ValueError(
                f"pictures of different sizes: {first_name} has {first.width} x {first.height} pixels, {name} "
                f"{image.width} x {image.height}; give image_size to crop them"
            )
    return {"image": to_tensor([image for _, image in pictures]), "key": [name for name, _ in pictures]}


def read_picture(path: Path, channels: int = 3) -> Image.Image:
    """Read a picture from a file, with so many channels; an error names the file."""
    check_channels(channels)
    try:
        return decode_image(path.read_bytes(), channels=channels)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}; repair or remove it") from error


def _read_file(folder: Path, channels: int, name: str) -> Image.Image:
    return read_picture(folder / name, channels)


def _read_row(pixels: np.ndarray[Any, Any], channels: int, name: str) -> Image.Image:
    return Image.fromarray(pixels[int(name)]).convert(MODES[channels])


def _of_array(path: Path, image_size: ImageSize | None, channels: int) -> _Pictures:
    pixels = read_arrays(path, [ARRAY]).get(ARRAY)
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        held = "nothing" if pixels is None else f"{pixels.dtype} {pixels.shape}"
        raise ValueError(f"{path}: {ARRAY} is {held}; pictures must be uint8 (N, H, W, 3)")
    names = [f"{number:08d}" for number in range(len(pixels))]
    return _Pictures(names, partial(_read_row, pixels, channels), image_size)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read the named arrays of a `.npz` file, with None for each other one in it; no code in the file runs."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] if name in names else None for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:  # of a .npy file a TypeError
        raise ValueError(
            f"{path} cannot be read as a .npz file of numbers ({error}); write it with numpy.savez"
        ) from error


def _of_shards(
    source: str, image_size: ImageSize | None, batch_size: int, num_workers: int, channels: int
) -> tuple[DataLoader[Batch], int]:
    index = load_indices(source)[0]
    size = image_size or index.image_size
    if "image" not in index.fields:
        raise ValueError(f"{source} holds {list(index.fields)}, but no pictures")
    if size is None:
        raise ValueError(f"{source} holds pictures of any size: give image_size to crop them")
    data = ShardDataModule(
        test=source, image_size=size, eval_batch_size=batch_size, num_workers=num_workers, channels=channels
    )
    return data.test_dataloader(), data.num_samples("test")
