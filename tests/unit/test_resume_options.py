"""A training that goes on with other options takes over what has a meaning, and refuses the rest by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from flextok_pl.cli import main
from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.models.vae import VAE
from flextok_pl.modules import TokenizerModule
from flextok_pl.modules.optim import FUSED, warmup_cosine
from flextok_pl.modules.resume import Change

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "tokenizer" / "tiny.yaml"
NET = dataclasses.replace(FlexTokConfig.preset("tiny"), encoder_depth=1, decoder_depth=1)
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 2, "min_lr_ratio": 0.0}
STEPS = 8


class Rates(pl.Callback):
    """Remembers the options of the optimizer at each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, tuple[float, float]]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        self.seen.append((group["lr"], group["weight_decay"], tuple(group["betas"])))


def run(tmp_path: Path, module: TokenizerModule, ckpt_path: Path | None = None, steps: int = STEPS) -> Rates:
    batch = {"image": torch.zeros(2, 3, 32, 32), "key": ["a", "b"]}
    rates, saved = Rates(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[rates, saved],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * 4, batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return rates


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after four of eight steps."""
    folder = tmp_path_factory.mktemp("half")
    run(folder, TokenizerModule(NET, **OPTIONS))
    return folder / "step=4.ckpt"


def rates_of(lr: float, warmup_steps: int, min_lr_ratio: float) -> list[float]:
    """The learning rates of a training from its start."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, seen = warmup_cosine(optimizer, warmup_steps, STEPS, min_lr_ratio), []
    for _ in range(STEPS):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_learning_rate_decay_and_schedule_are_those_given_from_the_first_step_on(half: Path, tmp_path: Path) -> None:
    same = run(tmp_path, TokenizerModule(NET, **OPTIONS), half)
    assert [lr for lr, *_ in same.seen] == rates_of(1e-2, 2, 0.0)[4:], "exactly those of a training that went through"
    given = {"lr": 4e-3, "weight_decay": 0.3, "betas": (0.8, 0.9), "warmup_steps": 5, "min_lr_ratio": 0.5}
    other = run(tmp_path, TokenizerModule(NET, **given), half)
    assert [lr for lr, *_ in other.seen] == pytest.approx(rates_of(4e-3, 5, 0.5)[4:], rel=1e-12)
    assert {values for _, *values in map(tuple, other.seen) for values in [tuple(values)]} == {(0.3, (0.8, 0.9))}


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ({"causal_registers": False}, {}, "model.net.causal_registers was True, and is False now"),
        ({"position_base": 100.0}, {}, "model.net.position_base was 10000.0, and is 100.0 now"),
        ({"nested_dropout": "uniform"}, {"lr": 1.0}, "model.net.nested_dropout was 'pow2', and is 'uniform' now"),
        ({}, {"pure_noise": 0.5, "seed": 3}, "model.pure_noise was 0.0, and is 0.5 now; model.seed was 0, and is 3"),
    ],
)
def test_what_changes_the_meaning_is_refused_by_name(
    net: dict[str, Any], options: dict[str, Any], message: str, half: Path, tmp_path: Path
) -> None:
    module = TokenizerModule(dataclasses.replace(NET, **net), **OPTIONS | options)
    with pytest.raises(ValueError, match="with other options") as refused:
        run(tmp_path, module, half)
    assert message in str(refused.value) and "model.lr" not in str(refused.value)
    assert not list(tmp_path.iterdir()), "nothing is exported"


def test_what_has_no_effect_is_taken(half: Path, tmp_path: Path) -> None:
    run(tmp_path, TokenizerModule(NET, activation_checkpointing=True, **OPTIONS), half, steps=5)


def test_a_checkpoint_of_an_optimizer_in_many_kernels_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As version 0.1.0 and devices without the one kernel write them."""
    ends = []
    for name, fused in (("many", ()), ("one", FUSED)):
        with monkeypatch.context() as patch:
            patch.setattr("flextok_pl.modules.optim.FUSED", fused)
            torch.manual_seed(0)
            run(tmp_path / name, TokenizerModule(NET, **OPTIONS), steps=4)
        file = tmp_path / name / "step=4.ckpt"
        written = torch.load(file, weights_only=True)["optimizer_states"][0]["param_groups"]
        assert [group["fused"] for group in written] == [True if fused else None] * 2
        module = TokenizerModule(NET, **OPTIONS)
        run(tmp_path / name, module, file)
        optimizer: Any = module.optimizers()
        assert all(group["fused"] for group in optimizer.param_groups)
        ends.append(list(module.tokenizer.parameters()))
    for own, expected in zip(*ends, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)  # of steps of 1e-2


def test_a_frozen_network_is_known_by_its_weights(tmp_path: Path) -> None:
    """Its file may move; another one, even at the same place, is another network."""
    vae = VAEConfig(latent_channels=12, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    for name, seed in (("first", 0), ("moved", 0), ("other", 1)):
        torch.manual_seed(seed)
        VAE(vae).save_pretrained(tmp_path / name)

    def module(name: str) -> TokenizerModule:
        return TokenizerModule(NET, vae=str(tmp_path / name), **OPTIONS)

    run(tmp_path / "a", module("first"), steps=4)
    run(tmp_path / "b", module("moved"), tmp_path / "a" / "step=4.ckpt", steps=5)
    with pytest.raises(ValueError, match=r"model.vae was 'weights \w{16}', and is 'weights \w{16}' now"):
        run(tmp_path / "b", module("other"), tmp_path / "a" / "step=4.ckpt", steps=5)


def fit(shards: Path, *options: str, command: str = "fit") -> None:
    quick = ["--rfid=null", "--codebook=null", "--hparams=null", "--trainer.limit_val_batches=0"]
    sets = ["--data.train", str(shards / "train"), "--data.val", str(shards / "val")]
    main([command, "--config", str(EXPERIMENT), *sets, *quick, "--model.warmup_steps=0", *options])


def test_both_ways_to_go_on_treat_options_alike(
    image_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(image_shards, "--trainer.max_steps=2")
    first = tmp_path / "runs" / "tokenizer" / "tiny" / "version_0"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    file = f"--ckpt_path={(first / 'checkpoints' / 'last.ckpt').resolve()}"
    other_net = ["--model.net.causal_registers=false", "--trainer.max_steps=3"]
    for options, message in (
        (["--ckpt_path=last", *other_net], "model.net.causal_registers was True, and is False now"),
        ([file, *other_net], "model.net.causal_registers was True, and is False now"),
        (
            ["--ckpt_path=last", "--model.lr=1", "--trainer.max_steps=2"],
            "has ended after 2 steps, .* options: model.lr",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            fit(image_shards, *options)
    with pytest.raises(SystemExit, match=r"model.net.position_base was 10000.0, and is 5.0 now"):
        fit(image_shards, file, "--model.net.position_base=5.0", command="validate")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert [path.name for path in first.parent.iterdir()] == ["version_0"]

    capsys.readouterr()
    for way, folder in ((file, "version_1"), ("--ckpt_path=last", "version_1")):
        fit(image_shards, way, "--trainer.max_steps=3" if way == file else "--trainer.max_steps=4", "--model.lr=1e-4")
        assert ("from step 2 on: model.lr was 0.002, and is 0.0001 now" in capsys.readouterr().out) == (way == file)
        changed = [json.loads(line) for line in (first.with_name(folder) / "changes.jsonl").read_text().splitlines()]
        assert changed == [{"step": 2, **Change("lr", 2e-3, 1e-4)._asdict()}], "which the second way finds no more"
    last = torch.load(first.with_name("version_1") / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["hyper_parameters"]["lr"] == 1e-4 and last["lr_schedulers"][0]["base_lrs"] == [1e-4, 1e-4]
