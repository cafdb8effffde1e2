"""Benchmarks of models run, here with the smallest ones; nothing is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "decoder_budget": ["--preset", "tiny", "--batch-size", "2", "--repeats", "1"],
    "training_step": ["--preset", "tiny", "--batch-size", "2", "--repeats", "1", "--compile", "nothing"],
    "plan": ["--settings", "demo 1 float32 kept none"],
}


@pytest.mark.parametrize("name", SMALL)
def test_benchmark(name: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL[name], "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["results"]
