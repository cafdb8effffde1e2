"""What a run has logged, whichever logger it had."""

import json

from torch.utils.tensorboard import SummaryWriter

from flextok_pl.diagnosis.logs import read_curves


def test_events_of_a_run_that_went_on(tmp_path):
    for steps in (range(0, 40, 10), range(30, 60, 10)):
        writer = SummaryWriter(str(tmp_path))
        for step in steps:
            writer.add_scalar("train/loss", step / 10, step)
        writer.close()
    other = SummaryWriter(str(tmp_path / "charts"))
    other.add_scalar("not of the run", 1.0, 1)
    other.close()
    assert read_curves(tmp_path) == {"train/loss": [(step, step / 10) for step in range(0, 60, 10)]}


def test_tables_and_their_earlier_parts(tmp_path):
    (tmp_path / "metrics_0.csv").write_text("epoch,step,train/loss,val/loss\n0,9,1.5,\n0,19,1.25,\n0,19,,2.5\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,19,1.0\n0,29,nan\n")
    found = read_curves(tmp_path)
    assert found["val/loss"] == [(19, 2.5)]
    assert found["train/loss"][:2] == [(9, 1.5), (19, 1.0)], "of a step measured twice the later part counts"
    assert found["train/loss"][2][1] != found["train/loss"][2][1]


def test_lines_of_a_killed_run(tmp_path):
    lines = [
        json.dumps({"stage": "fit", "epoch": 0, "step": 10, "metrics": {"val/loss": 1.5}}),
        json.dumps({"stage": "test", "epoch": 0, "step": 10, "metrics": {"val/loss": 7.0}}),
        '{"stage": "fit", "ep',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_curves(tmp_path) == {"val/loss": [(10, 1.5)]}


def test_nothing(tmp_path):
    assert read_curves(tmp_path) == {}
