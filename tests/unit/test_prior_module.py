"""PriorModule: what a fit logs, stores, averages, exports and repeats, and what it refuses. B batch, K tokens."""

import dataclasses
import math
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA, GenerationFID, TokenReport
from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.data.shards.index import ShardError
from flextok_pl.layers.frozen import Frozen
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import PriorModule
from flextok_pl.modules.saved import SavedPrior

K, V = 16, 30
NET = PriorConfig(num_classes=4, vocab_size=V, num_tokens=K, depth=2, width=32, head_dim=16)
TOKENIZER = dataclasses.replace(FlexTokConfig.preset("tiny"), fsq_levels=(5, 3, 2))
# Ten losses of `test_golden_losses`, on CPU in float32. A change of the maths changes them; a refactor does not.
GOLDEN_LOSSES = [
    3.3931663036346436,
    3.3783016204833984,
    3.4123575687408447,
    3.399008274078369,
    3.4293012619018555,
    3.186251163482666,
    3.175553321838379,
    3.2231688499450684,
    3.259169340133667,
    3.325958251953125,
]


class Sequences(pl.LightningDataModule):
    """Batches of 8 sequences that count up from their class, as token shards give them."""

    def __init__(self, made_by: dict[str, Any] | None = None, classes: tuple[str, ...] = (), **fields: Any) -> None:
        super().__init__()
        self.tokenizer = made_by or {"sha256": "a" * 16, "vocab_size": V, "num_tokens": K}
        self.classes, self.fields = classes, fields

    def batches(self, count: int) -> DataLoader:
        data = []
        for i in range(count):
            labels = torch.arange(8) % 4
            tokens = (labels[:, None] * 7 + torch.arange(K) * (1 + i)) % V
            data.append({"tokens": tokens, "label": labels, "key": [f"b{i}_{j}" for j in range(8)], **self.fields})
        return DataLoader(data, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self.batches(5)

    def val_dataloader(self) -> DataLoader:
        return self.batches(1)


def module(**options: Any) -> PriorModule:
    torch.manual_seed(0)
    return PriorModule(options.pop("net", NET), **{"lr": 3e-3, "warmup_steps": 2, **options})


class Losses(pl.Callback):
    """Remembers the training losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def fit(
    path: Path, network: PriorModule, max_steps: int = 10, data: Sequences | None = None, **options: Any
) -> list[float]:
    losses = Losses()
    callbacks = [losses, *options.pop("callbacks", [])]
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=CSVLogger(path, name="", version="run", flush_logs_every_n_steps=1),
        callbacks=callbacks,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **options,
    )
    trainer.fit(network, data or Sequences(), ckpt_path=ckpt_path)
    return losses.values


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(1)
    return str(FlexTok(TOKENIZER).save_pretrained(tmp_path_factory.mktemp("tok") / "tok.safetensors"))


def test_golden_losses(tmp_path: Path) -> None:
    assert fit(tmp_path, module()) == pytest.approx(GOLDEN_LOSSES, rel=1e-5)


def test_training_learns_and_logs(tmp_path: Path) -> None:
    network = module(lr=1e-2)
    losses = fit(tmp_path, network, 60)
    assert losses[0] == pytest.approx(math.log(V), rel=0.02) and losses[-1] < 1.0
    log = (tmp_path / "run" / "metrics.csv").read_text().split("\n")
    for tag in ("train/loss", "train/bits_per_token", "train/grad_norm", "val/loss", "val/accuracy"):
        assert tag in log[0]
    values = network.trainer.callback_metrics
    assert values["val/condition_gap"] > 0.05, "the class tells the first token"
    assert values["val/bits_per_token"] == pytest.approx(values["val/loss"].item() / math.log(2))


def test_the_export_is_the_average_and_says_what_it_knows(tmp_path: Path) -> None:
    network = module()
    averaging = EMA(decay=0.5)
    fit(tmp_path, network, 4, Sequences(classes=("a", "b", "c", "d")), callbacks=[averaging])
    prior = Prior.from_pretrained(tmp_path / "run" / "prior.safetensors")
    assert prior.config == dataclasses.replace(NET, tokenizer="a" * 16, class_names=("a", "b", "c", "d"))
    for name, tensor in network.prior.state_dict().items():
        assert torch.equal(tensor, prior.state_dict()[name]), "the module ends with the averaged weights"
    raw = module()
    fit(tmp_path / "raw", raw, 4)
    assert not torch.equal(raw.prior.head.weight, prior.head.weight)


def test_a_resumed_fit_repeats_an_uninterrupted_one(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    whole = fit(tmp_path / "whole", module(), 10, callbacks=[saving])
    checkpoint = tmp_path / "saved" / "step=5.ckpt"
    network = PriorModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert network.prior.config.num_tokens == K and network.hparams["lr"] == 3e-3
    rest = fit(tmp_path / "rest", module(), 10, ckpt_path=checkpoint)
    assert rest == whole[5:]


@pytest.mark.parametrize("options", [{"loss_chunk": None}, {"loss_chunk": 7}, {"activation_checkpointing": True}])
def test_how_it_is_computed_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    assert fit(tmp_path, module(**options), 5) == pytest.approx(fit(tmp_path / "b", module(), 5), rel=1e-5)


def test_compiled_blocks(tmp_path: Path) -> None:
    torch.compiler.reset()
    torch._dynamo.config.suppress_errors = False
    with torch.compiler.set_stance("force_eager"):  # a build machine need not have a C++ compiler
        assert fit(tmp_path, module(compile_blocks=True), 3) == fit(tmp_path / "b", module(), 3)


def test_compiled_blocks_are_compiled_for_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating with a cache would compile them anew at each position."""
    graphs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    torch.compiler.reset()
    network = module(compile_blocks=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        fit(tmp_path, network, 3)
        network.generate_tokens(torch.tensor([0, 1]), cfg_scale=2.0)
    assert all(graphs) and 1 <= len(graphs) <= 2
    torch.compiler.reset()


def test_half_precision(tmp_path: Path) -> None:
    half = fit(tmp_path, module(), 5, precision="bf16-mixed")
    assert half == pytest.approx(fit(tmp_path / "b", module(), 5), rel=0.02)


def test_float16_with_a_scaled_loss(tmp_path: Path) -> None:
    plain, chunked = fit(tmp_path / "plain", module(), 5), module(loss_chunk=8)
    half = fit(tmp_path / "half", chunked, 5, plugins=MixedPrecision("16-mixed", "cpu"))
    assert half != plain and half == pytest.approx(plain, rel=2e-3)


def test_weights_in_half_precision_do_not_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer.precision='bf16-true'.* use bf16-mixed"):
        fit(tmp_path, module(), precision="bf16-true")


class Measured(Sequences):
    """A validation set of one batch with images."""

    def num_samples(self, split: str) -> int:
        return 8


def test_what_is_measured_does_not_depend_on_the_trainers_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    monkeypatch.setattr("flextok_pl.evaluation.report.plot_budgets", lambda *args: None)  # slow
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made_by = FlexTok.from_pretrained(tokenizer).identity()
    found = []
    for precision in ("32-true", "bf16-mixed"):
        gfid = GenerationFID([1, K], num_steps=1, cfg_scale=2.0, cache_dir=None, output_dir=tmp_path / precision)
        run = pl.Trainer(
            accelerator="cpu",
            precision=precision,
            logger=False,
            default_root_dir=tmp_path,
            callbacks=[gfid, TokenReport()],
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        (values,) = run.validate(module(tokenizer=tokenizer), Measured(made_by, image=images), verbose=False)
        found.append((values, gfid.values))
    assert found[0] == found[1] and "val/loss" in found[0][0] and "fd_effnet_lite0" in found[0][1][K]


def test_label_smoothing_and_condition_dropout(tmp_path: Path) -> None:
    plain = fit(tmp_path / "a", module(condition_dropout=0.0), 3)
    assert fit(tmp_path / "b", module(condition_dropout=0.9), 3) != plain
    smooth = fit(tmp_path / "c", module(condition_dropout=0.0, label_smoothing=0.2), 3)
    assert smooth[0] != plain[0]


def test_images_are_tokenized_as_they_come(tmp_path: Path, tokenizer: str) -> None:
    network = module(tokenizer=tokenizer)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = network.tokens({"image": images})
    assert torch.equal(tokens, FlexTok.from_pretrained(tokenizer).tokenize(images))
    assert torch.equal(network.tokens({"image": images, "tokens": tokens + 1}), tokens + 1)
    assert not any("tokenizer" in name for name in network.state_dict())
    with pytest.raises(ValueError, match="needs 'tokens' or 'image'"):
        network.tokens({"key": []})


class LooksAtImages(pl.Callback):
    """Uses the tokenizer in validations, as metrics do."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: PriorModule) -> None:
        assert pl_module.reconstructor is pl_module.tokenizer.module


@pytest.mark.parametrize("on_images", [False, True])
def test_the_tokenizer_is_on_the_device_while_it_is_needed(
    on_images: bool, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is asked to be, on a machine with one device: "here" for the prior's, "away" for the CPU."""
    places = ["away"]

    def on(frozen: Frozen[FlexTok], device: torch.device | str) -> FlexTok:
        place = "here" if isinstance(device, torch.device) else "away"
        if place != places[-1]:
            places.append(place)
        return frozen.module

    monkeypatch.setattr(Frozen, "on", on)
    data = Sequences(FlexTok.from_pretrained(tokenizer).identity())
    if on_images:
        data = Sequences(image=torch.zeros(8, 3, 32, 32))
        data.tokenizer = None
        monkeypatch.setattr(data, "batches", lambda count, given=data.batches: without_tokens(given(count)))
    fit(tmp_path, module(tokenizer=tokenizer), 10, data, callbacks=[LooksAtImages()], num_sanity_val_steps=1)
    validations = 1 if on_images else 3  # after which it goes away: one before the training, one after each epoch
    assert places == ["away", *["here", "away"] * validations]


def without_tokens(loader: DataLoader) -> DataLoader:
    batches = [{name: value for name, value in batch.items() if name != "tokens"} for batch in loader]
    return DataLoader(batches, batch_size=None)


def test_tokens_of_another_tokenizer(tmp_path: Path, tokenizer: str) -> None:
    own = weights_hash(FlexTok.from_pretrained(tokenizer))
    made_by = {"sha256": own, "vocab_size": V, "num_tokens": K}
    fit(tmp_path, module(tokenizer=tokenizer), 3, Sequences(made_by))
    for change, message in (
        ({"sha256": "b" * 16}, "belongs to tokenizer bbbb"),
        ({"vocab_size": 31}, "train a prior with model.net.vocab_size"),
        ({"num_tokens": 8}, "train a prior with model.net.num_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, module(tokenizer=tokenizer), 3, Sequences({**made_by, **change}))
    file = tmp_path / "run" / "prior.safetensors"
    knows = SavedPrior(str(file), tokenizer).prior.config.tokenizer
    assert knows == FlexTok.from_pretrained(tokenizer).identity()["sha256"] != own, "though the shards are older"
    torch.manual_seed(2)
    other = str(FlexTok(TOKENIZER).save_pretrained(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="tokens fit only their own tokenizer"):
        SavedPrior(str(file), other)
    with pytest.raises(ValueError, match="train a prior with model.net.vocab_size"):
        module(tokenizer=str(FlexTok(FlexTokConfig.preset("tiny")).save_pretrained(tmp_path / "x.safetensors")))


def test_finished_prior(tmp_path: Path, tokenizer: str) -> None:
    prior = module().prior
    file = prior.save_pretrained(tmp_path)
    assert file.name == "prior.safetensors"
    saved = SavedPrior(str(tmp_path), tokenizer)
    assert (saved.condition_kind, saved.num_classes) == ("class", 4)
    generator = [torch.Generator().manual_seed(0)]
    tokens = saved.generate_tokens(torch.tensor([2]), 2.0, generator=generator)
    expected = prior.generate(torch.tensor([2]), cfg_scale=2.0, generator=[torch.Generator().manual_seed(0)])
    assert torch.equal(tokens, expected)
    assert saved.reconstructor.detokenize(tokens, num_steps=1).shape == (1, 3, 32, 32)
    with pytest.raises(Exception, match="set model.tokenizer"):
        SavedPrior(str(tmp_path), None).reconstructor  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"condition_dropout": -0.1}, "condition_dropout=-0.1"),
        ({"loss_chunk": 0}, "loss_chunk=0"),
        ({"text_encoder": "minilm"}, "a text prior needs both"),
        ({"net": dataclasses.replace(NET, num_classes=0, text_width=8)}, "a text prior needs both"),
        ({"tokenizer": "/nowhere.safetensors"}, "no checkpoint"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    for names in ("abcde", "abc"):
        with pytest.raises(ValueError, match=f"num_classes=4 .*set model.net.num_classes={len(names)}"):
            fit(tmp_path, module(), 1, Sequences(classes=tuple(names)))
    differing = Sequences(classes=("a", "b", "c", "d"))
    differing.require_same_classes = Mock(side_effect=ShardError("train and val differ in classes"))  # type: ignore
    with pytest.raises(ShardError, match="differ in classes"):
        fit(tmp_path, module(), 1, differing)
    network = module()
    network.prior.config = dataclasses.replace(
        network.prior.config, text_mask=False, null_text_length=network.prior.config.text_length
    )
    states = Sequences()
    states.text_encoder = {"name": "minilm"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"text states without padding, but net\.text_mask=false"):
        fit(tmp_path, network, 1, states)
    with pytest.raises(ValueError, match="needs labels"):
        network.condition({"tokens": torch.zeros(1, K)})


def test_a_prior_keeps_its_classes(tmp_path: Path) -> None:
    """Their names go into checkpoints and exports, and no set, checkpoint or option may change them."""
    saving = ModelCheckpoint(tmp_path / "saved", filename="last", every_n_train_steps=2)
    fit(tmp_path, module(), 3, Sequences(classes=("a", "b", "c", "d")), callbacks=[saving])
    checkpoint = tmp_path / "saved" / "last.ckpt"
    loaded = PriorModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.class_names == ("a", "b", "c", "d")
    fit(tmp_path / "more", module(), 4, Sequences(classes=("a", "b", "c", "d")), ckpt_path=checkpoint)
    other = Sequences(classes=("a", "c", "b", "d"))
    with pytest.raises(ValueError, match="the checkpoint differ in classes: 'c' is number 1 and 2"):
        fit(tmp_path / "other", module(), 4, other, ckpt_path=checkpoint)
    named = dataclasses.replace(NET, class_names=("a", "b", "c", "e"))
    with pytest.raises(ValueError, match="the shards differ in classes: only the former has 'e'"):
        fit(tmp_path / "named", module(net=named), 3, Sequences(classes=("a", "b", "c", "d")))
    saved = SavedPrior(str(tmp_path / "run"), None)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="the shards differ in classes"):
        trainer.validate(saved, other)
    trainer.validate(saved, Sequences(classes=("0", "1", "2", "3")), verbose=False)
    assert saved.class_names == ("a", "b", "c", "d")


def test_damaged_files(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ValueError, match="no checkpoint .*prior.safetensors or model.safetensors"):
        Prior.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a Prior checkpoint"):
        Prior.from_pretrained(tokenizer)
    file = module().prior.save_pretrained(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="not a FlexTok checkpoint"):
        FlexTok.from_pretrained(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not an intact safetensors"):
        Prior.from_pretrained(file)
