"""Speed and peak memory of one tokenizer training step on latents.

One forward and backward pass and AdamW update of a published architecture with random weights, with the batch in one
part and sorted into parts by budget (`budget_groups`), which gives the same gradients. The first step is not timed, and
with `--compile` all are taken once before. Operations are those that MFU counts, expected over the budgets. Peak memory
is the process's resident set on a CPU and the allocator's maximum on a GPU.

    python benchmarks/training_step.py --json benchmarks/results/training_step_cpu.json
"""

import argparse
import dataclasses
import time

import torch
from report import peak_gib, synchronize, write_results

from flextok_pl.config import FlexTokConfig
from flextok_pl.cost.models import tokenizer_flops
from flextok_pl.layers.blocks import compile_for_all_lengths
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.tokenizer import FlexTok

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="d12_d12")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--budget-groups", type=int, nargs="+", default=[1, 4])
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="autocast to this type")
parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
parser.add_argument("--compile", action="store_true", help="torch.compile every block")
parser.add_argument("--json", default=None, help="file to write the results to")


def main() -> None:
    options = parser.parse_args()
    config = dataclasses.replace(FlexTokConfig.preset(options.preset), vae=None)
    tokenizer = FlexTok(config).to(options.device)
    tokenizer.checkpoint_activations(options.checkpointing)
    if options.compile:
        for part in (tokenizer.encoder, tokenizer.decoder):
            compile_for_all_lengths(part.blocks)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-4)
    size = (options.batch_size, config.latent_channels, *tokenizer.latent_size)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(options.device)

    def step(generator: torch.Generator, groups: int) -> float:
        synchronize(options.device)
        start = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            draws = sample_draws(config, latents, generator)
            loss = flow_loss(tokenizer, latents, draws, budget_groups=groups).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(options.device)
        return time.perf_counter() - start

    results = {}
    for groups in options.budget_groups:
        for _ in range(2 if options.compile else 1):  # the first time compiles for the lengths to come
            generator = torch.Generator().manual_seed(1)  # the same budgets for every setting
            seconds = [step(generator, groups) for _ in range(options.repeats + 1)][1:]
        mean = sum(seconds) / len(seconds)
        operations = tokenizer_flops(config, options.batch_size, groups).training * options.batch_size
        results[f"budget_groups={groups}"] = {
            "seconds_per_step": mean,
            "images_per_second": options.batch_size / mean,
            "tflops_per_second": operations / mean / 1e12,
        }
    results["peak_memory_gib"] = peak_gib(options.device)
    results["parameters"] = sum(p.numel() for p in tokenizer.parameters())
    write_results("training_step", vars(options), results, options.json)


if __name__ == "__main__":
    main()
