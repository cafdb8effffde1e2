"""What each logger gets: as itself where it takes it, drawn where it takes pictures, and nothing else."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers import mlflow as mlflow_logger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flextok_pl.callbacks.charts import Chart
from flextok_pl.callbacks.loggers import log_results, tensorboard_folders

CHART = Chart(
    name="rfid",
    title="val: reconstructions",
    axis="token budget",
    tags={"psnr": {1: "val/psnr/k=001", 4: "val/psnr/k=004"}},
    curves={"psnr": {1: 9.0, 2: 10.0, 4: 12.0}, "mse": {1: 0.3, 2: 0.2, 4: 0.1}},
)
PICTURE = torch.arange(3 * 8 * 6, dtype=torch.uint8).view(3, 8, 6)
TOKENS = torch.tensor([[0, 1], [1, 7]])
HEADING = "val: reconstructions against token budget"


class NumbersOnly(Logger):
    """Any other logger."""

    name = version = None

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.numbers |= metrics

    def log_hyperparams(self, params: Any) -> None:
        pass


class WithImages(NumbersOnly):
    """One of others, with the method that W&B's has."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: dict[str, np.ndarray] = {}

    def log_image(self, key: str, images: list[np.ndarray], step: int | None = None) -> None:
        (self.pictures[key],) = images


def trainer_with(*loggers: Any) -> Any:
    state = SimpleNamespace(fn=TrainerFn.TESTING)
    return SimpleNamespace(loggers=list(loggers), is_global_zero=True, state=state, callback_metrics={})


def log_to(*loggers: Any) -> None:
    pictures, histograms = {"val/grid": PICTURE}, {"val/codes/tokens": TOKENS}
    log_results(trainer_with(*loggers), LightningModule(), 30, CHART.scalars, pictures, histograms, CHART)
    for logger in loggers:
        logger.finalize("success")


def test_no_logger_at_all() -> None:
    log_to()
    assert tensorboard_folders(trainer_with()) == []


def test_several_loggers_at_once(tmp_path: Path) -> None:
    board, files = TensorBoardLogger(tmp_path, "board", version=0), CSVLogger(tmp_path, "csv", version=0)
    plain, pictured = NumbersOnly(), WithImages()
    log_to(board, files, plain, pictured)
    assert tensorboard_folders(trainer_with(board, files)) == [Path(board.log_dir)]

    events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
    assert {kind: events.Tags()[kind] for kind in ("scalars", "images", "histograms")} == {
        "scalars": ["val/psnr/k=001", "val/psnr/k=004"],
        "images": ["val/grid"],
        "histograms": ["val/codes/tokens"],
    }
    charts = EventAccumulator(f"{board.log_dir}/charts/rfid").Reload()
    assert [(e.step, e.value) for e in charts.Scalars(f"{HEADING}/psnr")] == [(1, 9), (2, 10), (4, 12)]

    assert plain.numbers == pictured.numbers == CHART.scalars
    assert set(pictured.pictures) == {"val/grid", "val/codes/tokens", HEADING}
    assert np.array_equal(pictured.pictures["val/grid"], PICTURE.permute(1, 2, 0).numpy())

    made = {str(file.relative_to(files.log_dir)) for file in Path(files.log_dir).rglob("*.png")}
    names = ("val/grid", "val/codes/tokens", HEADING.replace(":", ""))
    assert made == {f"pictures/{name}/step0000030.png" for name in names}
    picture = np.asarray(Image.open(Path(files.log_dir, "pictures", "val/grid", "step0000030.png")))
    assert np.array_equal(picture, PICTURE.permute(1, 2, 0).numpy())
    assert len(np.unique(pictured.pictures[HEADING].reshape(-1, 3), axis=0)) > 10, "curves are drawn"


def test_other_processes_log_no_pictures() -> None:
    logger = WithImages()
    trainer = trainer_with(logger)
    trainer.is_global_zero = False
    log_results(trainer, LightningModule(), 1, {}, {"val/grid": PICTURE}, {"tokens": TOKENS}, CHART)
    assert not logger.pictures


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="p", settings=wandb.Settings(console="off"))
    try:
        log_to(logger)
        folder = Path(logger.experiment.dir)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
        wandb.teardown()
    assert summary["val/psnr/k=004"] == 12 and summary["trainer/global_step"] == 30
    assert summary["val/codes/tokens"]["_type"] == "histogram"
    assert len(list(folder.rglob("media/images/val/grid*.png"))) == 1
    tables = [json.loads(file.read_text()) for file in folder.rglob("*.table.json")]
    assert {tuple(row[1:]) for table in tables for row in table["data"]} >= {("psnr", 12.0), ("mse", 0.1)}


class RecordingClient:
    """The methods of MLflow's client that are used, as it documents them."""

    def __init__(self) -> None:
        self.images: dict[str, tuple[str, np.ndarray, int]] = {}
        self.metrics: dict[str, float] = {}

    def log_image(
        self,
        run_id: str,
        image: np.ndarray,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        assert key is not None and step is not None and image.dtype == np.uint8
        self.images[key] = (run_id, image, step)

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.metrics |= {each.key: each.value for each in metrics}

    def get_run(self, run_id: str) -> None:
        return None


@pytest.mark.filterwarnings("ignore:MLFlow only allows")
def test_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    client, metric = RecordingClient(), lambda **given: SimpleNamespace(**given)
    monkeypatch.setattr(mlflow_logger, "_MLFLOW_AVAILABLE", True)
    tracking = SimpleNamespace(MlflowClient=lambda uri: client)
    for name, module in {
        "mlflow": SimpleNamespace(tracking=tracking, entities=SimpleNamespace(Metric=metric)),
        "mlflow.tracking": tracking,
        "mlflow.entities": SimpleNamespace(Metric=metric),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    logger = MLFlowLogger("experiment", run_id="run")
    logger._initialized = True
    log_to(logger)
    assert client.metrics == {"val/psnr/k001": 9, "val/psnr/k004": 12}
    assert {name: (run, step) for name, (run, _, step) in client.images.items()} == dict.fromkeys(
        ("val/grid", "val/codes/tokens", HEADING.replace(":", "")), ("run", 30)
    )
    assert np.array_equal(client.images["val/grid"][1], PICTURE.permute(1, 2, 0).numpy())
