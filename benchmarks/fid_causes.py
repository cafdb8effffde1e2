"""How much each known cause changes a Frechet distance: the same pictures or model, measured in another way.

There are four settings, all on features of `effnet-lite0` and with more samples than features (1,280):

- photos: Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist, MIT), from Debian's `dataset-fashion-mnist`.
  Test pictures are measured against training pictures: two samples of one distribution.
- demo: reconstructions by the demo tokenizer, at 16 of 64 tokens, of the demo set's training pictures, against these.
- averaging: the same with averaged and with raw weights of a training of the demo, `--run`.
- sizes: pictures of the demo, shrunk from 256 px by two different filters.

The file of results keeps finished measurements; the same command resumes from there.

    apt-get install dataset-fashion-mnist && make data
    python benchmarks/fid_causes.py photos --json benchmarks/results/fid_causes_photos_cpu.json
    python benchmarks/fid_causes.py averaging --run RUN --json benchmarks/results/fid_causes_averaging_cpu.json
"""

import argparse
import gzip
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import write_results
from torch import Tensor

from flextok_pl import DEMO_TOKENIZER, FlexTok, ShardDataModule
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.data.convert.demo import render
from flextok_pl.data.convert.openmoji import list_pictures
from flextok_pl.keys import sample_generators
from flextok_pl.metrics.frechet import FeatureStatistics, features_to_statistics, frechet_distance
from flextok_pl.metrics.images import to_uint8
from flextok_pl.precision import frozen_networks_in

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("setting", choices=["photos", "demo", "averaging", "sizes"])
parser.add_argument("--photos", default="/usr/share/datasets/fashion-mnist", help="folder with Fashion-MNIST's files")
parser.add_argument("--data", default="data/openmoji64/train")
parser.add_argument("--run", default=None, help="a run of experiments/tokenizer/demo.yaml with its checkpoint")
parser.add_argument("--photo-count", type=int, default=5000)
parser.add_argument("--demo-count", type=int, default=1400)
parser.add_argument("--num-tokens", type=int, default=16)
parser.add_argument("--num-steps", type=int, default=8)
parser.add_argument("--guidance-scale", type=float, default=2.0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", default=None, help="file to write the results to")

BATCH = 64
USUAL = "as usual"
Pixels = Tensor  # (N, 3, H, W) uint8
Change = Callable[[Image.Image], Image.Image]


class Network:
    """A feature network."""

    def __init__(self, device: str) -> None:
        self.network = build_extractor("effnet-lite0").to(device)

    def features(self, pixels: Pixels) -> Tensor:
        """(N, 1280)."""
        return torch.cat([self.network(part).cpu() for part in pixels.split(BATCH)])

    def statistics(self, pixels: Pixels) -> FeatureStatistics:
        return features_to_statistics(self.features(pixels))


def each_picture(pixels: Pixels, change: Change) -> Pixels:
    """Change each picture with Pillow."""
    changed = [np.asarray(change(Image.fromarray(each.permute(1, 2, 0).numpy()))) for each in pixels]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()


def as_jpeg(quality: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


def cropped(image: Image.Image) -> Image.Image:
    """The centre 7/8, resized to the original size, as `Resize(256)` and `CenterCrop(224)` do with a photo."""
    side = image.width
    margin = side / 16
    box = (margin, margin, side - margin, side - margin)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def photos(folder: Path, name: str, count: int) -> Pixels:
    """The first pictures of Fashion-MNIST's `train` or `t10k`."""
    content = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    levels = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:count]
    return torch.from_numpy(levels.copy())[:, None].expand(-1, 3, -1, -1).contiguous()


class Table:
    """Measured distances, kept in the file of results for resuming."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, file = options, Path(options.json or "")
        self.values: dict[str, float] = json.loads(file.read_text())["results"] if file.is_file() else {}

    def measure(self, name: str, distance: Callable[[], float]) -> None:
        if name not in self.values:
            self.values[name] = distance()
            with redirect_stdout(io.StringIO()):
                write_results(f"fid_causes {self.options.setting}", vars(self.options), self.values, self.options.json)
        usual = self.values[USUAL]
        print(f"{name:<56}{self.values[name]:10.3f}{self.values[name] - usual:+10.3f}", flush=True)


def of_photos(options: argparse.Namespace, network: Network, table: Table) -> None:
    """Measure causes that need no model."""
    count, folder = options.photo_count, Path(options.photos)
    of_training, tested = photos(folder, "train", 2 * count), photos(folder, "t10k", count)
    parts = {"first": of_training[:count], "second": of_training[count:], "own": tested}

    @cache
    def features(name: str) -> Tensor:
        return network.features(parts[name])

    def between(one: str, other: str, measured: int = count, reference: int = count) -> Callable[[], float]:
        return lambda: frechet_distance(
            features_to_statistics(features(one)[:reference]), features_to_statistics(features(other)[:measured])
        )

    def changed(change: Change) -> Callable[[], float]:
        return lambda: frechet_distance(
            features_to_statistics(features("first")), network.statistics(each_picture(tested, change))
        )

    table.measure(USUAL, between("first", "own"))
    table.measure("measured: other training pictures", between("first", "second"))
    table.measure("reference: the measured pictures themselves", between("own", "own"))
    for n in (int(share * count) for share in (0.3, 0.4, 0.5, 0.75)):
        table.measure(f"N: {n} on either side", between("first", "own", n, n))
    for n in (int(share * count) for share in (0.3, 0.5)):
        table.measure(f"N: {n} measured, {count} of the reference", between("first", "own", n))
    table.measure("crop: centre 7/8 of the measured pictures only", changed(cropped))
    for quality in (95, 75):
        table.measure(f"JPEG of quality {quality}", changed(as_jpeg(quality)))


class Demo:
    """Pictures of the demo, and their reconstructions."""

    def __init__(self, options: argparse.Namespace, network: Network) -> None:
        self.options, self.network = options, network
        data = ShardDataModule(
            val=options.data, image_size=64, eval_batch_size=BATCH, num_workers=0, val_limit=options.demo_count
        )
        self.batches = list(data.val_dataloader())
        self.usual = {"num_steps": options.num_steps, "guidance": "cfg", "guidance_scale": options.guidance_scale}

    @cached_property
    def reference(self) -> FeatureStatistics:
        return self.network.statistics(torch.cat([to_uint8(batch["image"]) for batch in self.batches]))

    def distance(self, images: Tensor) -> float:
        """Distance of (N, 3, H, W) pictures, uint8 or around [-1, 1], from the originals."""
        pixels = to_uint8(images) if images.is_floating_point() else images
        return frechet_distance(self.reference, self.network.statistics(pixels))

    def decoded(self, tok: FlexTok, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Tensor:
        """(N, 3, H, W) around [-1, 1], from the first tokens; `dtype` is the autoencoder's."""
        how, parts = self.usual | changes, []
        for batch in self.batches:
            tokens = tok.tokenize(batch["image"].to(tok.device), self.options.num_tokens)
            latents = tok.sample_latents(tokens, generator=sample_generators(batch["key"], seed), **how)
            with torch.no_grad(), frozen_networks_in(dtype):
                parts.append(tok.require_vae().decode(latents).cpu())
        return torch.cat(parts)


def of_demo(options: argparse.Namespace, network: Network, table: Table) -> None:
    """Measure causes in a tokenizer's decoding."""
    demo, tok = Demo(options, network), FlexTok.from_pretrained(DEMO_TOKENIZER, device=options.device)

    def measure(name: str, **changes: object) -> None:
        table.measure(name, lambda: demo.distance(demo.decoded(tok, **changes)))

    def truncated() -> float:
        return demo.distance(demo.decoded(tok).clamp(-1, 1).add(1).mul(127.5).to(torch.uint8))  # like `.byte()`

    measure(USUAL)
    table.measure("rounding: truncated to 8 bits", truncated)
    measure("autoencoder decodes in bfloat16", dtype=torch.bfloat16)
    for seed in (1, 2):
        measure(f"seed {seed}", seed=seed)
    for steps in (4, 25):
        measure(f"{steps} steps", num_steps=steps)
    for guidance, scale in (("none", 1.0), ("cfg", 1.5), ("apg", 7.5)):
        measure(f"guidance {guidance} {scale:g}", guidance=guidance, guidance_scale=scale)


def of_averaging(options: argparse.Namespace, network: Network, table: Table) -> None:
    """Measure averaged and raw weights of a run's newest checkpoint."""
    if options.run is None:
        raise SystemExit("averaging needs --run, the folder of a run with tokenizer.safetensors and a checkpoint")
    demo, folder = Demo(options, network), Path(options.run)
    state = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    for name, part in ((USUAL, "state_dict"), (f"raw weights of step {state['global_step']}", "current_model_state")):
        tok = FlexTok.from_pretrained(folder / "tokenizer.safetensors", device=options.device)
        weights = {n.removeprefix("tokenizer."): w for n, w in state[part].items() if n.startswith("tokenizer.")}
        tok.load_state_dict(weights, strict=False)  # without the autoencoder
        table.measure(name, lambda tok=tok: demo.distance(demo.decoded(tok)))


def of_sizes(options: argparse.Namespace, network: Network, table: Table) -> None:
    """Compare pictures shrunk by one filter with the same pictures shrunk by another."""
    files, _ = render(list_pictures()[: options.demo_count], 256, 0)
    large = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]))
    large = large.permute(0, 3, 1, 2).contiguous()
    side = (64, 64)

    def of_pillow(resampling: Image.Resampling) -> Pixels:
        return each_picture(large, lambda image: image.resize(side, resampling))

    def of_torch(mode: str) -> Pixels:
        """Torch's default: without antialiasing."""
        parts = [torch.nn.functional.interpolate(each.float(), side, mode=mode) for each in large.split(BATCH)]
        return torch.cat(parts).round().clamp(0, 255).to(torch.uint8)

    usual = network.statistics(of_pillow(Image.Resampling.BICUBIC))
    filters: dict[str, Callable[[], Pixels]] = {
        USUAL: lambda: of_pillow(Image.Resampling.BICUBIC),
        "Pillow bilinear": lambda: of_pillow(Image.Resampling.BILINEAR),
        "Pillow Lanczos": lambda: of_pillow(Image.Resampling.LANCZOS),
        "torch bilinear without antialias": lambda: of_torch("bilinear"),
        "nearest": lambda: of_torch("nearest"),
    }
    for name, made in filters.items():
        table.measure(name, lambda made=made: frechet_distance(usual, network.statistics(made())))


SETTINGS = {"photos": of_photos, "demo": of_demo, "averaging": of_averaging, "sizes": of_sizes}


def main() -> None:
    options = parser.parse_args()
    SETTINGS[options.setting](options, Network(options.device), Table(options))


if __name__ == "__main__":
    main()
