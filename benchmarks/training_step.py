"""Speed and peak memory of one tokenizer training step on latents.

A step is a forward and backward pass and an AdamW update of a published architecture with random weights, under laws of
the budgets, which are drawn in equal strata. `--compile` compiles nothing, each block, or whole encoder and decoder;
the first step, which then compiles, is timed separately. Operations are those counted for MFU, expected over the
budgets. Peak memory is the process's resident set on a CPU and the allocator's maximum on a GPU.

    python benchmarks/training_step.py --json benchmarks/results/training_step_cpu.json
"""

import argparse
import dataclasses
import itertools
import time
from typing import Any

import torch
from report import peak_gib, synchronize, write_results

from flextok_pl.config import FlexTokConfig
from flextok_pl.cost.models import tokenizer_flops
from flextok_pl.flow.nested_dropout import BUDGET_LAWS
from flextok_pl.layers.blocks import compile_for_all_lengths
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.tokenizer import FlexTok

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="d12_d12")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--laws", nargs="+", default=["uniform", "pow2"], choices=BUDGET_LAWS)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="autocast to this type")
parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
parser.add_argument("--compile", nargs="+", default=["nothing"], choices=["nothing", "blocks", "whole"])
parser.add_argument("--json", default=None, help="file to write the results to")


def steps(options: argparse.Namespace, tokenizer: FlexTok) -> list[float]:
    """Seconds of each step."""
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-4, fused=True)
    size = (options.batch_size, tokenizer.config.latent_channels, *tokenizer.latent_size)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(options.device)
    generator, seconds = torch.Generator().manual_seed(1), []
    for _ in range(options.repeats + 1):
        synchronize(options.device)
        start = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            draws = sample_draws(tokenizer.config, latents, generator, stratified_budgets=True)
            loss = flow_loss(tokenizer, latents, draws).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(options.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    options = parser.parse_args()
    preset = dataclasses.replace(FlexTokConfig.preset(options.preset), vae=None)
    results: dict[str, Any] = {}
    for law, compiled in itertools.product(options.laws, options.compile):
        config = dataclasses.replace(preset, nested_dropout=law)
        torch.compiler.reset()
        tokenizer = FlexTok(config).to(options.device)
        tokenizer.checkpoint_activations(options.checkpointing)
        for part in (tokenizer.encoder, tokenizer.decoder):
            if compiled == "blocks":
                compile_for_all_lengths(part.blocks)
            elif compiled == "whole":
                part.compile(dynamic=True)
        first, *seconds = steps(options, tokenizer)
        mean = sum(seconds) / len(seconds)
        operations = tokenizer_flops(config).training * options.batch_size
        results[law if compiled == "nothing" else f"{law}, compiled {compiled}"] = {
            "seconds_of_first_step": first,
            "seconds_per_step": mean,
            "images_per_second": options.batch_size / mean,
            "tflops_per_second": operations / mean / 1e12,
        }
        print(results, flush=True)
    results["peak_memory_gib"] = peak_gib(options.device)
    write_results("training_step", vars(options), results, options.json)


if __name__ == "__main__":
    main()
