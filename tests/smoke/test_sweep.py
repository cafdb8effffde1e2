"""What `flextok sweep` finds out before its first trial. What it runs is tested in tests/slurm and tests/unit."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from flextok_pl.cli import main
from flextok_pl.cli.sweep import check, parse_sweep, sweep_parser
from flextok_pl.sweeps.sweep import FLEXTOK

TINY = Path(__file__).parents[2] / "experiments" / "tokenizer" / "tiny.yaml"


@pytest.fixture
def start(image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a sweep of the tiny experiment in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **options: Any) -> None:
        overrides = {
            "data.train": str(image_shards / "train"),
            "data.val": str(image_shards / "val"),
            "rfid": None,
            "codebook": None,
            "trainer.enable_progress_bar": False,
            **options.pop("overrides", {}),
        }
        given = {"metric": "val/loss", "space": {"model.lr": [1e-3, 1e-2]}, "search": "grid", **options}
        Path("sweep.yaml").write_text(yaml.safe_dump({"experiment": str(TINY), "overrides": overrides, **given}))
        main(["sweep", "sweep.yaml", *arguments])

    return run


@pytest.mark.parametrize(
    "options, message",
    [
        ({"space": {"model.lrr": [1e-3]}}, "model.lrr"),
        ({"space": {"model.lr": [1e-3, "high"]}}, "'model.lr': 'high'} cannot be trained"),
        ({"space": {"model.net.encoder_width": [64, 100]}}, "encoder_width=100 must be a multiple of encoder_head_dim"),
        ({"overrides": {"trainer.max_stepz": 3}}, "trainer.max_stepz"),
        ({"overrides": {"trainer.max_steps": 5}}, "model.warmup_steps=5 must be below trainer.max_steps=5"),
        (
            {"overrides": {"data.batch_size": 2, "trainer.max_steps": 9}},
            "ends before the first validation, which comes",
        ),
        ({"metric": "val/los"}, "metric=val/los is not logged; there are"),
        ({"overrides": {"data.train": "nowhere"}}, "nowhere"),
    ],
)
def test_what_would_stop_every_trial(start: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        start(**options)
    assert message in str(stop.value)
    assert not Path("runs").exists(), "nothing is left behind"


def test_no_commands_are_printed_that_would_fail(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"'model.net.encoder_depth': None\} cannot be trained"):
        start("--dry-run", "true", space={"model.net.encoder_depth": [1, None]})
    assert "flextok fit" not in capsys.readouterr().out


def test_what_slurm_is_to_train_is_only_parsed_here(
    start: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    on_two = {"trainer.devices": 2, "data.batch_size": 2, "trainer.max_steps": 9}  # one alone has no validation by then
    with pytest.raises(SystemExit, match="no `sbatch` here"):
        start(launcher="slurm", metric="val/los", overrides=on_two)
    check(parse_sweep(sweep_parser("sweep"), ["sweep.yaml"])[0])
    assert "2 points of the space can be parsed; launcher=slurm: no test step here" in capsys.readouterr().out


def test_a_metric_of_the_test(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test reads its own seed's fit, and leaves no folder that another seed's fit would take."""
    codebook = {"codebook": {"every_n_validations": 0}}
    given = {"metric": "test/codes/entropy", "test": True, "seeds": [0, 1], "space": {"model.lr": [1e-3]}}
    start("--dry-run", "true", "--check", "false", overrides=codebook, **given)
    folders = []

    def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        main(command[len(FLEXTOK) :])
        (place,) = (Path(each.partition("=")[2]) for each in command if ".save_dir=" in each)
        folders.append(sorted(path.relative_to(place / "check").as_posix() for path in place.rglob("metrics.jsonl")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("flextok_pl.cli.sweep.subprocess", SimpleNamespace(run=run_here))
    check(parse_sweep(sweep_parser("sweep"), ["sweep.yaml"])[0])
    fit = "version_0/metrics.jsonl"
    assert folders == [[fit], [fit, "version_0/test/version_0/metrics.jsonl"]]


def test_the_commands_are_printed(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them: of each seed a fit and a test; and what each trial asks of Slurm."""
    slurm = {"timeout_min": 60, "gpus_per_node": 8}
    start("--dry-run", "true", "--test", "true", launcher="slurm", slurm=slurm, seeds=[0, 3])
    asked, *lines = capsys.readouterr().out.splitlines()
    assert asked == "# each trial is a Slurm job, at most 1 at a time, with gpus_per_node=8 timeout_min=60"
    assert [line.split()[1] for line in lines] == ["fit", "test"] * 4
    trials = [(rate, seed) for rate in (0.001, 0.01) for seed in (0, 0, 3, 3)]
    for (rate, seed), line in zip(trials, lines, strict=True):
        assert f"--model.lr={rate}" in line and f"--seed_everything={seed} " in line
