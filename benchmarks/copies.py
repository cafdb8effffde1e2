"""How many generated pictures are copies of training pictures?

A picture's distance is that to its nearest training picture, in the features of a network. Held-out pictures, decoded
from their own tokens, show which distances are usual without memory. A generated picture counts as a copy where it is
nearer than 95 % of them: 0.05 is what no memory at all would give.

    python benchmarks/copies.py --json benchmarks/results/copies_demo_cpu.json
"""

import argparse
from pathlib import Path

import torch
from report import write_results
from torch import Tensor

from flextok_pl import DEMO_PRIOR, DEMO_TOKENIZER, FlexTok, Prior
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.data.pictures import open_pictures
from flextok_pl.evaluation.pictures import image_grid, save_png
from flextok_pl.metrics.images import to_uint8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prior", default=None, help="prior of classes; default the demo's")
parser.add_argument("--tokenizer", default=None, help="default the demo's")
parser.add_argument("--train", default="data/openmoji64/train", help="pictures that the prior was trained on")
parser.add_argument("--held-out", default="data/openmoji64/val", help="pictures that it was not trained on")
parser.add_argument("--budgets", type=int, nargs="+", default=[1, 4, 16, 64])
parser.add_argument("--samples", type=int, default=192, help="generated pictures, as many of each class")
parser.add_argument("--shown", type=int, default=9, help="pictures in --out: the first, with all tokens")
parser.add_argument("--cfg-scale", type=float, default=2.5)
parser.add_argument("--temperature", type=float, default=0.6)
parser.add_argument("--steps", type=int, default=5, help="of the decoder")
parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the decoder, `cfg`")
parser.add_argument("--extractor", default="effnet-lite0")
parser.add_argument("--device", default="cpu")
parser.add_argument("--json", default=None, help="file to write the results to")
parser.add_argument("--out", default="runs/copies.png", help="generated pictures and their nearest training pictures")


def main() -> None:
    options = parser.parse_args()
    tokenizer = FlexTok.from_pretrained(options.tokenizer or DEMO_TOKENIZER)
    prior = Prior.from_pretrained(options.prior or DEMO_PRIOR)
    extractor = build_extractor(options.extractor)

    def features(images: Tensor) -> Tensor:
        return torch.cat([extractor(to_uint8(batch)) for batch in images.split(64)])

    def decoded(tokens: Tensor, budget: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        how = {"num_steps": options.steps, "guidance": "cfg", "guidance_scale": options.guidance_scale}
        return torch.cat([tokenizer.detokenize(t, budget, generator=generator, **how) for t in tokens.split(64)])

    config = tokenizer.config
    size = [side * config.patch_pixels for side in config.grids[0]]
    training, held_out = (read(source, size) for source in (options.train, options.held_out))
    known = features(training)
    classes = torch.arange(options.samples) % prior.config.num_classes
    generator = torch.Generator().manual_seed(0)
    made = prior.generate(classes, cfg_scale=options.cfg_scale, temperature=options.temperature, generator=generator)
    own = tokenizer.tokenize(held_out)
    rows = {}
    for budget in options.budgets:
        pictures = decoded(made, budget)
        distances, nearest = torch.cdist(features(pictures), known).min(1)
        usual = torch.cdist(features(decoded(own, budget)), known).min(1).values
        bound = usual.quantile(0.05)
        rows[budget] = {
            "copies": float((distances < bound).double().mean()),
            "median_distance": float(distances.median()),
            "median_distance_held_out": float(usual.median()),
            "bound": float(bound),
        }
        print(f"{budget:4d} tokens: {rows[budget]}", flush=True)
    shown = slice(options.shown)
    save_png(image_grid([("generated", pictures[shown]), ("nearest", training[nearest[shown]])]), Path(options.out))
    write_results("copies", vars(options), {"budgets": rows}, options.json)


def read(source: str, size: list[int]) -> Tensor:
    """The pictures of a shard set or a folder: (N, 3, H, W) in [-1, 1]."""
    loader, _ = open_pictures(source, size, batch_size=256)
    return torch.cat([batch["image"] for batch in loader])


if __name__ == "__main__":
    with torch.inference_mode():
        main()
