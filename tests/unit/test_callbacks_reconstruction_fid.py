"""ReconstructionFID on a tokenizer whose error is known: what it measures, writes, and refuses."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA, ReconstructionFID
from flextok_pl.metrics.images import to_uint8

STRIPS, SIDE, STEPS = 8, 32, 4


class StripTokenizer:
    """Token i is the colour of strip i in 4 levels per channel; strips beyond the budget are grey with noise."""

    num_registers = STRIPS

    def __init__(self, module):
        self.module = module

    def tokenize(self, images, num_tokens=None):
        colours = images.reshape(len(images), 3, STRIPS, -1).mean(-1)
        digits = ((colours + 1) / 2 * STEPS).floor().clamp(0, STEPS - 1).long()
        return (digits * torch.tensor([1, STEPS, STEPS**2])[:, None]).sum(1)[:, :num_tokens]

    def detokenize(
        self, tokens, num_tokens=None, num_steps=25, guidance="apg", guidance_scale=7.5, generator=None, **_
    ):
        assert isinstance(num_tokens, int) and len(generator) == len(tokens)
        digits = tokens[:, None] // torch.tensor([1, STEPS, STEPS**2])[:, None] % STEPS
        colours = (digits + 0.5) / STEPS * 2 - 1
        noise = torch.stack([torch.randn(3, SIDE, SIDE, generator=g) for g in generator])
        images = 0.3 * noise
        height = SIDE // STRIPS
        images[:, :, : num_tokens * height] = colours[:, :, :num_tokens].repeat_interleave(height, 2)[..., None]
        return images + self.module.bias


class StripModule(LightningModule):
    def __init__(self, lr=0.0):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.reconstructor = StripTokenizer(self)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.bias  # SGD lowers the bias by `lr` at every step

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(count, 3, STRIPS, generator=generator) * 1.8 - 0.9
    images = colours.repeat_interleave(SIDE // STRIPS, 2)[..., None].expand(-1, -1, -1, SIDE)
    images = images + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return [{"image": image.clamp(-1, 1), "key": f"picture{i}", "label": 0} for i, image in enumerate(images)]


class Pictures(LightningDataModule):
    def __init__(self, samples, batch_size=5, claimed=None, hash_=None, first_rank=3):
        super().__init__()
        self.first_rank = first_rank  # samples of the first of two processes
        self.samples, self.batch_size, self.claimed = samples, batch_size, claimed
        if hash_ is not None:
            self.data_hash = lambda split: hash_

    def num_samples(self, split):
        return self.claimed or len(self.samples)

    def _mine(self):
        if self.trainer is None or self.trainer.world_size == 1:
            return self.samples
        return self.samples[: self.first_rank] if self.trainer.global_rank == 0 else self.samples[self.first_rank :]

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self._mine(), batch_size=self.batch_size)

    test_dataloader = val_dataloader


class TinyExtractor:
    """Mean colour of each strip, a feature that can be computed by hand."""

    name, metric_name, kernel_metric_name = "strips", "fd_strips", "kd_strips"
    dim, weights_hash, resize = 3 * STRIPS, "0" * 16, "none"
    seen = 0

    def __call__(self, images):
        TinyExtractor.seen += len(images)
        return images.float().reshape(len(images), 3, STRIPS, -1).mean(-1).flatten(1) / 255

    def to(self, device):
        return self


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    monkeypatch.setattr("flextok_pl.evaluation.budget_evaluation.build_extractor", lambda *_: TinyExtractor())
    TinyExtractor.seen = 0
    if "files" not in request.node.name:  # a plot takes longer than all the rest
        monkeypatch.setattr("flextok_pl.evaluation.report.plot_budgets", lambda *args: None)


def trainer_for(tmp_path, callback, **options):
    options = {"logger": False, "max_epochs": 1, **options}
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[callback, *options.pop("callbacks", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **options,
    )


def evaluate(tmp_path, samples=None, module=None, data=None, **options):
    callback = ReconstructionFID(**{"cache_dir": None, "output_dir": tmp_path, **options})
    data = data or Pictures(pictures(17) if samples is None else samples)
    trainer_for(tmp_path, callback).test(module or StripModule(), data, verbose=False)
    return callback


def test_values_files_and_table(tmp_path, capsys):
    samples = pictures(17)
    callback = evaluate(tmp_path, samples)
    assert list(callback.values) == [1, 2, 4, 8]
    by_metric = {m: [callback.values[k][m] for k in (1, 2, 4, 8)] for m in callback.values[1]}
    for name in ("fd_strips", "mae", "mse", "mse_over_variance"):
        assert by_metric[name] == sorted(by_metric[name], reverse=True), name
    for name in ("psnr", "ssim"):
        assert by_metric[name] == sorted(by_metric[name]), name

    images = to_uint8(torch.stack([sample["image"] for sample in samples])).double() / 255
    variance = images.var(0, correction=0).mean()
    assert by_metric["mse_over_variance"][2] == pytest.approx(by_metric["mse"][2] / float(variance), rel=1e-9)
    # At the full budget only the colour steps and the pictures' own noise are lost: (1/4)^2 / 12 + (0.05 / 2)^2.
    assert by_metric["mse"][-1] == pytest.approx(1 / 16 / 12 + 0.025**2, rel=0.15)

    records = json.loads((tmp_path / "rfid.json").read_text())
    assert len(records) == 4 * len(by_metric)
    (record,) = [r for r in records if r["metric"] == "fd_strips" and r["num_tokens"] == 4]
    assert record["value"] == callback.values[4]["fd_strips"]
    wanted = {
        "num_samples": 17,
        "samples_in_split": 17,
        "complete": True,
        "num_steps": 25,
        "guidance": "none",
        "seed": 0,
    }
    wanted |= {"extractor": "strips", "image_size": [32, 32], "precision": "32-true", "model_weights": "loaded"}
    assert wanted.items() <= record.items()
    assert record["full_rank"] is False
    assert len(record["data_hash"]) == 16 and record["versions"]["torch"] == torch.__version__

    rows = list(csv.DictReader((tmp_path / "rfid.csv").open()))
    assert [row["num_tokens"] for row in rows] == ["1", "2", "4", "8"]
    assert float(rows[1]["mse"]) == callback.values[2]["mse"]
    assert Image.open(tmp_path / "rfid.png").size[0] > 600
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size[0] == 5 * 34 + 2 and grid.size[1] > 8 * 34

    printed = capsys.readouterr().out
    assert "mse_over_variance" in printed and "of 17 images and 24 features compares" in printed
    assert len([line for line in printed.splitlines() if line.strip()[:2] in ("1 ", "2 ", "4 ", "8 ")]) == 4


def test_results_do_not_depend_on_batches_or_order(tmp_path):
    samples = pictures(17)
    first = evaluate(tmp_path / "a", data=Pictures(samples, batch_size=17))
    second = evaluate(tmp_path / "b", data=Pictures(samples[::-1], batch_size=3))
    for budget, metrics in first.values.items():
        for name, value in metrics.items():
            assert second.values[budget][name] == pytest.approx(value, rel=1e-6), name
    hashes = {json.loads((tmp_path / run / "rfid.json").read_text())[0]["data_hash"] for run in "ab"}
    assert len(hashes) == 1
    assert (tmp_path / "a/grid.png").read_bytes() == (tmp_path / "b/grid.png").read_bytes()
    other = evaluate(tmp_path / "c", samples, seed=1)
    assert other.values[1]["mse"] != first.values[1]["mse"]


@pytest.mark.parametrize("first_rank", [3, 16])
def test_two_processes_are_one(tmp_path, first_rank):
    alone = evaluate(tmp_path / "one")
    callback = ReconstructionFID(cache_dir=None, output_dir=tmp_path / "two")
    trainer_for(tmp_path, callback, strategy="ddp_fork", devices=2).test(
        StripModule(), Pictures(pictures(17), first_rank=first_rank), verbose=False
    )
    for record in json.loads((tmp_path / "two/rfid.json").read_text()):
        expected = alone.values[record["num_tokens"]][record["metric"]]
        assert record["value"] == pytest.approx(expected, rel=1e-6), record["metric"]
        assert record["num_samples"] == 17
    for name in ("grid.png", "extremes.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_fit_measures_a_cheap_subset_and_charts_it(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb")
    callback = ReconstructionFID(cache_dir=None, max_samples=20, every_n_validations=2)
    trainer = trainer_for(tmp_path, callback, logger=logger, max_epochs=2)
    trainer.fit(StripModule(), datamodule=Pictures(pictures(40)))
    assert list(callback.values) == [1, 4, 8]
    assert trainer.callback_metrics["val/mse/k=004"].item() == pytest.approx(callback.values[4]["mse"], rel=1e-5)
    folder = tmp_path / "tb/version_0/rfid_fit"
    assert sorted(file.name for file in folder.iterdir()) == ["grid.png", "rfid.json"]
    (record, *_) = json.loads((folder / "rfid.json").read_text())
    assert 10 < record["num_samples"] < 30 and record["complete"] is False and record["samples_read"] == 40
    assert record["model_weights"] == "raw" and record["step"] == 16

    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    for budget in (1, 4, 8):
        (event,) = events.Scalars(f"val/mse/k={budget:03d}")
        assert event.value == pytest.approx(callback.values[budget]["mse"], rel=1e-5)
    assert events.Images("val/reconstructions")[0].width == 4 * 34 + 2
    charts = EventAccumulator(f"{logger.log_dir}/charts/rfid").Reload()
    curve = {each.step: each.value for each in charts.Scalars("val: reconstructions against token budget/mse")}
    assert curve == pytest.approx({k: values["mse"] for k, values in callback.values.items()}, rel=1e-5)
    layout = charts.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0].decode("utf-8", "replace")
    assert all(f"val/mse/k={budget:03d}" in layout for budget in (1, 4, 8))


def test_averaged_weights_are_measured_and_named(tmp_path):
    """Every step lowers the bias by 0.1, so it is -0.4 after 4 steps, and its average lags behind."""
    data, options = Pictures(pictures(20)), {"cache_dir": None, "max_samples": None, "fit_budgets": [8]}

    def measured(bias):
        module = StripModule()
        module.bias.data.fill_(bias)
        return evaluate(tmp_path, data=data, module=module, budgets=[8]).values[8]["mse"]

    raw = ReconstructionFID(**options)
    trainer_for(tmp_path / "raw", raw).fit(StripModule(lr=0.1), datamodule=data)
    assert raw.values[8]["mse"] == pytest.approx(measured(-0.4), rel=1e-5)

    averaged, averaging = ReconstructionFID(**options), EMA(decay=0.5)
    trainer = trainer_for(tmp_path / "ema", averaged, callbacks=[averaging])
    module = StripModule(lr=0.1)
    trainer.fit(module, datamodule=data)
    ema = module.bias.item()
    assert -0.4 < ema < 0
    assert averaged.values[8]["mse"] == pytest.approx(measured(ema), rel=1e-5)
    (record, *_) = json.loads((tmp_path / "ema/rfid_fit/rfid.json").read_text())
    assert record["model_weights"] == "ema"

    late = ReconstructionFID(every_n_validations=2, **options)
    average = EMA(update_starting_at_step=9)  # in the third epoch, of which nothing is measured
    trainer_for(tmp_path / "late", late, callbacks=[average], max_epochs=3).fit(StripModule(lr=0.1), datamodule=data)
    (record, *_) = json.loads((tmp_path / "late/rfid_fit/rfid.json").read_text())
    assert record["model_weights"] == "initial"
    assert late.values[8]["mse"] == pytest.approx(measured(0), rel=1e-5)


def test_a_checkpoint_with_averaged_weights_is_named_so_where_it_is_tested(tmp_path):
    data = Pictures(pictures(20))
    options = {"cache_dir": None, "budgets": [8]}
    fitted = ReconstructionFID(output_dir=tmp_path / "same", **options)
    trainer = trainer_for(tmp_path, fitted, callbacks=[EMA(decay=0.5)], limit_val_batches=0)
    module = StripModule(lr=0.1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    ema = module.bias.item()

    def record_of(folder):
        return json.loads((tmp_path / folder / "rfid.json").read_text())[0]

    fresh = ReconstructionFID(output_dir=tmp_path / "fresh", **options)
    loaded = StripModule()
    trainer_for(tmp_path, fresh).test(loaded, data, ckpt_path=str(tmp_path / "averaged.ckpt"), verbose=False)
    assert loaded.bias.item() == pytest.approx(ema) and record_of("fresh")["model_weights"] == "ema"
    assert record_of("fresh")["step"] == 4

    trainer.test(module, data, verbose=False)
    assert module.bias.item() == pytest.approx(ema) and record_of("same")["model_weights"] == "ema"


def test_real_statistics_are_kept_on_disk(tmp_path):
    samples, options = pictures(17), {"cache_dir": tmp_path / "cache", "budgets": [8]}
    first = evaluate(tmp_path, data=Pictures(samples, hash_="a"), **options)
    assert TinyExtractor.seen == 34
    second = evaluate(tmp_path, data=Pictures(samples, hash_="a"), **options)
    assert TinyExtractor.seen == 34 + 17
    assert second.values == first.values
    with pytest.raises(RuntimeError, match="other images"):
        evaluate(tmp_path, data=Pictures(pictures(18)[1:], hash_="a"), **options)
    again = evaluate(tmp_path, data=Pictures(pictures(18)[1:], hash_="a"), **options)
    assert again.values != first.values
    evaluate(tmp_path, data=Pictures(samples, hash_="b"), **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_limited_batches_whether_statistics_of_all_are_kept_or_not(tmp_path):
    """Ten of seventeen images are measured against these ten, and the record says that they are not all."""
    options = {"cache_dir": tmp_path / "cache", "output_dir": tmp_path, "budgets": [8]}
    evaluate(tmp_path, data=Pictures(pictures(17), hash_="a"), **options)
    values = []
    for cache in (tmp_path / "cache", None):
        callback = ReconstructionFID(**{**options, "cache_dir": cache})
        data = Pictures(pictures(17), hash_="a")
        trainer_for(tmp_path, callback, limit_test_batches=2).test(StripModule(), data, verbose=False)
        values.append(callback.values[8])
        assert not any(record["complete"] for record in json.loads((tmp_path / "rfid.json").read_text()))
    assert values[0] == values[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_each_sample_exactly_once(tmp_path):
    samples = pictures(10)
    with pytest.raises(RuntimeError, match=r"test set gave 10 samples, 12 were expected.*no number is reported"):
        evaluate(tmp_path, data=Pictures(samples, claimed=12))
    with pytest.raises(RuntimeError, match="1 of 11 samples of the test set repeat a key"):
        evaluate(tmp_path, data=Pictures([*samples, samples[3]]))
    assert not (tmp_path / "rfid.json").exists()


@pytest.mark.parametrize(("limit", "read"), [(1, 5), (2, 10), (0.5, 10)])
def test_limited_batches_say_so(tmp_path, capsys, limit, read):
    callback = ReconstructionFID(cache_dir=None, output_dir=tmp_path, budgets=[8])
    trainer_for(tmp_path, callback, limit_test_batches=limit).test(StripModule(), Pictures(pictures(17)), verbose=False)
    (record, *_) = json.loads((tmp_path / "rfid.json").read_text())
    assert (record["num_samples"], record["samples_in_split"], record["complete"]) == (read, 17, False)
    assert f"only {read} of 17 samples were read" in capsys.readouterr().out


def test_all_budgets(tmp_path):
    assert list(evaluate(tmp_path, budgets="all").values) == list(range(1, 9))


def test_modules_and_batches_that_do_not_fit(tmp_path):
    class Autoencoder(StripModule):
        def __init__(self):
            super().__init__()
            del self.reconstructor

    with pytest.raises(MisconfigurationException, match=r"Autoencoder has no `reconstructor`.*remove it for a VAE"):
        evaluate(tmp_path, module=Autoencoder())
    with pytest.raises(MisconfigurationException, match="Autoencoder has no"):
        trainer_for(tmp_path, ReconstructionFID()).fit(Autoencoder(), datamodule=Pictures(pictures(4)))
    latents = [{"latent": torch.zeros(2, 2, 2), "key": sample["key"]} for sample in pictures(4)]
    with pytest.raises(MisconfigurationException, match=r"no image, it holds \['key', 'latent'\].*data\.val"):
        evaluate(tmp_path, latents)
    with pytest.raises(MisconfigurationException, match="num_samples"):
        loader = DataLoader(pictures(4), batch_size=2)
        trainer_for(tmp_path, ReconstructionFID()).test(StripModule(), loader, verbose=False)
    with pytest.raises(ValueError, match="budgets holds 9, but the tokenizer has 8"):
        evaluate(tmp_path, budgets=[1, 9])
    with pytest.raises(ValueError, match="rfid.fit_budgets holds 9"):
        trainer_for(tmp_path, ReconstructionFID(fit_budgets=[1, 9])).fit(StripModule(), Pictures(pictures(4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0, 1]}, "budgets=.0, 1. must be different positive"),
        ({"budgets": [4, 4]}, "different positive"),
        ({"budgets": []}, "different positive"),
        ({"budgets": "some"}, "budgets='some'"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"guidance": "strong"}, "guidance='strong'"),
        ({"guidance_scale": 2.0}, "no effect with guidance='none'"),
        ({"extractor": "inception"}, "use one of effnet-lite0, inception-v3-compat"),
        ({"weights": "/nowhere.pth"}, "not a file"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionFID(**options)


def test_a_diverged_model_is_named(tmp_path):
    module = StripModule()
    module.bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="diverged"):
        evaluate(tmp_path, module=module)


def test_the_offline_extractor_in_a_whole_evaluation(tmp_path, monkeypatch):
    monkeypatch.undo()
    callback = evaluate(tmp_path, pictures(6), budgets=[1, 8])
    assert callback.values[8]["fd_effnet_lite0"] < callback.values[1]["fd_effnet_lite0"]
    metrics = {record["metric"] for record in json.loads((tmp_path / "rfid.json").read_text())}
    assert not any("inception" in metric or "fid" in metric for metric in metrics)


def test_the_best_and_the_worst_images_are_shown(tmp_path):
    samples = pictures(9)
    for i, sample in enumerate(samples):  # the more noise in the picture, the larger the error
        noise = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(i))
        sample["image"] = (sample["image"] + 0.1 * (i * 4 % 9) * noise).clamp(-1, 1)
    evaluate(tmp_path, samples, budgets=[8])
    shown = torch.from_numpy(np.asarray(Image.open(tmp_path / "extremes.png")).copy()).permute(2, 0, 1)
    by_noise = sorted(range(9), key=lambda i: i * 4 % 9)
    left, step = 2 * SIDE + 2, SIDE + 2
    for row, i in enumerate([*by_noise[:3], *by_noise[:-4:-1]]):
        top = shown.shape[1] - (6 - row) * step
        original = shown[:, top : top + SIDE, left : left + SIDE]
        assert torch.equal(original, to_uint8(samples[i]["image"])), f"row {row}"
        made = shown[:, top : top + SIDE, left + step : left + step + SIDE]
        assert 1 < (made.float() - original.float()).abs().mean() < 100, "its reconstruction is beside it"


def test_variance_over_seeds(tmp_path):
    """Beyond the budget the strips are noise of deviation 0.3 on [-1, 1], 0.15 on [0, 1]."""
    callback = evaluate(tmp_path, budgets=[2, 8], num_seeds=3)
    first = evaluate(tmp_path, budgets=[2, 8])
    assert "seed_variance" not in first.values[2]
    assert callback.values[2].pop("seed_variance") == pytest.approx(0.15**2 * 6 / 8, rel=0.05)
    assert callback.values[8].pop("seed_variance") == 0
    assert callback.values == first.values, "all else is measured on the first seed"


class Killed(Exception):
    pass


class DyingModule(StripModule):
    """Dies at its `deadline`-th decoding."""

    def __init__(self, deadline):
        super().__init__()
        self.decoded, decode = 0, self.reconstructor.detokenize

        def detokenize(*args, **kwargs):
            self.decoded += 1
            if self.decoded == deadline:
                raise Killed
            return decode(*args, **kwargs)

        self.reconstructor.detokenize = detokenize


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    samples, cache = pictures(17), tmp_path / "cache"
    options = {"cache_dir": cache, "budgets": [2, 8], "save_every_minutes": 0}

    def run(name, deadline=None, **changes):
        module = DyingModule(deadline)
        evaluate(tmp_path / name, samples, module, Pictures(samples, hash_="one"), **{**options, **changes})
        return (
            module.decoded,
            (tmp_path / name / "rfid.json").read_text(),
            [(tmp_path / name / file).read_bytes() for file in ("grid.png", "extremes.png")],
        )

    _, records, picture = run("whole", cache_dir=tmp_path / "other")
    for name, deadline in (("first", 6), ("second", 3)):  # in the third batch of four, and in the second of the rest
        with pytest.raises(Killed):
            run(name, deadline)
        assert len(list(cache.glob("unfinished_*"))) == 1
    with pytest.raises(Killed):
        run("another picture", 1, grid_samples=2)  # nothing of the others is taken
    decoded, after, after_picture = run("third")
    assert decoded == 2, "three of four batches were done"
    assert (after, after_picture) == (records, picture)
    assert not list(cache.glob("unfinished_*"))
    assert run("again")[0] == 8


def test_a_resumed_evaluation_still_finds_keys_that_come_twice(tmp_path):
    samples = pictures(10)
    options = {"cache_dir": tmp_path / "cache", "budgets": [8], "save_every_minutes": 0}
    with pytest.raises(Killed):
        evaluate(tmp_path, samples, DyingModule(2), Pictures(samples, hash_="one"), **options)
    twice = [*samples[:5], *samples[:5]]
    with pytest.raises(RuntimeError, match="repeat a key"):
        evaluate(tmp_path, twice, StripModule(), Pictures(twice, hash_="one"), **options)
