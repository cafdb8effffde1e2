"""Run all benchmarks on this machine and store their results.

python -m benchmarks
"""

import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
BENCHMARKS = (
    "decoder_budget",
    "training_step",
    "prior_training_step",
    "autoencoder",
    "sampling",
    "feature_statistics",
    "evaluation_cost",
    "adaptive_budget",
    "loader",
    "conversion",
    "precomputation",
    "plan",
    "sweep_overhead",
)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in BENCHMARKS:
        results = FOLDER / "results" / f"{name}_{device}.json"
        command = [sys.executable, str(FOLDER / f"{name}.py"), "--json", str(results), *sys.argv[1:]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
