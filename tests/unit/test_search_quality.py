"""Quality of searched images beside what the search cost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flextok_pl.backbones.extractors import FeatureExtractor, build_extractor
from flextok_pl.evaluation.report import Record
from flextok_pl.metrics.linear_probe import LinearProbe
from flextok_pl.search.quality import measure_run, plot_quality, reference_features


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return build_extractor("effnet-lite0")


@pytest.fixture
def run(tmp_path: Path, emoji_folder: Path) -> Path:
    """A finished search for twelve prompts of two classes."""
    lines = []
    for number, picture in enumerate(sorted((emoji_folder / "a").iterdir())[:12]):
        file = tmp_path / "run" / "images" / f"{number:05d}" / "samples" / "0000.png"
        file.parent.mkdir(parents=True)
        shutil.copy(picture, file)
        result = {"image": str(file.relative_to(tmp_path / "run")), "score": number / 12}
        cost = {"decoder_calls": 10 + number, "decoded_images": 2, "prior_positions": 3, "verifier_calls": 2}
        about = {"number": number, "key": f"k{number}", "label": number % 2, "text": "", "metadata": {}, "steps": []}
        lines.append(json.dumps({**about, "results": [result], "cost": cost}))
    (tmp_path / "run" / "search.jsonl").write_text("\n".join(lines))
    (tmp_path / "run" / "protocol.json").write_text(json.dumps({"algorithm": "beam", "seed": 0}))
    return tmp_path / "run"


def constant_judge(extractor: FeatureExtractor) -> LinearProbe:
    """Takes every image for one of class 1."""
    zeros = torch.zeros(extractor.dim, dtype=torch.float64)
    weight = torch.zeros(2, extractor.dim, dtype=torch.float64)
    bias: Tensor = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return LinearProbe("probe_constant", zeros, zeros + 1, weight, bias, weight)


def test_agreement_distance_and_cost(run: Path, emoji_folder: Path, extractor: FeatureExtractor) -> None:
    judge = constant_judge(extractor)
    real, facts = reference_features(str(emoji_folder / "b"), extractor, 48)
    asked: list[Any] = []
    records = measure_run(run, extractor, lambda protocol: asked.append(protocol) or judge, real=real, batch_size=5)
    values = {record["metric"]: record["value"] for record in records}
    assert values["class_agreement"] == 0.5 and facts["num_samples"] == 24
    assert values["verifier_score"] == pytest.approx(5.5 / 12)
    assert values["fd_effnet_lite0"] > 0 and {"kd_effnet_lite0", "precision", "coverage"} <= set(values)
    assert asked == [{"algorithm": "beam", "seed": 0}]
    first = records[0]
    assert not first["full_rank"], "of 12 images"
    assert first["decoder_calls"] == 15.5 and first["num_samples"] == 12 and first["image_size"] == [48, 48]
    assert first["search"] == {"algorithm": "beam", "seed": 0} and first["classifier"] == "probe_constant"
    # The distance of the same images to themselves is none, whatever the batches.
    itself, _ = reference_features(str(run / "images"), extractor, 48)
    again = {r["metric"]: r["value"] for r in measure_run(run, extractor, real=itself, batch_size=12)}
    assert again["fd_effnet_lite0"] == pytest.approx(0, abs=1e-6) and "class_agreement" not in again
    alone = {r["metric"] for r in measure_run(run, extractor)}
    assert alone == {"verifier_score"}, "without real images there is no distance"


def entry(algorithm: str, calls: float, value: float, seed: int = 0, **search: Any) -> Record:
    search = {"algorithm": algorithm, "num_candidates": int(calls), "beam_width": 5, "seed": seed, **search}
    return {"metric": "class_agreement", "value": value, "decoder_calls": calls, "search": search}


def test_the_plot_has_a_line_for_each_way_and_a_point_for_each_size() -> None:
    records = [entry("best_of_n", n, value, seed) for n, value in ((1, 0.2), (4, 0.4), (16, 0.5)) for seed in (0, 1)]
    records[3]["value"] = 0.6
    records += [entry("beam", 4, 0.6, schedule="geometric"), entry("beam", 4, 0.7, schedule="linear")]
    figure = plot_quality(records)
    (axes,) = figure.axes
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    assert list(lines) == ["best_of_n, schedule=None", "beam, schedule=geometric", "beam, schedule=linear"]
    best = lines["best_of_n, schedule=None"]
    assert best.get_xdata().tolist() == [1, 4, 16] and best.get_ydata().tolist() == [0.2, 0.5, 0.5]
    (bars,) = axes.containers[0].lines[2]
    heights = [float(segment[1, 1] - segment[0, 1]) for segment in bars.get_segments()]
    assert heights == pytest.approx([0, 2 * 0.2 / 2**0.5, 0])
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [0.2], "direct sampling"
    assert axes.get_xscale() == "log"
    free = [entry("beam", 0, 0.6)]
    assert plot_quality(free).axes[0].get_xscale() == "linear", "a search that decodes nothing"
