"""Images/s of writing latent and token shards, against the network alone on batches in memory.

Held-out pictures of the demo (`make data`), each in several augmented views, go through the demo's autoencoder and
tokenizer. `of_network` is the share of the network's speed that remains with decoding, augmentation, storing and
checksums.

    python benchmarks/precomputation.py --json benchmarks/results/precomputation_cpu.json
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from report import median_seconds, synchronize, write_results
from torch import Tensor

from flextok_pl import FlexTok
from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.contracts import weights_hash
from flextok_pl.data import ShardDataModule, write_latents, write_tokens

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", default="data/openmoji64/val", help="image shards")
parser.add_argument("--image-size", type=int, default=64)
parser.add_argument("--num-views", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--num-workers", type=int, default=1)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the networks")
parser.add_argument("--json", default=None, help="file to write the results to")


@torch.inference_mode()
def alone(network: Callable[[Tensor], Tensor], batches: list[Tensor], device: str) -> None:
    for batch in batches:
        network(batch)
    synchronize(device)


def write(writer: Callable[..., object], network: Callable[[Tensor], Tensor], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer(
            options.images,
            Path(folder) / "dst",
            network,
            image_size=options.image_size,
            num_views=options.num_views,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
        )


def main() -> None:
    options = parser.parse_args()
    tok = FlexTok.from_pretrained(DEMO_TOKENIZER, device=options.device)
    data = ShardDataModule(test=options.images, image_size=options.image_size, eval_batch_size=options.batch_size)
    batches = [batch["image"] for batch in data.test_dataloader()] * options.num_views
    identity = {"name": "demo", "sha256": weights_hash(tok)}
    tokens_id = {**identity, "vocab_size": tok.config.vocab_size, "num_tokens": tok.num_registers}
    networks: dict[str, Callable[[Tensor], Tensor]] = {
        "latents": lambda images: tok.vae.moments(images.to(options.device)).cpu(),
        "tokens": lambda images: tok.tokenize(images.to(options.device)).cpu(),
    }
    writers: dict[str, Callable[..., object]] = {
        "latents": partial(write_latents, source_id=identity),
        "tokens": partial(write_tokens, tokenizer_id=tokens_id),
    }
    calls: dict[str, Callable[[], object]] = {}
    for what, network in networks.items():
        calls[f"network of {what}"] = partial(alone, network, batches, options.device)
        calls[f"data {what}"] = partial(write, writers[what], network, options)
    seconds = median_seconds(calls, options.repeats, options.device)
    count = sum(len(batch) for batch in batches)
    results = {
        f"data {what}": {
            "images_per_second": count / seconds[f"data {what}"],
            "network_images_per_second": count / seconds[f"network of {what}"],
            "of_network": seconds[f"network of {what}"] / seconds[f"data {what}"],
        }
        for what in networks
    }
    write_results("precomputation", vars(options), results, options.json)


if __name__ == "__main__":
    main()
