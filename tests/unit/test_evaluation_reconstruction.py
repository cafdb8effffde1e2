"""Distances of reconstructions from their originals, without a trainer."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from flextok_pl.evaluation.reconstruction_statistics import ReconstructionStatistics
from flextok_pl.metrics.kernel import kernel_distance


class Colours:
    """Features are the mean colours of the four quarters."""

    metric_name, kernel_metric_name, dim = "fd_colours", "kd_colours", 12

    def __call__(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def test_the_kernel_distance_takes_originals_and_reconstructions_as_pairs():
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (9, 3, 16, 16), generator=generator, dtype=torch.uint8)
    keys = [str(i) for i in range(9)]
    statistics = ReconstructionStatistics([2], Colours())
    statistics.update_real(originals, keys)
    statistics.update_reconstructions(2, originals, originals // 2, keys)
    a, b = Colours()(originals), Colours()(originals // 2)
    value = statistics.values()[2]["kd_colours"]
    assert value == pytest.approx(kernel_distance(a, b, paired=True)[0], rel=1e-9)
    assert value != pytest.approx(kernel_distance(a, b)[0], rel=1e-3)


SCRIPT = """
import sys, torch
from flextok_pl.evaluation.budget_evaluation import Context
from flextok_pl.evaluation.options import ReconstructionOptions
from flextok_pl.evaluation.reconstruction import ReconstructionEvaluation
from flextok_pl.models.tokenizer import FlexTok, FlexTokConfig

tokenizer, images = FlexTok(FlexTokConfig.preset("tiny")), torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32)
evaluation = ReconstructionEvaluation(ReconstructionOptions(budgets=[1, 16], num_steps=1, cache_dir=None))
evaluation.start(tokenizer, Context(num_samples=8))
for part in torch.arange(8).split(3):
    evaluation.update({"image": images[part], "key": [f"image {i}" for i in part]})
results = evaluation.finish()
results.write(Path(sys.argv[1]), "rfid")
print(results.table(sys.argv[1]), "lightning" in sys.modules)
"""


def test_a_few_lines_of_python_without_lightning(tmp_path):
    script = f"from pathlib import Path{SCRIPT}"
    asked = [sys.executable, "-c", script, str(tmp_path)]
    printed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert "8 images of test, 1 steps" in printed and printed.endswith("False\n")
    records = json.loads((tmp_path / "rfid.json").read_text())
    assert {record["num_tokens"] for record in records} == {1, 16} and records[0]["complete"]
    assert {"metric", "value", "num_samples", "extractor_weights_hash", "versions"} <= set(records[0])
