"""Speed, memory and start-up of the data loader: against webdataset and torchvision, and against a bare decoding loop.

Synthetic pictures of 500 x 375 pixels (noise with the 1/f spectrum of photos, and edges) are stored as JPEG of quality
90, byte for byte the same in class folders and in tar files. All loaders deliver batches of 256 px pictures in [-1, 1]:
random crops resized with Pillow's antialiased bicubic filter. The bare loop does the same without a loader, in one
process per worker of the loaders.

`fast_decode` is our loader at 64 px, with and without this option; it may decode 500 x 375 at half size. `buckets` is
the speed of our loader with five shapes of about 256 x 256 pixels over that with squares, on pictures of several aspect
ratios; `--buckets-only` measures only this. `memory_mib` is the memory of a loader with one worker while it delivers
50,000 samples. The last entries are a simulated ImageNet, 1,282 shards of 1,000 small samples, which are one file under
many names, and 1/10 and 1/100 of it.

    python benchmarks/loader.py --json benchmarks/results/loader_cpu.json
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import measure_apart, write_results

from flextok_pl.data import Augmentation, ShardDataModule, write_folder
from flextok_pl.data.shards.index import ShardIndex
from flextok_pl.data.shards.writer import Sample, shard_name, write_index, write_shard
from flextok_pl.data.transforms import augment, decode_image, picture_tensor, sample_generator, to_tensor

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pictures", type=int, default=2000)
parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--passes", type=int, default=50_000, help="samples over which memory is measured")
parser.add_argument("--shards", type=int, default=1282, help="shards of 1,000 samples, in the simulated ImageNet")
parser.add_argument("--buckets-only", action="store_true")
parser.add_argument("--device", default="cpu", choices=["cpu"])
parser.add_argument("--json", default=None, help="file to write the results to")
parser.add_argument("--measure", nargs="*", help=argparse.SUPPRESS)

SIZE, BATCH = 256, 64
SHAPES = [(256, 256), (224, 288), (288, 224), (192, 336), (336, 192)]
PICTURES = [(375, 500), (433, 433), (500, 375), (330, 570), (570, 330)]
"""Height and width of the pictures in the set of several aspect ratios."""
CROP = Augmentation(crop_scale=(0.8, 1.0))


def picture(generator: np.random.Generator, height: int = 375, width: int = 500) -> bytes:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width)
    phases = np.exp(2j * np.pi * generator.random((3, *amplitude.shape)))
    noise = np.fft.irfft2(amplitude * phases, s=(height, width))
    noise = noise[:1] * 0.8 + noise * 0.4  # correlated channels
    pixels = np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    for _ in range(10):
        y, x = generator.integers(0, 300, 2)
        part = pixels[y : y + 100, x : x + 100]
        part[:] = part // 2 + generator.integers(0, 128, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_pictures(folder: Path, count: int) -> None:
    """Write this many files, of 200 different pictures."""
    generator = np.random.default_rng(0)
    different = [picture(generator) for _ in range(min(count, 200))]
    for number in range(count):
        file = folder / "pictures" / f"c{number % 10}" / f"p{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(different[number % len(different)])
    write_folder(folder / "pictures", folder / "shards", num_workers=0, samples_per_shard=250)
    several = [picture(generator, *PICTURES[i % len(PICTURES)]) for i in range(min(count, 200))]
    for number in range(count):
        file = folder / "several" / f"p{number:06d}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(several[number % len(several)])
    write_folder(folder / "several", folder / "shards_several", num_workers=0, samples_per_shard=250)


def resized(data: bytes, key: str) -> Image.Image:
    return augment(decode_image(data), SIZE, CROP, sample_generator(0, 0, key))


class Webdataset:
    """The transform of a webdataset training script on the same files."""

    def __call__(self, sample):
        return picture_tensor(resized(sample["jpg"], sample["__key__"])), int(sample["cls"])


class Folder:
    def __call__(self, path: str):
        return resized(Path(path).read_bytes(), path)


def single(image: Image.Image) -> torch.Tensor:
    return picture_tensor(image)


def loader_of(name: str, folder: Path, workers: int):
    if name == "ours":
        data = ShardDataModule(str(folder / "shards"), batch_size=BATCH, num_workers=workers, augmentation=CROP)
        return data.train_dataloader()
    if name in ("squares", "buckets"):
        chosen = {"batch_size": BATCH, "num_workers": workers, "augmentation": CROP}
        shapes = SHAPES if name == "buckets" else None
        return ShardDataModule(str(folder / "shards_several"), shapes=shapes, **chosen).train_dataloader()
    if name == "webdataset":
        import webdataset as wds

        tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
        data = wds.WebDataset(tars, shardshuffle=len(tars), seed=0, workersplitter=wds.split_by_worker)
        data = data.shuffle(2000).map(Webdataset()).batched(BATCH)
        return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)
    from torchvision.datasets import ImageFolder

    data = ImageFolder(folder / "pictures", transform=single, loader=Folder())
    return torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def bare(folder: Path, share: int, of: int) -> float:
    """Images per second of one process that decodes part of the files without a loader."""
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted((folder / "pictures").rglob("*.jpg"))[share::of]][: 6 * BATCH]
    start = time.perf_counter()
    for first in range(0, len(files), BATCH):
        to_tensor([resized(data, f"p{first + i}") for i, data in enumerate(files[first : first + BATCH])])
    return len(files) / (time.perf_counter() - start)


def images_per_second(folder: Path, name: str, workers: int) -> float:
    """Images per second of one epoch, after the first batch of every worker, which includes its start."""
    torch.set_num_threads(1)
    batches = iter(loader_of(name, folder, workers))
    for _ in range(2 * workers):
        next(batches)
    start, count = time.perf_counter(), 0
    for first, *_ in (batch.values() if isinstance(batch, dict) else batch for batch in batches):
        count += len(first)
    return count / (time.perf_counter() - start)


def memory(folder: Path, samples: int) -> dict[str, float]:
    """Resident MiB of this process and its worker (their own pages, without the system's file cache)."""
    data = ShardDataModule(str(folder / "shards"), image_size=64, batch_size=BATCH, num_workers=1, fast_decode=True)
    loader, held, seen, epoch = data.train_dataloader(), {}, 0, 0
    while seen < samples:
        data.set_epoch(epoch)
        for batch in loader:
            seen += len(batch["key"])
            step = seen // (samples // 5) * (samples // 5)
            if step and f"after {step}" not in held:
                held[f"after {step}"] = sum(_own_mib(pid) for pid in _family())
        epoch += 1
    return held


def _family() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [os.getpid(), *map(int, children)]


def _own_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def simulate(folder: Path, shards: int) -> None:
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    info = write_shard(
        folder / shard_name(0), [Sample(f"s{i}", {"jpg": buffer.getvalue(), "cls": b"0"}) for i in range(1000)]
    )
    for number in range(1, shards):
        (folder / shard_name(number)).hardlink_to(folder / shard_name(0))
    infos = tuple(replace(info, name=shard_name(number)) for number in range(shards))
    write_index(ShardIndex(folder, ("image", "label"), infos, ("only",), 8))


def start_and_resume(folder: Path) -> dict[str, float]:
    def first_batch(position: float) -> float:
        data = ShardDataModule(str(folder), image_size=8, batch_size=BATCH, num_workers=0, shuffle_buffer=5000)
        loader = data.train_dataloader()
        start = time.perf_counter()
        loader.stream.start_at(1, int(position * len(loader)) * BATCH)
        next(iter(loader.stream))
        return time.perf_counter() - start

    start = time.perf_counter()
    data = ShardDataModule(str(folder), image_size=8, batch_size=BATCH, num_workers=0)
    data.train_dataloader()
    return {
        "start_up_s": time.perf_counter() - start,
        "first_batch_s": statistics.median(first_batch(0.0) for _ in range(5)),
        "first_batch_after_resume_at_half_s": statistics.median(first_batch(0.5) for _ in range(5)),
        "first_batch_after_resume_at_0.9_s": statistics.median(first_batch(0.9) for _ in range(5)),
    }


def measure(what: str, folder: str, *more: str):
    place = Path(folder)
    if what == "bare":
        return bare(place, int(more[0]), int(more[1]))
    if what == "memory":
        return memory(place, int(more[0]))
    if what == "size":
        return start_and_resume(place)
    if what == "cpu_rate":
        return cpu_rate(place, more[0])
    if what == "fast_decode":
        return fast_decode(place, more[0] == "true")
    return images_per_second(place, what, int(more[0]))


def fast_decode(folder: Path, fast: bool) -> float:
    data = ShardDataModule(str(folder / "shards"), image_size=64, batch_size=BATCH, num_workers=0, fast_decode=fast)
    torch.set_num_threads(1)
    batches = iter(data.train_dataloader())
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch["key"]) for _, batch in zip(range(12), batches, strict=False))
    return count / (time.perf_counter() - start)


def throughput(folder: str, options: argparse.Namespace) -> dict[str, object]:
    """Images per second of all loaders, in turns."""
    results = {}
    for workers in options.workers:
        found: dict[str, list[float]] = {"bare": [], "ours": [], "webdataset": [], "torchvision": []}
        for _ in range(options.repeats):
            with ThreadPoolExecutor(workers) as pool:
                shares = pool.map(lambda i, n=workers: measure_apart("bare", folder, str(i), str(n)), range(workers))
                found["bare"].append(sum(shares))
            for name in ("ours", "webdataset", "torchvision"):
                found[name].append(measure_apart(name, folder, str(workers)))
        median = {name: statistics.median(values) for name, values in found.items()}
        results[f"workers={workers}"] = {
            "images_per_second": median,
            "ours_over": {name: median["ours"] / median[name] for name in ("bare", "webdataset", "torchvision")},
        }
        print(results[f"workers={workers}"], flush=True)
    return results


def cpu_rate(folder: Path, name: str) -> float:
    """Images per second of CPU time for a loader without workers, over one epoch."""
    torch.set_num_threads(1)
    batches = iter(loader_of(name, folder, 0))
    next(batches)
    start = time.process_time()
    count = sum(len(batch["key"]) for batch in batches)
    return count / (time.process_time() - start)


def buckets(folder: str, repeats: int) -> dict[str, object]:
    """Squares and buckets in turns, by CPU time, which other programs on the machine change little."""
    found: dict[str, list[float]] = {"squares": [], "buckets": []}
    for _ in range(repeats):
        for name, rates in found.items():
            rates.append(measure_apart("cpu_rate", folder, name))
    rates = {name: statistics.median(values) for name, values in found.items()}
    ratio = rates["buckets"] / rates["squares"]
    return {"images_per_cpu_second": rates, "buckets_over_squares": ratio}


def main() -> None:
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), options.pictures)
        if options.buckets_only:
            write_results("loader", vars(options), {"buckets": buckets(folder, options.repeats)}, options.json)
            return
        results = throughput(folder, options)
        results["buckets"] = buckets(folder, options.repeats)
        found = {"false": [], "true": []}
        for _ in range(options.repeats):
            for name, rates in found.items():
                rates.append(measure_apart("fast_decode", folder, name))
        rates = {name: statistics.median(values) for name, values in found.items()}
        results["fast_decode"] = {"images_per_second": rates, "speedup": rates["true"] / rates["false"]}
        results["memory_mib"] = measure_apart("memory", folder, str(options.passes))
        for shards in (options.shards // 100, options.shards // 10, options.shards):
            place = Path(folder) / f"simulated{shards}"
            simulate(place, shards)
            results[f"{1000 * shards:,} samples"] = measure_apart("size", str(place))
    write_results("loader", vars(options), results, options.json)


if __name__ == "__main__":
    main()
