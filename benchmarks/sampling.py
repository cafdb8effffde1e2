"""Speed of sampling from a prior with a cache: against transformers' `generate`, and against no cache.

The peer is transformers' Llama of the same width, depth and vocabulary under `generate` with a static cache, sampling
from the whole vocabulary at temperature 1. Its blocks are the same, except rotary positions instead of learned ones.
Both have random weights and draw the same number of tokens. With guidance, ours computes both halves as one batch; the
peer's `guidance_scale` runs two passes. Without a cache each token costs a pass over all earlier tokens. That loop runs
at only three lengths, and its total is the sum of the quadratic through them.

    python benchmarks/sampling.py --presets 49m --json benchmarks/results/sampling_49m_cpu.json
"""

import argparse
import time
from functools import partial

import numpy as np
import torch
from report import synchronize, write_results

from flextok_pl.config import PriorConfig
from flextok_pl.models.prior import Prior
from flextok_pl.models.sampling import draw_tokens, filter_logits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--presets", nargs="+", default=["49m", "201m"])
parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
parser.add_argument("--cfg-scales", nargs="+", type=float, default=[1.0, 1.5])
parser.add_argument("--num-tokens", type=int, default=256)
parser.add_argument("--repeats", type=int, default=1)
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="type of the weights")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", default=None, help="file to write the results to")


def peer_of(config: PriorConfig, cfg_scale: float, num_tokens: int):
    """Transformers' model, and a function that samples a batch from it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=int(2 * int(config.mlp_ratio * config.width) / 3),
            num_hidden_layers=config.depth,
            num_attention_heads=config.width // config.head_dim,
            max_position_embeddings=config.num_tokens + 1,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    ).eval()

    def sample(batch: int) -> torch.Tensor:
        start = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        guidance = {} if cfg_scale == 1.0 else {"guidance_scale": cfg_scale, "negative_prompt_ids": start}
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=True,
            top_k=0,
            cache_implementation="static",
            disable_compile=True,
            **guidance,
        )

    return model, sample


def seconds(call, repeats: int, device: str) -> float:
    best = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best.append(time.perf_counter() - start)
    return sorted(best)[len(best) // 2]


@torch.no_grad()
def without_cache(prior: Prior, batch: int, cfg_scale: float, num_tokens: int, repeats: int, device: str) -> float:
    """Estimated seconds of a loop of whole passes."""
    rows = batch * (2 if cfg_scale != 1.0 else 1)
    classes = torch.zeros(rows, dtype=torch.int64, device=device)
    uniform = torch.rand(rows, 1, dtype=torch.float64)
    lengths = [1, num_tokens // 2, num_tokens]

    def step(length: int) -> None:
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        draw_tokens(filter_logits(prior.head(prior.hidden(tokens, classes)[:, -1])), uniform)

    times = [seconds(lambda length=length: step(length), repeats, device) for length in lengths]
    quadratic = np.polynomial.Polynomial.fit(lengths, times, 2)
    return float(quadratic(np.arange(1, num_tokens + 1)).sum())


def main() -> None:
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    results = {}
    for preset in options.presets:
        config = PriorConfig.preset(preset)
        prior = Prior(config).eval().to(options.device, dtype)
        for scale in options.cfg_scales:
            peer, sample = peer_of(config, scale, options.num_tokens)
            peer.to(options.device, dtype)
            for batch in options.batch_sizes:
                classes = torch.zeros(batch, dtype=torch.int64)

                def ours(count: int, classes=classes, scale=scale, prior=prior) -> torch.Tensor:
                    return prior.generate(classes.to(prior.device), count, cfg_scale=scale)

                ours(2)  # warm up
                sample(1)
                times = {
                    "ours": seconds(lambda: ours(options.num_tokens), options.repeats, options.device),
                    "transformers": seconds(partial(sample, batch), options.repeats, options.device),
                    "without_cache": without_cache(
                        prior, batch, scale, options.num_tokens, options.repeats, options.device
                    ),
                }
                results[f"{preset} batch={batch} cfg={scale}"] = {
                    "seconds": times,
                    "images_per_second": batch / times["ours"],
                    "speedup_over_transformers": times["transformers"] / times["ours"],
                    "speedup_over_no_cache": times["without_cache"] / times["ours"],
                }
                print(preset, batch, scale, times, flush=True)
    write_results("sampling", vars(options), results, options.json)


if __name__ == "__main__":
    main()
