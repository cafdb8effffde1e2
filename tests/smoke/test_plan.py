"""`flextok plan`, through its front door."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flextok_pl.cli import main
from flextok_pl.cost.machines import MACHINES
from flextok_pl.data import ShardIndex
from flextok_pl.models.config import FlexTokConfig, PriorConfig
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok

ROOT = Path(__file__).parents[2]
TOKENIZER, PRIOR, VAE = "tokenizer/d18_d28_imagenet.yaml", "prior/imagenet_class.yaml", "vae/imagenet_c16.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(experiment: str, *options: str) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        target = tmp_path / "new" / "plan.json"
        main(["plan", "--config", f"experiments/{experiment}", "--json", str(target), *options])
        return json.loads(target.read_text()), capsys.readouterr().out

    return run


def test_the_largest_tokenizer(plan) -> None:
    found, text = plan(TOKENIZER, "--devices", "8")
    with torch.device("meta"):
        model = FlexTok(FlexTokConfig.preset("d18_d28"))
    parameters, memory = found["parameters"], found["recipe"]["memory"]
    projection = 2048 * (1792 + 2048 + 1024) + 2048 * 2 + 1024
    assert parameters["frozen"]["VAE"] == sum(p.numel() for p in model.vae.parameters())
    assert parameters["trained"] + parameters["fixed"] - projection == 2_540_882_841 - parameters["frozen"]["VAE"]
    assert memory["weights"] == memory["averaged"] == 4 * (parameters["trained"] + parameters["fixed"])
    assert memory["optimizer"] == 2 * memory["gradients"] == 2 * memory["gradient_buckets"]
    assert f"{parameters['trained']:,}" in text
    assert found["recipe"]["global_batch"] == found["recipe"]["batch_size"] * found["recipe"]["devices"]
    split = found["split"]
    assert split["batch_size"] * 8 * split["accumulate"] == found["recipe"]["global_batch"]
    assert f"--trainer.accumulate_grad_batches {split['accumulate']}" in text
    per_sample = found["flops_per_sample"]
    step = found["recipe"]["global_batch"] * (
        per_sample["forward"] + per_sample["backward"] + sum(per_sample["frozen"].values())
    )
    assert found["flops_per_step"] == pytest.approx(step)
    recomputed = found["recipe"]["global_batch"] * per_sample["recomputed"]
    assert found["seconds_per_step"] == pytest.approx((step + recomputed) / (8 * 989.4e12 * 0.4))
    assert found["days"] == pytest.approx(500_000 * found["seconds_per_step"] / 86400)
    assert 0 < found["train_mfu"] < 0.4, "frozen networks and recomputation do not count"


STATED = sorted(
    file for file in (ROOT / "experiments").glob("[tp]*/*.yaml") if re.search(r"lobal batch (of )?\d", file.read_text())
)


@pytest.mark.parametrize("file", STATED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_experiments_have_the_global_batch_that_they_state(file: Path, plan) -> None:
    stated = re.search(r"lobal batch (?:of )?(\d+)", file.read_text())
    found, _ = plan(f"{file.parent.name}/{file.name}")
    assert stated is not None and found["recipe"]["global_batch"] == int(stated[1])
    assert found["recipe"]["memory"]["fits"], "on GPUs of 80 GB, as its first comment says"


def test_fsdp_spreads_what_lasts(plan) -> None:
    ddp, _ = plan(TOKENIZER, "--devices", "8", "--machine", "a100-40g")
    fsdp, text = plan(TOKENIZER, "--devices", "8", "--machine", "a100-40g", "--strategy", "fsdp")
    assert ddp["split"] is None, "55 GiB of weights, gradients, states and averages on 40"
    for name in ("weights", "gradients", "optimizer", "averaged"):
        assert fsdp["recipe"]["memory"][name] == pytest.approx(ddp["recipe"]["memory"][name] / 8)
    assert fsdp["recipe"]["memory"]["gathered"] > 0 == fsdp["recipe"]["memory"]["gradient_buckets"]
    assert fsdp["split"]["batch_size"] > 1 and "fsdp has gathered" in text


def test_what_does_not_fit_is_told_how(plan) -> None:
    found, text = plan(PRIOR, "--model.net", "experiments/nets/prior_1.33b.yaml", "--machine", "rtx4090")
    assert found["split"] is None
    assert "not even one sample fits" in text
    assert "--strategy fsdp or --model.activation_checkpointing true or devices with more memory" in text


def test_the_largest_prior(plan) -> None:
    options = ("--model.net", "experiments/nets/prior_1.33b.yaml", "--devices", "16", "--trainer.max_steps", "375000")
    found, _ = plan(PRIOR, *options)
    with torch.device("meta"):
        model = Prior(PriorConfig.preset("1.33b"))
    assert found["parameters"]["trained"] == sum(p.numel() for p in model.parameters())
    assert found["parameters"]["frozen"]["tokenizer"] == 2_540_882_841, "by the name of the published one"
    assert found["train_mfu"] == pytest.approx(0.4), "from tokens nothing else is computed"
    assert found["days"] > 0
    other, _ = plan(PRIOR, *options, "--model.activation_checkpointing", "true")
    switched = found["recipe_with_checkpointing_switched"]["memory"]
    assert other["recipe"]["memory"] == switched
    assert other["recipe"]["memory"]["activations"] < found["recipe"]["memory"]["activations"] / 4
    assert other["seconds_per_step"] > found["seconds_per_step"] * 1.2
    images, _ = plan(PRIOR, *options, "--inputs", "images")
    assert images["flops_per_sample"]["frozen"]["tokenizer"] > 0


def test_options_change_what_they_should(plan) -> None:
    few, text = plan(TOKENIZER, "--devices", "1", "--peak_tflops", "100", "--memory-gib", "500", "--mfu", "1.0")
    assert few["recipe"]["memory"]["gradient_buckets"] == 0.0
    assert "500 GiB, 100 TFLOP/s" in text and few["recipe"]["memory"]["fits"]
    latents, _ = plan(TOKENIZER, "--inputs", "latents", "--model.teacher", "null", "--ema", "null")
    assert latents["flops_per_sample"]["frozen"] == {} and latents["recipe"]["memory"]["averaged"] == 0.0
    stored, text = plan(TOKENIZER, "--inputs", "latents", "--ema", "null")
    assert stored["flops_per_sample"]["frozen"] == {} and "note: the teacher's features are read with" in text
    assert stored["parameters"]["trained"] > latents["parameters"]["trained"], (
        "the projection to the teacher is trained"
    )
    full, _ = plan(TOKENIZER, "--trainer.precision", "32-true")
    assert full["machine"]["peak_tflops"] == 66.9 and full["recipe"]["memory"]["cast_weights"] == 0.0


def test_shards_on_this_machine_say_what_they_hold_and_how_many(plan, image_shards: Path) -> None:
    source = ("--data.train", str(image_shards / "train"), "--data.batch_size", "4", "--trainer.max_epochs", "3")
    found, text = plan("tokenizer/demo.yaml", *source, "--trainer.max_steps", "-1", "--machine", "cpu")
    assert found["inputs"] == "images" and "VAE" in found["flops_per_sample"]["frozen"]
    assert found["recipe"]["max_steps"] == 3 * (ShardIndex.load(image_shards / "train").num_samples // 4)
    assert found["seconds_per_step"] is None and "give --peak_tflops" in text


def test_autoencoder(plan) -> None:
    found, text = plan(VAE, "--devices", "8")
    assert found["parameters"]["trained"] > 83_000_000
    assert 2.5e12 < found["flops_per_sample"]["forward"] + found["flops_per_sample"]["backward"] < 3e12
    assert "note: the perceptual network lpips is not counted" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--machine", "abacus"), f"machine='abacus' is unknown; use one of {', '.join(MACHINES)}"),
        (("--devices", "0"), "devices=0 must be at least 1"),
        (("--devices", "7"), "devices=7 cannot share the global batch"),
        (("--mfu", "0"), "mfu=0.0 must be in (0, 1]"),
        (("--mfu", "1.5"), "mfu=1.5 must be in (0, 1]"),
        (("--memory_gib", "0"), "memory_gib=0.0 must be positive"),
        (("--inputs", "tokens"), "inputs='tokens': a tokenizer trains on images or latents"),
        (("--trainer.precision", "64-true"), "trainer.precision='64-true' cannot be planned"),
    ],
)
def test_errors(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", f"experiments/{TOKENIZER}", *options])
    assert message in str(stop.value.code)


def test_a_config_without_a_model() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", "experiments/base.yaml"])
    assert "arguments are required: model; give an experiment by --config" in str(stop.value.code)
