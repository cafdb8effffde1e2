"""Images/s of `flextok data folder` and `flextok data imagenet`, against bare reading and decoding of the same files.

JPEGs of 500 x 375 pixels in 50 classes, about 57 KB each, are on the local disk, in its cache, as files and as
ILSVRC2012_img_train.tar. The pictures are stored unchanged, or shrunk to 256 pixels. `of_bare` is the speed as a share
of that of as many processes which only decode the files.

    python benchmarks/conversion.py --json benchmarks/results/conversion_cpu.json
"""

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from report import median_seconds, write_results

from flextok_pl.data import write_folder, write_imagenet
from flextok_pl.data.convert.imagenet import TARS
from flextok_pl.data.image_files import list_images
from flextok_pl.data.shards.jobs import run_jobs
from flextok_pl.data.transforms import decode_image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num-pictures", type=int, default=1000)
parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
parser.add_argument("--sizes", nargs="+", type=int, default=[0, 256], help="0 stores the files unchanged")
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--device", default="cpu", help="device; the CPU, as for converters")
parser.add_argument("--json", default=None, help="file to write the results to")

CLASSES = 50
Writer = Callable[..., object]


def make_source(folder: Path, num_pictures: int) -> None:
    """Write `train/<wnid>/*.JPEG`, and the same pictures as a tar of tars."""
    generator = torch.Generator().manual_seed(0)
    wnids = [f"n{i:08d}" for i in range(CLASSES)]
    for i in range(num_pictures):
        coarse = torch.randn(1, 3, 24, 32, generator=generator) * 50 + 128
        smooth = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")
        pixels = smooth + torch.randn(1, 3, 375, 500, generator=generator) * 6
        file = folder / "train" / wnids[i % CLASSES] / f"{wnids[i % CLASSES]}_{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels[0].permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy())
        image.save(file, quality=90)
    tars = folder / "tars"
    tars.mkdir()
    with tarfile.open(tars / TARS["train"], "w") as outer:
        for wnid in wnids:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for file in sorted((folder / "train" / wnid).iterdir()):
                    inner.add(file, file.name)
            info = tarfile.TarInfo(f"{wnid}.tar")
            info.size = buffer.tell()
            buffer.seek(0)
            outer.addfile(info, buffer)


def decode(folder: Path, names: list[str]) -> None:
    for name in names:
        decode_image((folder / name).read_bytes())


def bare(folder: Path, workers: int) -> None:
    names = list_images(folder)
    chunks = [names[i : i + 100] for i in range(0, len(names), 100)]
    run_jobs(partial(decode, folder), chunks, workers, "bare", "chunk")


def convert(write: Writer, source: Path, size: int, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(source, Path(folder) / "dst", size=size or None, num_workers=workers, samples_per_shard=100)


def main() -> None:
    options = parser.parse_args()
    calls: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_source(folder, options.num_pictures)
        for workers in options.workers:
            calls[f"bare, {workers} workers"] = partial(bare, folder / "train", workers)
            for label, write, source in (
                ("data folder", write_folder, folder / "train"),
                ("data imagenet", write_imagenet, folder / "tars"),
            ):
                for side in options.sizes:
                    how = f"{label} --size {side}" if side else label
                    calls[f"{how}, {workers} workers"] = partial(convert, write, source, side, workers)
        seconds = median_seconds(calls, options.repeats, options.device)
    results = {
        call: {
            "images_per_second": options.num_pictures / spent,
            "of_bare": seconds[f"bare, {call.split()[-2]} workers"] / spent,
        }
        for call, spent in seconds.items()
    }
    write_results("conversion", vars(options), results, options.json)


if __name__ == "__main__":
    main()
