"""How much agreement with the class does a search at test time buy, at what cost?

It searches for pictures of every class with `flextok search`, scored by a probe on one network. It measures the results
by that probe and by one on another network, which no search has seen. It compares direct sampling, best-of-N, beam
search and lookahead search at about the same number of decoded images, for several seeds. Run it again to resume. A
size is the number of images that a search decodes: N for best-of-N, and 5 n for a beam of two sequences with n
candidates each over three steps.

    python benchmarks/searching.py --json benchmarks/results/searching_cpu.json
    python benchmarks/searching.py --plot demo=benchmarks/results/searching_cpu.json --out docs/findings_search.png
"""

import argparse
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from report import write_results

from flextok_pl.cli.search import measure_searches, run
from flextok_pl.data import ShardDataModule
from flextok_pl.evaluation.pictures import save_figure

VERIFIER, JUDGE = "effnet-lite0", "effnet-lite2"
BEAM = 2
METRICS = {"judge": "agreement under the judge", "verifier": "agreement under the verifier"}
PANELS = (("judge", "decoder_calls"), ("verifier", "decoder_calls"), ("judge", "prior_positions"))
SHOWN = (*METRICS, "verifier_probability")
NAMES = {"best_of_n": "best-of-N", "beam": "beam", "lookahead": "lookahead"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--prior", default=None, help="default the demo's")
parser.add_argument("--tokenizer", default=None, help="default the demo's")
parser.add_argument("--captions", default=None, help="shard set whose captions are the prompts of a prior of texts")
parser.add_argument("--data", default="data/openmoji64/train", help="training data of the probes")
parser.add_argument("--samples", type=int, default=4, help="searches for each class, or captions of each class")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--best-of", type=int, nargs="*", default=[1, 4, 16])
parser.add_argument("--per-beam", type=int, nargs="+", default=[3], help="candidates of each sequence of the beam")
parser.add_argument(
    "--schedules", nargs="+", default=["1,4,16", "4,8,16"], help="schedules of beams; best-of-N uses the last number"
)
parser.add_argument("--lookahead", type=int, default=4)
parser.add_argument("--cfg-scale", type=float, default=1.5)
parser.add_argument("--steps", type=int, default=4, help="steps of the decoder")
parser.add_argument("--runs", default="runs/searching", help="folder of the searches")
parser.add_argument("--device", default="cpu")
parser.add_argument("--json", default=None, help="file to write the results to")
parser.add_argument("--plot", nargs="+", default=None, metavar="NAME=FILE", help="draw these results without searching")
parser.add_argument("--out", default="runs/searching.png", help="the plot")


def main() -> None:
    options = parser.parse_args()
    if options.plot is not None:
        files = dict(each.split("=", 1) for each in options.plot)
        results = {name: json.loads(Path(file).read_text()) for name, file in files.items()}
        save_figure(plot(results), Path(options.out))
        print("\n".join(f"{name}\n{table(each)}" for name, each in results.items()))
        return
    folder, common = Path(options.runs), _arguments(options)
    searches = [("best_of_n", n, options.schedules[0]) for n in options.best_of]
    searches += [(kind, n, at) for kind in ("beam", "lookahead") for at in options.schedules for n in options.per_beam]
    runs = []
    for seed in options.seeds:
        for kind, n, at in searches:
            runs.append(
                folder / "_".join([kind, str(n), *(at.split(",") if kind != "best_of_n" else []), f"seed{seed}"])
            )
            own = {"algorithm": kind, "num_candidates": n, "schedule": f"[{at}]", "seed": seed, "out": runs[-1]}
            run("search", [*common, *_flags(own)])
    write_results("searching", vars(options), {"runs": _measured(runs, folder, options)}, options.json)


def _arguments(options: argparse.Namespace) -> list[str]:
    """The arguments of all searches."""
    given = {
        "verifiers": ["class"],
        "classifier": "probe",
        "classifier_data": options.data,
        "classifier_extractor": VERIFIER,
        "beam_width": BEAM,
        "max_tokens": options.schedules[0].split(",")[-1],
        "lookahead": options.lookahead,
        "cfg_scale": options.cfg_scale,
        "decoding.num_steps": options.steps,
        "decoding.guidance": "cfg",
        "decoding.guidance_scale": 2.0,
        "trees": 0,
        "device": options.device,
        "prior": options.prior,
        "tokenizer": options.tokenizer,
    }
    given |= {"prompts": _captions(options)} if options.captions else {"samples": options.samples}
    return _flags({name: value for name, value in given.items() if value is not None})


def _flags(given: dict[str, Any]) -> list[str]:
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def _captions(options: argparse.Namespace) -> Path:
    """Write a file of prompts: the first captions of each class, with their classes."""
    data = ShardDataModule(test=options.captions, image_size=64, eval_batch_size=64, num_workers=0)
    rows: dict[int, list[str]] = {}
    for batch in data.test_dataloader():
        for label, text in zip(batch["label"].tolist(), batch["text"], strict=True):
            rows.setdefault(label, []).append(text)
    lines = [
        json.dumps({"prompt": text, "label": label}) + "\n"
        for label, texts in sorted(rows.items())
        for text in list(dict.fromkeys(texts))[: options.samples]
    ]
    file = Path(options.runs) / "prompts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))
    return file


def _measured(runs: list[Path], folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each search: its options, its cost per prompt, and its results."""
    rows: dict[str, dict[str, Any]] = {}
    for name, extractor in (("judge", JUDGE), ("verifier", VERIFIER)):
        probe = {"classifier": "probe", "classifier_data": options.data, "extractor": extractor}
        out = folder / f"quality_{name}"
        measure_searches([str(run) for run in runs], **probe, out=str(out), device=options.device)
        for record in json.loads((out / "quality.json").read_text()):
            search = record["search"]
            facts = {each: search[each] for each in ("algorithm", "num_candidates", "beam_width", "schedule", "seed")}
            costs = {each: record[each] for each in ("decoder_calls", "decoded_images", "prior_positions")}
            row = rows.setdefault(record["run"], {**facts, "num_prompts": record["num_samples"], **costs})
            if record["metric"] == "class_agreement":
                row[name] = record["value"]
            elif record["metric"] == "verifier_score":
                row["verifier_probability"] = record["value"]
    return list(rows.values())


def lines(results: dict[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """Label of a way to search -> for each of its sizes, in order, the rows of all seeds."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in sorted(
        results["results"]["runs"], key=lambda row: (row["algorithm"] != "best_of_n", row["decoder_calls"])
    ):
        at = "" if row["algorithm"] == "best_of_n" else f" at {', '.join(map(str, row['schedule']))} tokens"
        found.setdefault(NAMES[row["algorithm"]] + at, {}).setdefault(row["num_candidates"], []).append(row)
    return {name: list(sizes.values()) for name, sizes in sorted(found.items())}


def over_seeds(rows: list[dict[str, Any]], metric: str) -> tuple[float, float]:
    """Mean and standard deviation."""
    values = [row[metric] for row in rows]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def table(results: dict[str, Any]) -> str:
    """A row for each way and size: costs per prompt, then the metrics over seeds."""
    rows = ["| search | images | decoder calls | prior positions | " + " | ".join(SHOWN) + " |", "|---|" + "---:|" * 6]
    for label, sizes in lines(results).items():
        for found in sizes:
            costs = [f"{found[0][name]:.0f}" for name in ("decoded_images", "decoder_calls", "prior_positions")]
            values = ["{:.2f} ± {:.2f}".format(*over_seeds(found, metric)) for metric in SHOWN]
            rows.append("| " + " | ".join([label, *costs, *values]) + " |")
    return "\n".join(rows)


def plot(results: dict[str, dict[str, Any]]) -> Figure:
    """Draw a row of panels for each set of results."""
    figure = Figure(figsize=(3.2 * len(PANELS), 2.4 * len(results) + 0.6), dpi=90, layout="constrained")
    grid = figure.subplots(len(results), len(PANELS), squeeze=False)
    colors = {label: f"C{j}" for j, label in enumerate(sorted({each for of in results.values() for each in lines(of)}))}
    for row, (name, each) in zip(grid, results.items(), strict=True):
        for axes, (metric, cost) in zip(row, PANELS, strict=True):
            for j, (label, sizes) in enumerate(lines(each).items()):
                x = [rows[0][cost] * (1 + 0.02 * j) for rows in sizes]  # shifted, so that all are visible
                y, spread = zip(*(over_seeds(rows, metric) for rows in sizes), strict=True)
                axes.errorbar(x, y, spread, marker="o", markersize=4, capsize=2, color=colors[label], label=label)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set_title(f"{name}: {METRICS[metric]}", fontsize=9)
            axes.set_xlabel(f"{cost.replace('_', ' ')} per prompt", fontsize=8)
            axes.set_ylim(0, 1)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
