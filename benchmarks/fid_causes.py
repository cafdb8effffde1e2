"""How much each known cause moves a Frechet distance: the same pictures or model, measured in another way.

Two settings, both on the features of `effnet-lite0` and with more samples than features (1,280):

- photos: Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist, MIT), from Debian's `dataset-fashion-mnist`.
  What is measured are test pictures, the reference are training pictures: two samples of one distribution.
- demo: the demo tokenizer on training pictures of the demo set, at 16 of 64 tokens. The reference are their originals.

Averaged against raw weights needs a training of the demo with its checkpoint, `--run`.

    apt-get install dataset-fashion-mnist && make data
    python benchmarks/fid_causes.py photos --json benchmarks/results/fid_causes_photos_cpu.json
    python benchmarks/fid_causes.py demo --run RUN --json benchmarks/results/fid_causes_demo_cpu.json
"""

import argparse
import gzip
import io
from collections.abc import Callable, Iterator
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
parser.add_argument("setting", choices=["photos", "demo"])
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
Pixels = Tensor  # (N, 3, H, W) uint8


class Distances:
    """Distances between sets of pictures, whose features are taken once."""

    def __init__(self, device: str) -> None:
        self.network = build_extractor("effnet-lite0").to(device)

    def features(self, pixels: Pixels) -> Tensor:
        """(N, 1280)."""
        return torch.cat([self.network(part).cpu() for part in pixels.split(BATCH)])

    def statistics(self, pixels: Pixels) -> FeatureStatistics:
        return features_to_statistics(self.features(pixels))


def each_picture(pixels: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    """Change each picture with Pillow."""
    changed = [np.asarray(change(Image.fromarray(each.permute(1, 2, 0).numpy()))) for each in pixels]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()


def as_jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return change


def cropped(image: Image.Image) -> Image.Image:
    """The centre 7/8, brought back to the size, as `Resize(256)` and `CenterCrop(224)` do to a photo."""
    side = image.width
    margin = side / 16
    box = (margin, margin, side - margin, side - margin)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def photos(folder: Path, name: str, count: int) -> Pixels:
    """The first pictures of Fashion-MNIST's `train` or `t10k`."""
    content = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    levels = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:count]
    return torch.from_numpy(levels.copy())[:, None].expand(-1, 3, -1, -1).contiguous()


def row(name: str, usual: float, other: float) -> dict[str, float]:
    found = {"usual": usual, "other": other, "difference": other - usual}
    print(f"{name:<52}{usual:10.3f}{other:10.3f}{other - usual:+10.3f}", flush=True)
    return found


def of_photos(options: argparse.Namespace, distances: Distances) -> Iterator[tuple[str, dict[str, float]]]:
    """Causes that need no model."""
    count, folder = options.photo_count, Path(options.photos)
    of_training = photos(folder, "train", 2 * count)
    tested = photos(folder, "t10k", count)
    first, second, own = (distances.features(each) for each in (of_training[:count], of_training[count:], tested))
    reference = features_to_statistics(first)
    usual = frechet_distance(reference, features_to_statistics(own))

    def changed(name: str, change: Callable[[Image.Image], Image.Image]) -> tuple[str, dict[str, float]]:
        other = frechet_distance(reference, distances.statistics(each_picture(tested, change)))
        return name, row(name, usual, other)

    other = frechet_distance(reference, features_to_statistics(second))
    yield "reference: training against other training pictures", row("training set against itself", usual, other)
    other = frechet_distance(features_to_statistics(own), features_to_statistics(own))
    yield "reference: the measured pictures themselves", row("against the measured pictures", usual, other)
    for share in (0.3, 0.4, 0.5, 0.75):
        n = int(share * count)
        other = frechet_distance(features_to_statistics(first[:n]), features_to_statistics(own[:n]))
        yield f"N {n} on either side", row(f"N = {n} on either side", usual, other)
    for share in (0.3, 0.5):
        n = int(share * count)
        other = frechet_distance(reference, features_to_statistics(own[:n]))
        yield f"N {n} measured", row(f"N = {n} measured, the whole reference", usual, other)
    yield changed("crop: centre 7/8 of the measured pictures only", cropped)
    yield changed("JPEG of quality 95", as_jpeg(95))
    yield changed("JPEG of quality 75", as_jpeg(75))


def of_demo(options: argparse.Namespace, distances: Distances) -> Iterator[tuple[str, dict[str, float]]]:
    """Causes that lie in a tokenizer's decoding, and in how pictures are made small."""
    count, device = options.demo_count, options.device
    data = ShardDataModule(val=options.data, image_size=64, eval_batch_size=BATCH, num_workers=0, val_limit=count)
    batches = list(data.val_dataloader())
    originals = torch.cat([to_uint8(batch["image"]) for batch in batches])
    reference = distances.statistics(originals)
    usual_decoding = {
        "num_steps": options.num_steps,
        "guidance": "cfg",
        "guidance_scale": options.guidance_scale,
    }
    tok = FlexTok.from_pretrained(DEMO_TOKENIZER, device=device)
    tokens = {id(tok): [tok.tokenize(batch["image"].to(device)) for batch in batches]}

    def latents(made_by: FlexTok, seed: int = 0, **changes: object) -> Tensor:
        """All pictures' latents, from their first tokens."""
        how, parts = usual_decoding | changes, []
        for batch, each in zip(batches, tokens[id(made_by)], strict=True):
            noise = sample_generators(batch["key"], seed)
            parts.append(made_by.sample_latents(each, options.num_tokens, generator=noise, **how))
        return torch.cat(parts)

    def images(latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, 3, H, W) around [-1, 1]."""
        with torch.no_grad(), frozen_networks_in(dtype):
            return torch.cat([tok.require_vae().decode(part).cpu() for part in latents.split(BATCH)])

    def distance(pixels: Pixels) -> float:
        return frechet_distance(reference, distances.statistics(pixels))

    def decoded(made_by: FlexTok, seed: int = 0, **changes: object) -> Pixels:
        return to_uint8(images(latents(made_by, seed, **changes)))

    own = latents(tok)
    whole = images(own)
    usual = distance(to_uint8(whole))
    truncated = whole.clamp(-1, 1).add(1).mul(127.5).to(torch.uint8)  # what `.byte()` does after a scaling
    yield "rounding: truncated to 8 bits", row("truncated to 8 bits", usual, distance(truncated))
    other = distance(to_uint8(images(own, torch.bfloat16)))
    yield "autoencoder decodes in bfloat16", row("autoencoder in bfloat16", usual, other)
    for seed in (1, 2):
        yield f"seed {seed}", row(f"seed {seed} of the noise", usual, distance(decoded(tok, seed)))
    for steps in (4, 25):
        other = distance(decoded(tok, num_steps=steps))
        yield f"{steps} steps", row(f"{steps} steps in place of {options.num_steps}", usual, other)
    for guidance, scale in (("none", 1.0), ("cfg", 1.5), ("apg", 7.5)):
        other = distance(decoded(tok, guidance=guidance, guidance_scale=scale))
        yield f"guidance {guidance} {scale}", row(f"guidance {guidance} {scale:g}", usual, other)
    if options.run is not None:
        state = torch.load(Path(options.run) / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
        found = []
        for weights in (state["state_dict"], state["current_model_state"]):
            made = FlexTok.from_pretrained(Path(options.run) / "tokenizer.safetensors", device=device)
            of_model = {n.removeprefix("tokenizer."): w for n, w in weights.items() if n.startswith("tokenizer.")}
            made.load_state_dict(of_model, strict=False)
            tokens[id(made)] = [made.tokenize(batch["image"].to(device)) for batch in batches]
            found.append(distance(decoded(made)))
        yield f"raw weights of step {state['global_step']}", row("raw in place of averaged weights", *found)
    yield from of_sizes(count, distances)


def of_sizes(count: int, distances: Distances) -> Iterator[tuple[str, dict[str, float]]]:
    """Pictures made small by one filter against the same ones made small by another."""
    files, _ = render(list_pictures()[:count], 256, 0)
    large = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]))
    large = large.permute(0, 3, 1, 2).contiguous()
    side = (64, 64)
    usual = distances.statistics(each_picture(large, lambda image: image.resize(side, Image.Resampling.BICUBIC)))

    def interpolated(mode: str) -> Pixels:
        """As torch does unless told otherwise: without antialiasing."""
        parts = [torch.nn.functional.interpolate(each.float(), side, mode=mode) for each in large.split(BATCH)]
        return torch.cat(parts).round().clamp(0, 255).to(torch.uint8)

    filters = {
        "Pillow bilinear": lambda: each_picture(large, lambda image: image.resize(side, Image.Resampling.BILINEAR)),
        "Pillow Lanczos": lambda: each_picture(large, lambda image: image.resize(side, Image.Resampling.LANCZOS)),
        "torch bilinear without antialias": lambda: interpolated("bilinear"),
        "nearest": lambda: interpolated("nearest"),
    }
    for name, made in filters.items():
        other = frechet_distance(usual, distances.statistics(made()))
        yield f"resize: {name}", row(f"{name}, against Pillow's bicubic", 0.0, other)


def main() -> None:
    options = parser.parse_args()
    distances = Distances(options.device)
    print(f"{'cause':<52}{'usual':>10}{'other':>10}{'moves':>10}")
    measured = of_photos if options.setting == "photos" else of_demo
    results = dict(measured(options, distances))
    write_results(f"fid_causes {options.setting}", vars(options), results, options.json)


if __name__ == "__main__":
    main()
