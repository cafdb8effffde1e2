"""Distilled decoders against their teacher: distance at every token budget, over seeds, and time per picture.

The demo tokenizer is the teacher, guided at all times or in an interval; its students run on its held-out pictures. All
ways of decoding start from the same noise. Times are CPU times of one thread, for batches that take turns, with and
without the autoencoder, with all tokens.

    make data && python benchmarks/few_steps.py --students FILE ... --json benchmarks/results/few_steps_cpu.json
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from report import write_results

from flextok_pl import DEMO_TOKENIZER, FlexTok, ShardDataModule
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.evaluation.decoding import decode
from flextok_pl.evaluation.pictures import image_grid, save_png
from flextok_pl.evaluation.reconstruction_statistics import ReconstructionStatistics
from flextok_pl.flow.decoding import Decoding, chosen_decoding
from flextok_pl.metrics.images import to_uint8

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="data/openmoji64/val")
parser.add_argument("--students", nargs="*", default=[], help="files of distilled tokenizers")
parser.add_argument("--teacher-steps", nargs="+", type=int, default=[12, 4, 2, 1])
parser.add_argument("--guidance-scale", type=float, default=2.0)
parser.add_argument("--intervals", nargs="*", default=[], help="guidance intervals at the first steps: 0.3,0.8 ...")
parser.add_argument("--budgets", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
parser.add_argument("--repeats", type=int, default=5, help="timings of each; 0 for none")
parser.add_argument("--device", default="cpu")
parser.add_argument("--picture", default=None, help="PNG to draw: pictures at some budgets, a column for each way")
parser.add_argument("--json", default=None, help="file to write the results to")

Way = tuple[FlexTok, Decoding]


def ways_of(options: argparse.Namespace) -> dict[str, Way]:
    """Ways to decode pictures, by name."""
    teacher = FlexTok.from_pretrained(DEMO_TOKENIZER, device=options.device)
    scale, steps = options.guidance_scale, options.teacher_steps
    ways = {f"teacher, {n} steps": (teacher, Decoding(n, "cfg", scale)) for n in steps}
    for text in options.intervals:
        low, high = (float(number) for number in text.split(","))
        how = Decoding(steps[0], "cfg", scale, guidance_interval=(low, high))
        ways[f"teacher, {steps[0]} steps, guided in ({low:g}, {high:g}]"] = teacher, how
    for file in options.students:
        student = FlexTok.from_pretrained(file, device=options.device)
        ways[f"student, {student.config.num_steps} steps"] = student, chosen_decoding(student.config)
    return ways


def distances(ways: dict[str, Way], images: torch.Tensor, keys: list[str], options: argparse.Namespace) -> dict:
    """Way -> budget -> mean and standard deviation of the kernel distance over seeds, and of the pixels' error."""
    network, tokens = build_extractor("effnet-lite0").to(options.device), None
    found: dict[str, dict[int, dict[str, list[float]]]] = {name: {} for name in ways}
    for seed in options.seeds:
        for name, (tok, how) in ways.items():
            tokens = tok.tokenize(images) if tokens is None else tokens
            measured = ReconstructionStatistics(options.budgets, network, 1.0)
            measured.update_real(to_uint8(images), keys)
            for budget, made in decode(tok, tokens, options.budgets, how, keys, seed):
                measured.update_reconstructions(budget, to_uint8(images), made, keys)
            for budget, values in measured.values(seed).items():
                for metric in (network.kernel_metric_name, "mse"):
                    found[name].setdefault(budget, {}).setdefault(metric, []).append(values[metric])
            print(seed, name, flush=True)
    spread = statistics.stdev if len(options.seeds) > 1 else lambda values: 0.0
    return {
        name: {
            budget: {metric: {"mean": statistics.fmean(v), "std": spread(v), "all": v} for metric, v in each.items()}
            for budget, each in by_budget.items()
        }
        for name, by_budget in found.items()
    }


def times(ways: dict[str, Way], images: torch.Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Way -> CPU milliseconds per picture: the minimum over repeats of batches that take turns."""
    batch = images[:32]
    made: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for repeat in range(repeats + 1):
        for name, (tok, how) in ways.items():
            tokens = tok.tokenize(batch)
            for what, call in (("with_autoencoder", tok.detokenize), ("without_autoencoder", tok.sample_latents)):
                start = time.process_time()
                call(tokens, generator=torch.Generator().manual_seed(0), **how.arguments)
                if repeat:
                    made[name].setdefault(what, []).append(1000 * (time.process_time() - start) / len(batch))
    return {name: {what: min(values) for what, values in each.items()} for name, each in made.items()}


def draw(ways: dict[str, Way], images: torch.Tensor, keys: list[str], file: str) -> None:
    """Draw a row for each of some pictures at some budgets."""
    shown, budgets = images[[5, 45, 65, 85]], (1, 8, 64)
    tok = next(iter(ways.values()))[0]
    tokens, names = tok.tokenize(shown), [f"{budget} token{'s' * (budget > 1)}" for budget in budgets for _ in shown]
    columns = [("original", shown.repeat(len(budgets), 1, 1, 1))]
    for name, (tok, how) in ways.items():
        if how.guidance_interval == (0.0, 1.0):
            made = dict(decode(tok, tokens, budgets, how, keys[: len(shown)], 0))
            short = name.replace("teacher, ", "T").replace("student, ", "S").replace(" steps", "")
            columns.append((short, torch.cat([made[budget] for budget in budgets])))
    save_png(image_grid(columns, names), Path(file))


def main() -> None:
    options = parser.parse_args()
    data = ShardDataModule(val=options.data, image_size=64, eval_batch_size=96, num_workers=0)
    batches = list(data.val_dataloader())
    images = torch.cat([batch["image"] for batch in batches]).to(options.device)
    keys = [key for batch in batches for key in batch["key"]]
    ways = ways_of(options)
    if options.picture:
        draw(ways, images, keys, options.picture)
    results = {"distances": distances(ways, images, keys, options)}
    if options.repeats:
        results["milliseconds"] = times(ways, images, options.repeats)
    write_results("few_steps", vars(options), results, options.json)


if __name__ == "__main__":
    main()
