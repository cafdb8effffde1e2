"""ReconstructionFID and GenerationFID in a trainer: when they measure, which weights, what they log and refuse."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA, GenerationFID, ReconstructionFID
from flextok_pl.runtime import Preempted, Preemption

SIDE, LENGTH, CLASSES = 16, 8, 3


class NoisyTokenizer:
    """Decodes everything as noise around the module's bias, which is less noisy the more tokens there are."""

    num_registers = LENGTH

    def __init__(self, module):
        self.module = module

    def tokenize(self, images, num_tokens=None):
        return torch.zeros(len(images), LENGTH, dtype=torch.int64)[:, :num_tokens]

    def detokenize(self, tokens, num_tokens=None, generator=None, **_):
        noise = torch.stack([torch.randn(3, SIDE, SIDE, generator=g) for g in generator])
        return 0.3 * noise / num_tokens[:, None, None, None] + self.module.bias


class Module(LightningModule):
    """Generates tokens that mean nothing; SGD lowers its bias by `lr` at every step."""

    condition_kind, num_classes, class_names = "class", CLASSES, ("red", "green", "blue")

    def __init__(self, lr=0.0, bias=0.0):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor(bias))
        self.reconstructor = NoisyTokenizer(self)
        self.lr, self.asked = lr, []

    def generate_tokens(self, condition, *_, **__):
        self.asked.append(condition)
        return torch.zeros(len(condition), LENGTH, dtype=torch.int64)

    def training_step(self, batch, batch_idx):
        return self.bias

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Pictures(LightningDataModule):
    image_size = SIDE

    def __init__(self, count=17, batch_size=5, of_first_rank=3, fields=("image", "key", "label")):
        super().__init__()
        images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 0.5
        samples = [{"image": image, "key": f"picture{i}", "label": i % CLASSES} for i, image in enumerate(images)]
        self.samples = [{name: sample[name] for name in fields} for sample in samples]
        self.batch_size, self.of_first_rank = batch_size, of_first_rank

    def num_samples(self, split):
        return len(self.samples)

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.batch_size)

    def val_dataloader(self):
        if self.trainer.world_size == 1:
            return self.train_dataloader()
        first, n = self.trainer.global_rank == 0, self.of_first_rank
        return DataLoader(self.samples[:n] if first else self.samples[n:], batch_size=self.batch_size)

    test_dataloader = val_dataloader


class MeanColours:
    """Of the four corners."""

    name, metric_name, kernel_metric_name = "corners", "fd_corners", "kd_corners"
    dim, weights_hash, resize = 12, "0" * 16, "none"
    device = torch.device("cpu")

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)

    def class_logits(self, features):
        return None

    def to(self, device):
        return self


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("flextok_pl.evaluation.budget_evaluation.build_extractor", lambda *_: MeanColours())
    monkeypatch.setattr("flextok_pl.evaluation.report.plot_budgets", lambda *args: None)


def trainer_for(tmp_path, callback, **options):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[callback, *options.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **{"logger": False, "max_epochs": 1, **options},
    )


def evaluated(tmp_path, callback, module=None, data=None, **options):
    trainer_for(tmp_path, callback, **options).test(module or Module(), data or Pictures(), verbose=False)
    return callback


def records_of(folder, name="rfid"):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("of_first_rank", [3, 16])
def test_two_processes_are_one(tmp_path, of_first_rank):
    alone = evaluated(tmp_path, ReconstructionFID(cache_dir=None, output_dir=tmp_path / "one"))
    callback = ReconstructionFID(cache_dir=None, output_dir=tmp_path / "two")
    evaluated(tmp_path, callback, data=Pictures(of_first_rank=of_first_rank), strategy="ddp_fork", devices=2)
    for record in records_of(tmp_path / "two"):
        expected = alone.values[record["num_tokens"]][record["metric"]]
        assert record["value"] == pytest.approx(expected, rel=1e-6), record["metric"]
        assert record["num_samples"] == 17
    for name in ("grid.png", "extremes.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("kind", "name", "tag", "heading"),
    [(ReconstructionFID, "rfid", "", "reconstructions"), (GenerationFID, "gfid", "generated/", "generated images")],
)
def test_a_fit_measures_less_and_charts_it(tmp_path, kind, name, tag, heading):
    logger = TensorBoardLogger(tmp_path, name="tb")
    callback = kind(cache_dir=None, max_samples=20, every_n_validations=2)
    trainer = trainer_for(tmp_path, callback, logger=logger, max_epochs=4)
    trainer.fit(Module(), datamodule=Pictures(40))
    assert list(callback.values) == [1, 4, 8]
    logged = trainer.callback_metrics[f"val/{tag}fd_corners/k=004"].item()
    assert logged == pytest.approx(callback.values[4]["fd_corners"], rel=1e-5)
    folder = tmp_path / f"tb/version_0/{name}_fit"
    assert {f"{name}.json"} < {file.name for file in folder.iterdir()} and len(list(folder.iterdir())) == 2
    record = records_of(folder, name)[0]
    assert 10 < record["num_samples"] < 30 and record["samples_read"] == 40
    assert record["complete"] is False and (record["model_weights"], record["step"]) == ("raw", 32)

    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    for budget in (1, 4, 8):
        values = [event.value for event in events.Scalars(f"val/{tag}fd_corners/k={budget:03d}")]
        assert len(values) == 2 and values[-1] == pytest.approx(callback.values[budget]["fd_corners"], rel=1e-5)
    assert len(events.Images(f"val/{heading}")) == 2
    charts = EventAccumulator(f"{logger.log_dir}/charts/{name}").Reload()
    curve = {each.step: each.value for each in charts.Scalars(f"val: {heading} against token budget/fd_corners")}
    assert curve == pytest.approx({k: values["fd_corners"] for k, values in callback.values.items()}, rel=1e-5)
    layout = charts.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0].decode("utf-8", "replace")
    assert all(f"val/{tag}fd_corners/k={budget:03d}" in layout for budget in (1, 4, 8))


def test_averaged_weights_are_measured_and_named(tmp_path):
    """Every step lowers the bias by 0.1, so it is -0.4 after 4 steps, and its average lags behind."""
    data, options = Pictures(20), {"cache_dir": None, "max_samples": None, "fit_budgets": [8]}

    def measured(bias):
        callback = ReconstructionFID(cache_dir=None, output_dir=tmp_path, budgets=[8])
        return evaluated(tmp_path, callback, Module(bias=bias), data).values[8]["mse"]

    raw = ReconstructionFID(**options)
    trainer_for(tmp_path / "raw", raw).fit(Module(lr=0.1), datamodule=data)
    assert raw.values[8]["mse"] == pytest.approx(measured(-0.4), rel=1e-5)

    averaged, module = ReconstructionFID(**options), Module(lr=0.1)
    trainer_for(tmp_path / "ema", averaged, callbacks=[EMA(decay=0.5)]).fit(module, datamodule=data)
    ema = module.bias.item()
    assert -0.4 < ema < 0
    assert averaged.values[8]["mse"] == pytest.approx(measured(ema), rel=1e-5)
    assert records_of(tmp_path / "ema/rfid_fit")[0]["model_weights"] == "ema"

    late = ReconstructionFID(every_n_validations=2, **options)
    average = EMA(update_starting_at_step=9)  # in the third epoch, of which nothing is measured
    trainer_for(tmp_path / "late", late, callbacks=[average], max_epochs=3).fit(Module(lr=0.1), datamodule=data)
    assert records_of(tmp_path / "late/rfid_fit")[0]["model_weights"] == "initial"
    assert late.values[8]["mse"] == pytest.approx(measured(0.0), rel=1e-5)


def test_a_checkpoint_with_averaged_weights_is_named_so_where_it_is_tested(tmp_path):
    data, options = Pictures(20), {"cache_dir": None, "budgets": [8]}
    fitted = ReconstructionFID(output_dir=tmp_path / "same", **options)
    trainer = trainer_for(tmp_path, fitted, callbacks=[EMA(decay=0.5)], limit_val_batches=0)
    module = Module(lr=0.1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    ema = module.bias.item()

    fresh, loaded = ReconstructionFID(output_dir=tmp_path / "fresh", **options), Module()
    trainer_for(tmp_path, fresh).test(loaded, data, ckpt_path=str(tmp_path / "averaged.ckpt"), verbose=False)
    record = records_of(tmp_path / "fresh")[0]
    assert loaded.bias.item() == pytest.approx(ema) and (record["model_weights"], record["step"]) == ("ema", 4)

    trainer.test(module, data, verbose=False)
    assert module.bias.item() == pytest.approx(ema) and records_of(tmp_path / "same")[0]["model_weights"] == "ema"


@pytest.mark.parametrize(("limit", "read"), [(1, 5), (2, 10), (0.5, 10), (1.0, 17)])
def test_limited_batches_say_so(tmp_path, monkeypatch, limit, read):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    callback = ReconstructionFID(cache_dir=None, output_dir=f"~/{tmp_path.name}", budgets=[8])
    evaluated(tmp_path, callback, limit_test_batches=limit)
    record = records_of(tmp_path)[0]
    assert (record["num_samples"], record["complete"]) == (read, read == 17)


def test_modules_and_batches_that_do_not_fit(tmp_path):
    class Autoencoder(Module):
        def __init__(self):
            super().__init__()
            del self.reconstructor

    callback = ReconstructionFID(cache_dir=None, output_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"Autoencoder has no `reconstructor`.*remove it for a VAE"):
        evaluated(tmp_path, callback, Autoencoder())
    with pytest.raises(MisconfigurationException, match="Autoencoder has no"):
        trainer_for(tmp_path, callback).fit(Autoencoder(), datamodule=Pictures(4))
    with pytest.raises(MisconfigurationException, match="generates no tokens"):
        evaluated(tmp_path, GenerationFID(cache_dir=None), Autoencoder())
    with pytest.raises(MisconfigurationException, match=r"no image, it holds \['key', 'label'\].*data\.val"):
        evaluated(tmp_path, callback, data=Pictures(fields=("key", "label")))
    with pytest.raises(MisconfigurationException, match="num_samples"):
        evaluated(tmp_path, callback, data=DataLoader(Pictures(4).samples, batch_size=2))


def test_a_signal_within_a_batch_of_many_images_is_heeded(tmp_path):
    """All images of balanced classes are generated with the first batch of pictures."""
    module = Module()
    draw = module.generate_tokens

    def announced(*args, **kwargs):
        if len(module.asked) == 2:  # the picture's rows and four images
            signal.raise_signal(signal.SIGUSR1)
        return draw(*args, **kwargs)

    module.generate_tokens = announced
    callback = GenerationFID(cache_dir=None, num_samples=200, max_samples=None, batch_size=4)
    with pytest.raises(Preempted, match="stopped at step 4, within a validation that will run again, with"):
        trainer_for(tmp_path, callback, callbacks=[Preemption(requeue=False)]).fit(module, Pictures())
    assert len(module.asked) == 3 and (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_never_in_a_fit(tmp_path):
    callback = GenerationFID(cache_dir=None, every_n_validations=0)
    trainer_for(tmp_path, callback).fit(Module(), Pictures())
    assert callback.values == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_budgets": [1, 9]}, "gfid.fit_budgets holds 9, but the tokenizer has 8"),
        ({"budgets": [9]}, "gfid.budgets holds 9"),
        ({"shown": ["pink"]}, "gfid.shown=.*class 'pink' is unknown"),
        ({"conditions": "data", "num_samples": 3}, "num_samples=3 is for balanced classes"),
        ({"classifier": "resnet18"}, "has 2 classes, but the prior has 3"),
    ],
)
def test_what_would_stop_a_validation_stops_before_the_first_step(tmp_path, monkeypatch, options, message):
    classifier = SimpleNamespace(name="two", num_classes=2)
    monkeypatch.setattr("flextok_pl.evaluation.generation.TimmClassifier", lambda *_: classifier)
    module = Module()

    def training_step(batch, batch_idx):
        raise AssertionError("a step came first")

    module.training_step = training_step
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, GenerationFID(cache_dir=None, **options)).fit(module, Pictures())
