"""The cost of nine token budgets as a multiple of one: in a shared evaluation, and in nine evaluations.

The demo tokenizer and the demo prior run on the demo's held-out pictures, as in `flextok test`. `one` is the mean over
nine evaluations at one budget each, which is also the cost of nine evaluations that share nothing. Each further budget
costs `of_a_budget`, most of it in `detokenize`. All budgets share the rest of `one`.

    make data && python benchmarks/evaluation_cost.py --json benchmarks/results/evaluation_cost_cpu.json
"""

import argparse
import tempfile
import time
import warnings
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from report import write_results

from flextok_pl import DEMO_PRIOR, DEMO_TOKENIZER, FlexTok, GenerationFID, ReconstructionFID, ShardDataModule
from flextok_pl.modules.saved import SavedPrior, SavedTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="data/openmoji64/val")
parser.add_argument("--budgets", nargs="+", type=int, default=[1, 2, 4, 8, 16, 24, 32, 48, 64])
parser.add_argument("--num-steps", type=int, default=12)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--json", default=None, help="file to write the results to")


def seconds(options: argparse.Namespace, kind: str, budgets: list[int]) -> tuple[float, float]:
    """Seconds of one evaluation without a cache, and of `detokenize` in it, which waits for the device."""
    decoding: list[float] = []
    detokenize = FlexTok.detokenize

    def timed(*args: object, **kwargs: object) -> object:
        begin = time.perf_counter()
        images = detokenize(*args, **kwargs)
        decoding.append(time.perf_counter() - begin)
        return images

    data = ShardDataModule(test=options.data, image_size=64, eval_batch_size=96, num_workers=0)
    settings = {"num_steps": options.num_steps, "guidance": "cfg", "guidance_scale": 2.0, "cache_dir": None}
    with tempfile.TemporaryDirectory() as folder:
        callback: Callback
        if kind == "rfid":
            module = SavedTokenizer(str(DEMO_TOKENIZER))
            callback = ReconstructionFID(budgets=budgets, output_dir=folder, **settings)
        else:
            module = SavedPrior(str(DEMO_PRIOR), str(DEMO_TOKENIZER))
            callback = GenerationFID(budgets=budgets, cfg_scale=1.5, output_dir=folder, **settings)
        trainer = Trainer(
            accelerator="gpu" if options.device.startswith("cuda") else "cpu",
            devices=1,
            logger=False,
            callbacks=[callback],
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.test(module, data, verbose=False)  # the first test loads weights
        with patch.object(FlexTok, "detokenize", timed):
            start = time.perf_counter()
            trainer.test(module, data, verbose=False)
            return time.perf_counter() - start, sum(decoding)


def main() -> None:
    warnings.filterwarnings("ignore")
    options = parser.parse_args()
    results = {}
    for kind in ("rfid", "gfid"):
        alone = {budget: seconds(options, kind, [budget]) for budget in options.budgets}
        together, decoding_together = seconds(options, kind, options.budgets)
        separately, decoding = (sum(each) for each in zip(*alone.values(), strict=True))
        one, count = separately / len(alone), len(alone)
        results[kind] = {
            "seconds_alone": {budget: whole for budget, (whole, _) in alone.items()},
            "seconds_one": one,
            "seconds_together": together,
            "seconds_of_a_budget": (together - one) / (count - 1),
            "seconds_decoding": {"one": decoding / count, "together": decoding_together},
            "together_over_one": together / one,
            "separately_over_together": separately / together,
        }
        print(kind, results[kind], flush=True)
    write_results("evaluation_cost", vars(options), results, options.json)


if __name__ == "__main__":
    main()
