"""How many tokens `tokenize(images, quality=...)` saves against one budget for all pictures.

The demo tokenizer runs on its held-out pictures. For several targets this reports the mean number of tokens that the
search uses, the mean error that it reaches, and the share of pictures that meet the target. It compares two fixed
budgets: the one with the same mean error, interpolated between whole budgets, and the smallest one at which as many
pictures meet the target, or K if there is none. It draws the pictures that need the fewest and the most tokens.

    make data && python benchmarks/adaptive_budget.py --json benchmarks/results/adaptive_budget_cpu.json
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from report import write_results

from flextok_pl import DEMO_TOKENIZER, FlexTok, Quality, ShardDataModule
from flextok_pl.evaluation.pictures import image_grid, save_png
from flextok_pl.models.adaptive import squared_error

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="data/openmoji64")
parser.add_argument("--num-steps", type=int, default=12)
parser.add_argument(
    "--fixed", nargs="+", type=int, default=[4, 8, 16, 24, 32], help="budgets whose mean errors are targets"
)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--picture", default=None, help="PNG to draw for the middle target")
parser.add_argument("--json", default=None, help="file to write the results to")


def main() -> None:
    options = parser.parse_args()
    tok = FlexTok.from_pretrained(DEMO_TOKENIZER, device=options.device)
    decoding = {"num_steps": options.num_steps, "guidance": "none", "guidance_scale": 1.0}
    data = ShardDataModule(val=f"{options.data}/val", image_size=64, eval_batch_size=96, num_workers=0)
    images = torch.cat([batch["image"] for batch in data.val_dataloader()]).to(options.device)

    def decode(tokens: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        return tok.detokenize(tokens, **decoding, generator=[torch.Generator().manual_seed(0) for _ in tokens])

    def errors(tokens: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        return squared_error(images, decode(tokens)).cpu()  # (N,)

    whole = tok.tokenize(images)
    grid = sorted({*range(1, 17), *range(16, tok.num_registers + 1, 4)})
    at = {budget: errors(whole[:, :budget]) for budget in grid}
    fixed = {budget: each.mean().item() for budget, each in at.items()}

    def compared(tokens: list[torch.Tensor], target: float) -> dict[str, float]:
        used, reached = sum(map(len, tokens)) / len(tokens), errors(tokens)
        error, share = reached.mean().item(), (reached <= target).double().mean().item()
        falling = np.minimum.accumulate(list(fixed.values()))
        of_error = float(np.interp(-error, -falling, grid))
        enough = [budget for budget, each in at.items() if (each <= target).double().mean().item() >= share]
        of_share = min(enough, default=tok.num_registers)
        return {
            "mean_tokens": used,
            "mean_error": error,
            "fixed_budget_of_equal_error": of_error,
            "saving_at_equal_error": 1 - used / of_error,
            "share_that_meets_the_target": share,
            "fixed_budget_of_equal_share": of_share,
            "saving_at_equal_share": 1 - used / of_share,
        }

    results = {}
    for budget in options.fixed:
        target = fixed[budget]
        searched = tok.tokenize(images, quality=Quality(target, **decoding))
        needed = torch.tensor([len(row) for row in searched])
        results[f"target of {budget} tokens"] = {"target": target, "searched": compared(searched, target)}
        print(budget, results[f"target of {budget} tokens"], flush=True)
        if options.picture and budget == options.fixed[len(options.fixed) // 2]:
            order = needed.argsort(stable=True)
            chosen = torch.cat([order[:5], order[-5:]])
            shown = decode([searched[i] for i in chosen.tolist()])
            names = [f"{needed[i]} tokens" for i in chosen.tolist()]
            save_png(image_grid([("original", images[chosen]), ("decoded", shown)], names), Path(options.picture))
    write_results("adaptive_budget", vars(options), {"fixed": fixed, **results}, options.json)


if __name__ == "__main__":
    main()
