"""Milliseconds per image of the autoencoder, against diffusers' pass, which the published code uses.

Both have the same random weights of the published architecture, or those of `--vae`. They take turns at `encode`,
images to moments, and `decode`, latents to images, in float32. `--compare-bfloat16` adds our passes as under `flextok
data latents --compute_dtype bfloat16`. `difference` is the largest difference, as a share of diffusers' largest value.

    python benchmarks/autoencoder.py --batch-sizes 1 2 4 8 --json benchmarks/results/autoencoder_cpu.json
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from report import median_seconds, write_results
from torch import Tensor

from flextok_pl.config import VAEConfig
from flextok_pl.models.vae import VAE
from flextok_pl.precision import frozen_networks_in, full_precision

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--vae", help="folder of an autoencoder; default the published architecture with random weights")
parser.add_argument("--image-size", type=int, default=256)
parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--compare-bfloat16", action="store_true")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", default=None, help="file to write the results to")


@torch.inference_mode()
def computed(network: Callable[[Tensor], Tensor], inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    with frozen_networks_in(dtype), full_precision(inputs.device):
        return network(inputs)


def main() -> None:
    options = parser.parse_args()
    torch.manual_seed(0)
    vae = VAE(VAEConfig(scaling_factor=1.0)) if options.vae is None else VAE.from_pretrained(options.vae)
    vae = vae.rescaled(1.0).eval().requires_grad_(False).to(options.device)  # latents in diffusers' scaling
    side, size = options.image_size // vae.config.downsampling, options.image_size
    parts: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "encode": (vae.moments, lambda images: vae.network.encode(images).latent_dist.parameters),
        "decode": (vae.decode, lambda latents: vae.network.decode(latents).sample),
    }
    results: dict[str, Any] = {}
    for batch in options.batch_sizes:
        inputs = {
            "encode": torch.rand(batch, 3, size, size, device=options.device) * 2 - 1,
            "decode": torch.randn(batch, vae.config.latent_channels, side, side, device=options.device),
        }
        for part, (ours, theirs) in parts.items():
            calls = {
                "ours": partial(computed, ours, inputs[part]),
                "diffusers": partial(computed, theirs, inputs[part]),
            }
            if options.compare_bfloat16:
                calls["ours in bfloat16"] = partial(computed, ours, inputs[part], torch.bfloat16)
            # `parameters` holds the log-variance before it is clamped, so only means are compared.
            found = {
                who: call()[:, : 3 if part == "decode" else vae.config.latent_channels] for who, call in calls.items()
            }
            largest = found["diffusers"].abs().max()
            seconds = median_seconds(calls, options.repeats, options.device)
            results[f"{part}, batch {batch}"] = {
                "milliseconds_per_image": {who: 1000 * time / batch for who, time in seconds.items()},
                "speedup_over_diffusers": seconds["diffusers"] / seconds["ours"],
                "difference": {
                    who: ((value - found["diffusers"]).abs().max() / largest).item()
                    for who, value in found.items()
                    if who != "diffusers"
                },
            }
            print(f"{part}, batch {batch}", results[f"{part}, batch {batch}"], flush=True)
    write_results("autoencoder", vars(options), results, options.json)


if __name__ == "__main__":
    main()
