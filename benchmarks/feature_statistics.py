"""Time and peak memory of a Frechet distance's statistics, against torchmetrics and torch-fidelity.

Two sets of N random features with a nearly constant spectrum are fed in batches, as in an evaluation, and then compared
once. No network runs. Each library runs in its own process; `baseline_gib` is its memory before the first batch. All
distances are compared with each other and with numpy's in float64.

    python benchmarks/feature_statistics.py --json benchmarks/results/feature_statistics_cpu.json
"""

import argparse
import json
import time
from collections.abc import Iterator

import torch
from report import measure_apart, peak_gib, write_results

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num-samples", nargs="+", type=int, default=[10_000, 50_000])
parser.add_argument("--dim", type=int, default=2048)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--libraries", nargs="+", default=["flextok_pl", "torchmetrics", "torch-fidelity", "numpy"])
parser.add_argument("--measure", nargs=2, default=None, help="measure one library at one N and print it as JSON")
parser.add_argument("--device", default="cpu", help="device; the CPU, as for statistics")
parser.add_argument("--json", default=None, help="file to write the results to")


def batches(options: argparse.Namespace, count: int, side: int) -> Iterator[torch.Tensor]:
    """(B, D) float32, non-negative and not centred, like pooled activations."""
    generator = torch.Generator().manual_seed(side)
    scale = torch.linspace(1.0, 0.2, options.dim) * (1 + 0.1 * side)
    for start in range(0, count, options.batch_size):
        rows = torch.randn(min(options.batch_size, count - start), options.dim, generator=generator)
        yield (rows * scale + 0.5).clamp_min(0)


def flextok_pl_distance(options: argparse.Namespace, count: int) -> tuple[dict[str, float], float]:
    from flextok_pl.metrics.frechet import FeatureStatistics, frechet_distance

    sides, seconds = [], 0.0
    for side in (0, 1):
        statistics = FeatureStatistics(options.dim)
        for batch in batches(options, count, side):
            start = time.perf_counter()
            statistics.update(batch)
            seconds += time.perf_counter() - start
        sides.append(statistics)
    start = time.perf_counter()
    distance = frechet_distance(*sides)
    return {"statistics": seconds, "distance": time.perf_counter() - start}, distance


def torchmetrics_distance(options: argparse.Namespace, count: int) -> tuple[dict[str, float], float]:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        """Replaces Inception: it receives features as images."""

        num_features = options.dim

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    metric, seconds = FrechetInceptionDistance(feature=Given()), 0.0
    for side in (0, 1):
        for batch in batches(options, count, side):
            start = time.perf_counter()
            metric.update(batch, real=side == 0)
            seconds += time.perf_counter() - start
    start = time.perf_counter()
    distance = float(metric.compute())
    return {"statistics": seconds, "distance": time.perf_counter() - start}, distance


def torch_fidelity_distance(options: argparse.Namespace, count: int) -> tuple[dict[str, float], float]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sides, seconds = [], 0.0
    for side in (0, 1):
        kept = [*batches(options, count, side)]  # as in its feature extraction
        start = time.perf_counter()
        sides.append(fid_features_to_statistics(torch.cat(kept)))
        seconds += time.perf_counter() - start
        del kept
    start = time.perf_counter()
    distance = fid_statistics_to_metric(*sides, False)["frechet_inception_distance"]
    return {"statistics": seconds, "distance": time.perf_counter() - start}, distance


def numpy_distance(options: argparse.Namespace, count: int) -> tuple[dict[str, float], float]:
    """The expected distance, in float64 from all features at once."""
    import numpy as np

    sides, seconds = [], 0.0
    for side in (0, 1):
        kept = np.concatenate([batch.double().numpy() for batch in batches(options, count, side)])
        start = time.perf_counter()
        sides.append((kept.mean(0), np.cov(kept, rowvar=False)))
        seconds += time.perf_counter() - start
        del kept
    start = time.perf_counter()
    (mean_a, a), (mean_b, b) = sides
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    distance = float(np.square(mean_a - mean_b).sum() + np.trace(a) + np.trace(b) - 2 * cross)
    return {"statistics": seconds, "distance": time.perf_counter() - start}, distance


LIBRARIES = {
    "flextok_pl": flextok_pl_distance,
    "torchmetrics": torchmetrics_distance,
    "torch-fidelity": torch_fidelity_distance,
    "numpy": numpy_distance,
}


def measure(options: argparse.Namespace) -> dict[str, object]:
    name, count = options.measure[0], int(options.measure[1])
    LIBRARIES[name](argparse.Namespace(**{**vars(options), "dim": 16}), 256)  # imports and thread pools
    baseline = peak_gib(options.device)
    seconds, distance = LIBRARIES[name](options, count)
    peak = peak_gib(options.device)
    return {"seconds": seconds, "baseline_gib": baseline, "peak_memory_gib": peak, "value": distance}


def main() -> None:
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return
    results = {}
    for count in options.num_samples:
        for name in options.libraries:
            results[f"{name} N={count}"] = measure_apart(name, str(count))
            print(name, count, results[f"{name} N={count}"], flush=True)
    write_results("feature_statistics", vars(options), results, options.json)


if __name__ == "__main__":
    main()
