"""Curves of other runs of an experiment."""

import json
import math

import pytest

from flextok_pl.diagnosis.finding import Finding
from flextok_pl.diagnosis.reference import FOLDER, Reference, against_reference, window_of, windows

OPTIONS = {"model.lr": 0.01, "model.net.depth": 3, "data.batch_size": 8}


def curve(factor=1.0, steps=400, every=10):
    return [(step, factor * (1 + 1 / (1 + step / 50))) for step in range(every - 1, steps, every)]


def reference(*factors):
    return Reference("x/y", OPTIONS, 50, {"train/loss": [windows(curve(f), 50) for f in factors]}, {})


def verdict(factor, given=None, options=OPTIONS):
    found = against_reference({"train/loss": curve(factor)}, options, given or reference(0.99, 1.0, 1.01))
    assert isinstance(found, Finding)
    return found.verdict


def test_windows_are_means_of_steps():
    assert windows([(0, 1.0), (49, 3.0), (50, 10.0), (99, math.nan), (120, 5.0)], 50) == {50: 2.0, 100: 10.0}


def test_windows_grow_with_a_training():
    assert [window_of(steps) for steps in (130, 1000, 3000, 100_000)] == [20, 20, 60, 2000]


def test_a_run_within_the_spread_is_ok():
    assert [verdict(factor) for factor in (1.0, 1.03, 0.97)] == ["ok"] * 3
    assert verdict(1.06) == verdict(0.94) == "look", "a loss may be too low"
    assert verdict(1.5) == "wrong"
    wide = reference(0.9, 1.0, 1.1)
    assert verdict(1.06, wide) == "ok", "seeds say what is chance"


def test_only_common_steps_count():
    found = against_reference({"train/loss": curve(steps=100)}, OPTIONS, reference(1.0, 1.0))
    assert isinstance(found, Finding) and "up to step 100" in found.says
    assert isinstance(against_reference({"train/loss": curve(steps=60)}, OPTIONS, reference(1.0, 1.0)), str)


def test_other_options_are_named_and_other_losses_not_compared():
    found = against_reference({"train/loss": curve()}, OPTIONS | {"model.lr": 0.5}, reference(1.0, 1.0))
    assert isinstance(found, Finding) and "model.lr=0.5 for 0.01" in found.says
    refused = against_reference({"train/loss": curve()}, OPTIONS | {"model.net.depth": 4}, reference(1.0, 1.0))
    assert isinstance(refused, str) and "model.net.depth=4 for 3" in refused
    more = against_reference({"train/loss": curve()}, OPTIONS | {"model.net.new": 4}, reference(1.0, 1.0))
    assert isinstance(more, Finding), "options that came later do not matter"


def test_a_file_is_read_as_it_was_written(tmp_path):
    given = Reference("x/y", OPTIONS, 50, {"train/loss": [{50: 1.5, 100: 1.25}, {50: 1.75}]}, {"date": "2026-11-30"})
    given.write(tmp_path / "r.json")
    assert Reference.read(tmp_path / "r.json") == given
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["curves"]["train/loss"] == {"steps": [50, 100], "runs": [[1.5, 1.25], [1.75, None]]}


@pytest.mark.parametrize("text", ["", "[]", '{"curves": 3}', '{"experiment": "x", "options": {}, "curves": {"a": {}}}'])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r\.json was not written by `flextok doctor reference`"):
        Reference.read(tmp_path / "r.json")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_curves_are_whole(file):
    shipped = Reference.read(file)
    assert file.stem == shipped.experiment.replace("/", "_")
    for name, runs in shipped.curves.items():
        assert len(runs) >= 2, name
        assert all(len(run) >= 2 for run in runs)
