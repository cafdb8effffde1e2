"""Each run has a folder of its own, whatever its logger: it goes on in it, and leaves none where it does not start."""

import copy
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers import wandb as wandb_logger
from lightning.pytorch.loggers.logger import Logger

from flextok_pl.cli import main
from flextok_pl.cli.run_place import RunPlace
from flextok_pl.cli.training import FlexTokCLI
from flextok_pl.errors import UserError
from flextok_pl.runtime import AtomicCheckpointIO

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "tokenizer" / "tiny.yaml"


class Service(Logger):
    """A logger that keeps nothing in a folder, and cannot show pictures."""

    def __init__(self, save_dir: str = "elsewhere") -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


CSV = "lightning.pytorch.loggers.CSVLogger"
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"
WANDB = "lightning.pytorch.loggers.WandbLogger"
LOGGERS = {
    "none": "false",
    "both": json.dumps([{"class_path": kind, "init_args": {"save_dir": "runs"}} for kind in (CSV, TENSORBOARD)]),
    "service": json.dumps({"class_path": f"{__name__}.Service", "init_args": {"save_dir": "runs"}}),
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "tokenizer" / "tiny"


def fit(shards: Path, steps: int, *options: str) -> None:
    sets = ["--data.train", str(shards / "train"), "--data.val", str(shards / "val"), "--rfid", "null"]
    quick = ["--model.warmup_steps=0", "--trainer.limit_val_batches=0", "--hparams=null", "--codebook=null"]
    main(["fit", "--config", str(EXPERIMENT), *sets, *quick, f"--trainer.max_steps={steps}", *options])


def step_of(run: Path) -> int:
    return int(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize("logger", LOGGERS)
def test_each_run_has_its_folder_and_goes_on_in_it(logger: str, image_shards: Path, workplace: Path) -> None:
    options = [f"--trainer.logger={LOGGERS[logger]}", "--trainer.log_every_n_steps=1"]
    runs = [workplace / "version_0", workplace / "version_1"][: 2 if logger == "none" else 1]
    for run in runs:
        fit(image_shards, 1, *options)
        assert {"config.yaml", "checkpoints", "tokenizer.safetensors"} <= {path.name for path in run.iterdir()}
    fit(image_shards, 2, *options, "--ckpt_path=last")
    assert sorted(workplace.iterdir()) == runs and step_of(runs[-1]) == 2
    assert {path.name for path in Path().iterdir()} == {"runs"}, "nothing lies beside the runs"
    metrics = {path.name for path in runs[-1].glob("metrics*.csv")}
    assert metrics == ({"metrics.csv", "metrics_0.csv"} if logger == "both" else set())
    saved = yaml.safe_load((runs[-1] / "config.yaml").read_text())["trainer"]
    assert saved["default_root_dir"] is None, "the configuration may be given again, for another run"
    if logger == "both":
        assert [each["init_args"]["version"] for each in saved["logger"]] == [None, None]


def options_of(logger: object, default_root_dir: str | None = None) -> Namespace:
    return Namespace(logger=logger, default_root_dir=default_root_dir)


def configured(kind: str, **options: Any) -> Namespace:
    return Namespace(class_path=kind, init_args=Namespace(**options))


@pytest.mark.parametrize(
    ("trainer", "folder"),
    [
        (options_of(True), "runs/x/y/version_3"),
        (options_of(None, "there"), "there/x/y/version_0"),
        (options_of(False, "there"), "there/x/y/version_0"),
        (options_of(True, "~/there"), "~/there/x/y/version_0"),
        (options_of(configured(CSV, save_dir="~", name="x", version=1)), "~/x/version_1"),
        (options_of([]), "runs/x/y/version_3"),
        (options_of(configured(CSV, save_dir="runs", name="lightning_logs", version=None)), "runs/x/y/version_3"),
        (options_of(configured(CSV, save_dir="runs", name="other", version=None)), "runs/other/version_0"),
        (options_of(configured(TENSORBOARD, save_dir="logs", name="x/y", version=12)), "logs/x/y/version_12"),
        (options_of(configured(TENSORBOARD, save_dir="runs", name="x/y", version="mine")), "runs/x/y/mine"),
        (options_of(configured(WANDB, save_dir=".", name="shown", version="id")), "runs/x/y/version_3"),
        (options_of([configured(WANDB, save_dir="w", name=None)], "there"), "w/x/y/version_0"),
    ],
)
def test_where_a_run_lies(trainer: Namespace, folder: str) -> None:
    for name in ("version_0", "version_2", "version_old", "mine"):
        Path("runs", "x", "y", name).mkdir(parents=True)
    folder = os.path.expanduser(folder)
    place = RunPlace(trainer, "x/y")
    place.settle(go_on=False)
    assert place.folder == Path(folder)
    before = copy.deepcopy(trainer)
    with place.told_to_the_trainer():
        assert trainer.default_root_dir == folder
        if isinstance(trainer.logger, Namespace) and trainer.logger.class_path != WANDB:
            options = trainer.logger.init_args
            logger = CSVLogger(options.save_dir, options.name, options.version)
            assert Path(logger.log_dir) == Path(folder)
    assert trainer == before


class Run:
    """What W&B gives for a run."""

    def __init__(self, **options: Any) -> None:
        self.id, self.name = options["id"] or "made", options["name"]
        self.config, self.summary = self, {}
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, *names: Any, **options: Any) -> None:
        pass

    def update(self, *options: Any, **more: Any) -> None:
        pass

    def log(self, values: dict[str, Any], **options: Any) -> None:
        self.logged.append(values)


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Lets Lightning's `WandbLogger` work with a W&B that remembers; returns the runs."""
    runs: list[Run] = []
    parts = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")}

    def init(**options: Any) -> Run:
        runs.append(Run(**options))
        return runs[-1]

    vars(parts["wandb"]).update(run=None, init=init, Image=lambda pixels: pixels, Histogram=dict)
    vars(parts["wandb.wandb_run"]).update(Run=Run)
    vars(parts["wandb.sdk.lib"]).update(RunDisabled=type(None))
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(wandb_logger, "_WANDB_AVAILABLE", True)
    return runs


def test_a_run_of_wandb_goes_on_and_shows_pictures(
    image_shards: Path, workplace: Path, wandb_runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--trainer.logger=WandbLogger", "--codebook={}", "--trainer.limit_val_batches=1"]
    fit(image_shards, 1, *options)
    fit(image_shards, 2, *options, "--ckpt_path=last")
    assert [(run.id, run.name) for run in wandb_runs] == [("made", "tokenizer/tiny/version_0"), ("made", None)]
    assert {path.name for path in workplace.iterdir()} == {"version_0"} and step_of(workplace / "version_0") == 2
    for run in wandb_runs:
        (picture,) = (each for values in run.logged for each in values.get("val/codes/entropy_by_position", []))
        assert picture.ndim == 3 and picture.shape[2] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.warmup_steps=2"], "warmup_steps=2 must be below"),
        (["--trainer.logger=false", "--model.warmup_steps=2"], "warmup_steps=2 must be below"),
    ],
)
def test_a_start_that_fails_leaves_no_folder(
    options: list[str], message: str, image_shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=message):
        fit(image_shards, 2, *options)
    assert not list(Path().iterdir())


def test_a_configuration_is_saved_whole(image_shards: Path, workplace: Path) -> None:
    """What came from other files, too: a folder needs no more than its own."""
    sets = {split: str(image_shards / split) for split in ("train", "val")}
    Path("sets.yaml").write_text(yaml.safe_dump({**sets, "image_size": 32}))
    given = ["fit", "--config", str(EXPERIMENT), "--data", "sets.yaml", "--rfid", "null", "--codebook", "null"]
    with pytest.raises(SystemExit, match="warmup_steps=1 must be below"):
        main([*given, "--trainer.max_steps=1", "--model.warmup_steps=1"])
    assert not workplace.exists()
    main([*given, "--trainer.max_steps=1", "--model.warmup_steps=0", "--trainer.limit_val_batches=0"])
    saved = yaml.safe_load((workplace / "version_0" / "config.yaml").read_text())
    assert saved["data"]["train"] == str(image_shards / "train")
    assert not (workplace / "version_0" / "sets.yaml").exists()


def test_a_run_with_a_name(tmp_path: Path) -> None:
    """It is found by its name, and without one where it has trained last; a number is taken for a name, too."""

    def place(run: str | None = None) -> RunPlace:
        return RunPlace(options_of(False, str(tmp_path)), "x", run)

    assert place().last_checkpoints(True) is None and place("mine").last_checkpoints(True) is None
    for age, name in enumerate(("mine", "7", "version_3", "version_12")):
        file = tmp_path / "x" / name / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        AtomicCheckpointIO().save_checkpoint({"global_step": age}, file)
        os.utime(file, (100 - age, 100 - age))
    for run in ("mine", "7"):
        found = place(run)
        assert found.last_checkpoints(True) == str(tmp_path / "x" / run / "checkpoints")
        found.settle(go_on=True)
        assert found.folder == tmp_path / "x" / run
    newest = place()
    assert newest.last_checkpoints(True) is not None and newest.version == "mine"
    os.utime(tmp_path / "x" / "version_3" / "checkpoints" / "last.ckpt")
    newest = place()
    assert newest.last_checkpoints(True) is not None and newest.version == 3
    new = place()
    assert new.last_checkpoints(False) == str(tmp_path / "x" / "version_3" / "checkpoints")
    new.settle(go_on=False)
    assert new.version == 13


@pytest.mark.parametrize(
    ("run", "version", "message"),
    [("a/b", None, "run='a/b' must be the name of a folder"), ("..", None, "must be"), ("a", 1, "both name the run")],
)
def test_wrong_names(run: str, version: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunPlace(options_of(configured(CSV, save_dir="runs", version=version)), "x", run)


def test_the_last_may_be_parsed_as_a_path(image_shards: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of its types `ckpt_path` has, `str` or `Path`, depends on what was imported before Lightning."""
    parse = FlexTokCLI.parse_arguments

    def parse_as_path(cli: FlexTokCLI, *given: Any) -> None:
        parse(cli, *given)
        cli.config.ckpt_path = Path(cli.config.ckpt_path)

    monkeypatch.setattr(FlexTokCLI, "parse_arguments", parse_as_path)
    fit(image_shards, 1, "--ckpt_path=last")
    fit(image_shards, 2, "--ckpt_path=last")
    assert step_of(workplace / "version_0") == 2


def test_a_run_is_not_written_over(image_shards: Path, workplace: Path) -> None:
    options = ["--trainer.logger.init_args.version=7"]
    fit(image_shards, 1, *options)
    before = (workplace / "version_7" / "tokenizer.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"version_7 already holds a run; .*--ckpt_path last"):
        fit(image_shards, 2, *options)
    assert (workplace / "version_7" / "tokenizer.safetensors").read_bytes() == before
    with pytest.raises(SystemExit, match="warmup_steps=2 must be below"):
        fit(image_shards, 2, *options, "--ckpt_path=last", "--model.warmup_steps=2")
    assert (workplace / "version_7" / "checkpoints" / "last.ckpt").is_file(), "what was there stays"


def test_what_a_training_says(
    image_shards: Path, workplace: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit(image_shards, 2, "--trainer.limit_val_batches=1", "--hparams={}")
    said = capfd.readouterr()
    folder = "runs/tokenizer/tiny/version_0"
    shown = [line for line in said.out.splitlines() if not line.startswith(("step 1  val", "step 2  val"))]
    assert "tokenizer/tiny: TokenizerModule, 0.337 M trained parameters" in shown
    assert f"results in {folder}" in shown and "on 1 x cpu, precision 32-true" in shown
    assert shown[-2].startswith("step 2/2  loss ")
    assert shown[-1] == f"tokenizer exported to {folder}/tokenizer.safetensors"
    assert len(shown) < 10
    assert not [record for record in caplog.records if record.levelno <= logging.INFO and "lightning" in record.name]
