"""Does the decoder's cost follow the token budget, and does batching pay?

Times one velocity call of the d12 decoder (width 768, 12 blocks, 256 patches, 256 registers, random weights) at several
budgets, and the unconditional pass. Every row is a ratio to the call at the full budget in the same run. That call
costs as much as the published implementation's at any budget, because its sequence always has 256 + 256 positions.

    python benchmarks/decoder_budget.py --json benchmarks/results/decoder_budget_cpu.json
"""

import argparse
from collections.abc import Callable

import torch
from report import median_seconds, write_results

from flextok_pl.config import FlexTokConfig
from flextok_pl.models.decoder import token_layout
from flextok_pl.models.tokenizer import FlexTok

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="d12_d12")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
parser.add_argument("--json", default=None, help="file to write the results to")


@torch.no_grad()
def main() -> None:
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    config = FlexTokConfig.preset(options.preset)
    with torch.device("meta"):
        tokenizer = FlexTok(config)
    decoder = tokenizer.decoder.to_empty(device=options.device).to(dtype)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokenizer.decoder = decoder
    tokenizer.encoder = tokenizer.encoder.to_empty(device="cpu")

    def call(batch: int, budget: int, unconditional: bool = False) -> Callable[[], None]:
        x_t = torch.randn(batch, config.latent_channels, *tokenizer.latent_size, device=options.device, dtype=dtype)
        kept = torch.full((batch,), 0 if unconditional else budget)
        codes = torch.zeros(int(kept.sum()), len(config.fsq_levels), device=options.device)
        layout = token_layout(config, x_t, kept, kept == 0)
        t = torch.full((1,), 0.5, device=options.device)
        return lambda: decoder(x_t, t, codes, layout)

    full = config.num_registers
    rows = {f"k={k}": call(options.batch_size, k) for k in (1, 8, 32, 64, 128, full) if k <= full}
    rows["unconditional"] = call(options.batch_size, 1, unconditional=True)
    rows[f"k={full}, one image"] = call(1, full)
    seconds = median_seconds(rows, options.repeats, options.device)
    reference = seconds[f"k={full}"]
    results = {
        name: {"milliseconds": 1e3 * value, "ratio_to_full_budget": value / reference}
        for name, value in seconds.items()
    }
    results[f"k={full}, one image"]["ratio_of_time_per_image_in_the_batch"] = (
        reference / options.batch_size / seconds[f"k={full}, one image"]
    )
    write_results("decoder_budget", vars(options), results, options.json)


if __name__ == "__main__":
    main()
