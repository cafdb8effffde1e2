"""Samples/s of the parts of webdataset and of our equivalents: reading tars, writing them, decoding, fetching.

4,000 small samples (a JPEG of 64 x 64 pixels and a label) are in four tars, on the local disk and in its cache. All
parts take turns in one process and use the same files. `fetch` copies a tar through the shell command `cat`.

    python benchmarks/webdataset_parts.py --json benchmarks/results/webdataset_parts_cpu.json
"""

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from report import median_seconds, write_results
from webdataset.autodecode import imagehandler
from webdataset.tariterators import group_by_keys, tar_file_expander

from flextok_pl.data.shards.index import ShardIndex
from flextok_pl.data.shards.open_shards import Shard
from flextok_pl.data.shards.remote import Remote
from flextok_pl.data.shards.writer import Sample, shard_name, write_index, write_shard
from flextok_pl.data.transforms import decode_image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--samples", type=int, default=1000, help="per tar")
parser.add_argument("--repeats", type=int, default=7)
parser.add_argument("--device", default="cpu", choices=["cpu"])
parser.add_argument("--json", default=None, help="file to write the results to")
TARS = 4


def samples(tar: int, number: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(tar)
    for i in range(number):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((64, 64)).save(buffer, "JPEG", quality=90)
        yield Sample(f"{tar}-{i:06d}", {"jpg": buffer.getvalue(), "cls": b"3"})


def theirs_in_order(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])):
                assert sample["jpg"] and sample["cls"]


def ours(index: ShardIndex, permuted: bool) -> None:
    for number, shard in enumerate(index.shards):
        opened = Shard(index, number)
        for i in torch.randperm(shard.count).tolist() if permuted else range(shard.count):
            sample = opened.read(i)
            assert sample["jpg"] and sample["cls"]
        opened.close()


def theirs_written(folder: Path, content: list[Sample]) -> None:
    with wds.TarWriter(str(folder / "theirs.tar")) as tar:
        for sample in content:
            tar.write({"__key__": sample.key, **sample.files})


def ours_written(folder: Path, content: list[Sample]) -> None:
    write_shard(folder / shard_name(0), content)


def decoded(decode: Callable[[bytes], Any], content: list[Sample]) -> None:
    for sample in content:
        decode(sample.files["jpg"])


def theirs_fetched(folder: Path, path: Path) -> None:
    with wds.gopen(f"pipe:cat {path}") as stream, (folder / "fetched.tar").open("wb") as file:
        while chunk := stream.read(2**20):
            file.write(chunk)


def ours_fetched(index: ShardIndex) -> None:
    Remote(f"pipe:cat {index.folder}/{{name}}").open(index.shards[0], index.folder).close()


def main() -> None:
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, number = Path(name) / "set", options.samples
        folder.mkdir()
        shards = [write_shard(folder / shard_name(tar), samples(tar, number)) for tar in range(TARS)]
        index = write_index(ShardIndex(folder, ("image", "label"), tuple(shards), tuple("abcd"), 64))
        content = list(samples(0, number))
        calls: dict[str, tuple[int, Callable[[], object]]] = {
            "read in order, theirs": (TARS * number, partial(theirs_in_order, index.paths)),
            "read in order, ours": (TARS * number, partial(ours, index, False)),
            "read permuted, ours": (TARS * number, partial(ours, index, True)),
            "write, theirs": (number, partial(theirs_written, Path(name), content)),
            "write, ours": (number, partial(ours_written, Path(name), content)),
            "decode, theirs": (number, partial(decoded, lambda data: imagehandler("pilrgb")("jpg", data), content)),
            "decode, ours": (number, partial(decoded, decode_image, content)),
            "fetch, theirs": (number, partial(theirs_fetched, Path(name), index.paths[0])),
            "fetch, ours": (number, partial(ours_fetched, index)),
        }
        seconds = median_seconds({call: run for call, (_, run) in calls.items()}, options.repeats, options.device)
    results = {call: {"samples_per_second": count / seconds[call]} for call, (count, _) in calls.items()}
    write_results("webdataset_parts", vars(options), results, options.json)


if __name__ == "__main__":
    main()
