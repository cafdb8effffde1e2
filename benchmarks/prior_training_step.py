"""Peak memory and speed of a prior's training step: the chunked loss, all logits at once, PyTorch's chunked loss.

PyTorch's loss (`torch.nn.functional.linear_cross_entropy`, from 2.13 on) takes chunks of 512 and returns only the mean;
under autocast its inputs are cast to the half type, as autocast does by default.

Each setting runs in its own process, so that no peak hides another. Peak memory is the process's resident set on a CPU
and the allocator's maximum on a GPU; `baseline` is its value before the first step.

    python benchmarks/prior_training_step.py --json benchmarks/results/prior_training_step_cpu.json
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from report import measure_apart, peak_gib, synchronize, write_results

from flextok_pl.config import PriorConfig
from flextok_pl.models.prior import Prior
from flextok_pl.models.token_loss import token_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="85m")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--chunks", nargs="+", default=["512", "none", "torch"], help="positions, none or torch")
parser.add_argument("--repeats", type=int, default=2)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="autocast to this type")
parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
parser.add_argument("--measure", default=None, help="measure one setting and print it as JSON")
parser.add_argument("--json", default=None, help="file to write the results to")


def measure(options: argparse.Namespace) -> dict[str, float]:
    config = PriorConfig.preset(options.preset)
    torch.manual_seed(0)  # every setting starts from the same weights
    prior = Prior(config).to(options.device)
    prior.checkpoint_activations(options.checkpointing)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, config.num_tokens)
    tokens = torch.randint(config.vocab_size, shape, generator=generator).to(options.device)
    classes = torch.zeros(options.batch_size, dtype=torch.int64, device=options.device)
    dtype = getattr(torch, options.dtype)

    def loss_of(hidden: torch.Tensor) -> torch.Tensor:
        weight = prior.head.weight
        if options.measure == "torch":
            rows, chunks = hidden.flatten(0, 1).to(dtype), torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
            return F.linear_cross_entropy(rows, weight.to(dtype), tokens.flatten(), options=chunks)
        chunk = None if options.measure == "none" else int(options.measure)
        return token_loss(hidden, weight, tokens, chunk_size=chunk).loss

    baseline, seconds = peak_gib(options.device), []
    for repeat in range(options.repeats + 1):
        synchronize(options.device)
        start = time.perf_counter()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = loss_of(prior.hidden(tokens, classes))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(options.device)
        if repeat:
            seconds.append(time.perf_counter() - start)
    mean = sum(seconds) / len(seconds)
    return {
        "seconds_per_step": mean,
        "images_per_second": options.batch_size / mean,
        "baseline_gib": baseline,
        "peak_memory_gib": peak_gib(options.device),
        "loss": loss.item(),
    }


def main() -> None:
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return
    results = {}
    for chunk in options.chunks:
        results[f"chunk={chunk}"] = measure_apart(chunk)
    write_results("prior_training_step", vars(options), results, options.json)


if __name__ == "__main__":
    main()
