"""`flextok plan`, through its front door."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flextok_pl.cli import main
from flextok_pl.cli.plan import PlanCLI, make_plan
from flextok_pl.cli.sweep import CheckCLI, check_points, parse_sweep, sweep_parser
from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.cost.machines import MACHINES
from flextok_pl.data import ShardIndex
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok

ROOT = Path(__file__).parents[2]
PUBLISHED = 2_540_882_841 + 12  # parameters of the largest tokenizer, and constants of its FSQ
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
    assert parameters["trained"] + parameters["fixed"] - projection == PUBLISHED - parameters["frozen"]["VAE"]
    assert memory["weights"] == 4 * (parameters["trained"] + parameters["fixed"])
    assert memory["averaged"] == memory["gradients"] == 4 * parameters["trained"]
    assert memory["optimizer"] == 2 * memory["gradients"]
    assert f"{parameters['trained']:,}" in text
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


EXPERIMENTS = {str(file.relative_to(ROOT / "experiments")): file for file in ROOT.glob("experiments/[vtp]*/*.yaml")}
OF_ONE_NODE = {"GPUs": 8, "GB": MACHINES["h100"].memory_gib}


def first_comment(text: str) -> str:
    return text[: re.search("^[^#]", text, re.MULTILINE).start()]


def recipe_holds(recipe: dict[str, Any], stated: int) -> bool:
    """Whether a fit takes the stated number of samples to a step, and its batch fits the machine."""
    own = recipe["batch_size"] * recipe["devices"] * recipe["accumulate"]
    return own == recipe["global_batch"] == stated and recipe["memory"]["fits"]


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_experiments_are_what_they_claim(name: str, plan) -> None:
    """Those for GPUs state their global batch as an option, which the file must come to."""
    text = EXPERIMENTS[name].read_text()
    said = yaml.safe_load(text)
    for_gpus = "devices" in said["trainer"]
    one_gpu = said["trainer"].get("precision") == "bf16-mixed"
    found, _ = plan(name, "--machine", "h100" if for_gpus or one_gpu else "cpu")
    assert found["recipe"]["max_steps"] > 0 and found["num_nodes"] == 1 and found["recipe"]["memory"]["fits"]
    assert for_gpus == ("global_batch_size" in said)
    if for_gpus:
        assert recipe_holds(found["recipe"], said["global_batch_size"]) and found["days"] > 0
        claims = {unit: float(number) for number, unit in re.findall(r"(\d+) (GPUs|GB)\b", first_comment(text))}
        assert claims == OF_ONE_NODE and found["recipe"]["devices"] == OF_ONE_NODE["GPUs"]
    for number in re.findall(r"of ([\d.]+) M parameters", text):
        assert found["parameters"]["trained"] == pytest.approx(float(number) * 1e6, rel=0.2)


@pytest.mark.parametrize(
    ("experiment", "preset", "options"),
    [
        *(("imagenet_class", preset, ()) for preset in ("49m", "85m", "393m", "679m", "1.33b")),
        *(("text_t5", preset, ()) for preset in ("113m_text", "382m_text")),
        ("text_t5", "3.06b_text", ("--trainer.strategy", "fsdp2")),
    ],
)
def test_presets_that_a_comment_names_fit_as_it_says(
    experiment: str, preset: str, options: tuple[str, ...], plan
) -> None:
    found, _ = plan(f"prior/{experiment}.yaml", "--model.net", f"experiments/nets/prior_{preset}.yaml", *options)
    assert found["split"] is not None
    assert found["recipe"]["memory"]["fits"]


def test_no_comment_counts_a_global_batch() -> None:
    for file in ROOT.glob("experiments/**/*.*"):
        assert not re.search(r"#.*lobal batch (of )?\d", file.read_text()), f"{file} has global_batch_size for that"


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/sweeps/full/*.yaml")), ids=lambda file: file.stem)
def test_every_trial_of_a_sweep_on_imagenet_can_be_trained(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are taken, and it has its experiment's global batch, on the devices that it asks Slurm for."""
    sweep, _ = parse_sweep(sweep_parser("sweep"), [str(file)])
    (experiment,) = sweep.experiments
    recipes = []

    class PlanningCheck(CheckCLI, PlanCLI):
        def __init__(self, *parsed: Any) -> None:
            super().__init__([], *parsed)

        def run(self) -> None:
            super().run()
            recipes.append(make_plan(self.config, "trial", [])["recipe"])

    monkeypatch.setattr("flextok_pl.cli.sweep.CheckCLI", PlanningCheck)
    check_points(sweep)
    stated = yaml.safe_load(Path(experiment).read_text())["global_batch_size"]
    assert recipes and all(recipe_holds(recipe, stated) for recipe in recipes)
    assert {recipe["devices"] for recipe in recipes} == {sweep.slurm["gpus_per_node"]}
    claimed = re.findall(r"one node[\s#]+of[\s#]+(\d+)[\s#]+GPUs", file.read_text())
    assert claimed == [str(sweep.slurm["gpus_per_node"])]


def fit_command(text: str) -> list[str]:
    (command,) = re.findall(r"^  flextok (fit .*)$", text, re.MULTILINE)
    return shlex.split(command)


@pytest.mark.parametrize(
    ("options", "decided"),
    [
        ((), {"num_nodes": 1, "devices": 8, "accumulate_grad_batches": 4, "strategy": "ddp"}),
        (("--num-nodes", "4"), {"num_nodes": 4, "devices": 8, "accumulate_grad_batches": 1, "strategy": "ddp"}),
        (
            ("--strategy=fsdp", "--devices", "4", "--machine", "a100-40g", "--trainer.num_nodes", "2"),
            {"num_nodes": 1, "devices": 4, "accumulate_grad_batches": 8, "strategy": "fsdp2"},
        ),
    ],
)
def test_the_advice_is_a_command(
    options: tuple[str, ...], decided: dict[str, Any], plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps what was given for the fit, and decides nodes, devices, batches and strategy."""
    found, text = plan(TOKENIZER, *options, "--model.lr", "3e-4")
    assert ("srun" in text) == (decided["num_nodes"] > 1)
    with pytest.raises(SystemExit) as stop:
        main([*fit_command(text), "--print_config"])
    assert stop.value.code == 0
    fit = yaml.safe_load(capsys.readouterr().out)
    trainer = fit["trainer"]
    assert {name: trainer[name] for name in decided} == {**decided, "devices": str(decided["devices"])}
    assert fit["model"]["init_args"]["lr"] == 3e-4 and fit["data"]["batch_size"] == found["split"]["batch_size"]
    processes = decided["num_nodes"] * decided["devices"]
    assert fit["data"]["batch_size"] * processes * trainer["accumulate_grad_batches"] == fit["global_batch_size"]


def test_another_batch_than_stated_is_put_right(plan) -> None:
    found, text = plan(TOKENIZER, "--data.batch_size", "32")
    assert "global batch 2048: 32 x 8 devices x 4 are 1024, which a fit refuses" in text
    assert found["split"]["accumulate"] == 8 and found["recipe"]["global_batch"] == 2048


def test_steps_of_epochs(plan) -> None:
    epochs = ("--trainer.max_steps", "-1", "--trainer.max_epochs", "30", "--global_batch_size", "null")
    unknown, text = plan(PRIOR, *epochs)
    assert unknown["days"] is None and "--num_samples" in text
    known, text = plan(PRIOR, *epochs, "--num_samples", "12811670")
    assert known["recipe"]["max_steps"] == 30 * 12_511 and "days for 375,330 steps" in text
    rounded, _ = plan(PRIOR, *epochs, "--num_samples", "12811670", "--data.drop_last", "false")
    assert rounded["recipe"]["max_steps"] == 30 * 12_512
    limited, _ = plan(PRIOR, *epochs, "--num_samples", "12811670", "--trainer.limit_train_batches", "4")
    assert limited["recipe"]["max_steps"] == 60
    ended, _ = plan(PRIOR, *epochs, "--num_samples", "12811670", "--trainer.max_steps", "100")
    assert ended["recipe"]["max_steps"] == 100


def test_fsdp_spreads_what_lasts(plan) -> None:
    ddp, _ = plan(TOKENIZER, "--devices", "8", "--machine", "a100-40g")
    fsdp, text = plan(TOKENIZER, "--devices", "8", "--machine", "a100-40g", "--strategy", "fsdp")
    assert ddp["split"] is None, "55 GiB of weights, gradients, states and averages on 40"
    for name in ("weights", "gradients", "optimizer", "averaged"):
        assert fsdp["recipe"]["memory"][name] == pytest.approx(ddp["recipe"]["memory"][name] / 8)
    memory = fsdp["recipe"]["memory"]
    assert (
        memory["gathered"] > 0 == memory["cast_weights"]
        and memory["scattered"] > 0 == ddp["recipe"]["memory"]["scattered"]
    )
    assert fsdp["split"]["batch_size"] > 1 and "gathered by fsdp" in text


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
    assert found["parameters"]["frozen"]["tokenizer"] == PUBLISHED, "by the name of the published one"
    assert found["train_mfu"] == pytest.approx(0.4), "from tokens nothing else is computed"
    assert found["days"] > 0
    other, _ = plan(PRIOR, *options, "--model.activation_checkpointing", "true")
    switched = found["recipe_with_checkpointing_switched"]["memory"]
    assert other["recipe"]["memory"] == switched
    assert other["recipe"]["memory"]["activations"] < found["recipe"]["memory"]["activations"] / 4
    assert other["seconds_per_step"] > found["seconds_per_step"] * 1.2
    images, _ = plan(PRIOR, *options, "--inputs", "images")
    assert images["flops_per_sample"]["frozen"]["tokenizer"] > 0
    tokens, always = (each["recipe"]["memory"] for each in (found, images))
    assert tokens["frozen"] == 0.0 and tokens["frozen_work"] == always["frozen"] == 4 * PUBLISHED
    assert always["total"] - tokens["total"] == pytest.approx(always["frozen"]), "it is there in validations only"


def test_options_change_what_they_should(plan) -> None:
    few, text = plan(TOKENIZER, "--devices", "1", "--peak_tflops", "100", "--memory-gib", "500", "--mfu", "1.0")
    assert "500 GiB, 100 TFLOP/s" in text and few["recipe"]["memory"]["fits"]
    latents, _ = plan(TOKENIZER, "--inputs", "latents", "--model.teacher", "null", "--ema", "null")
    assert latents["flops_per_sample"]["frozen"] == {} and latents["recipe"]["memory"]["averaged"] == 0.0
    stored, text = plan(TOKENIZER, "--inputs", "latents", "--ema", "null")
    assert stored["flops_per_sample"]["frozen"] == {} and "note: the teacher's features are read with" in text
    assert stored["parameters"]["trained"] > latents["parameters"]["trained"], (
        "the projection to the teacher is trained"
    )
    whole, _ = plan(TOKENIZER)
    half, text = plan(TOKENIZER, "--model.repa_until", "0.5")
    frozen = [found["flops_per_sample"]["frozen"] for found in (whole, half)]
    assert frozen[1]["teacher"] == frozen[0]["teacher"] / 2 and frozen[1]["VAE"] == frozen[0]["VAE"]
    assert "note: the work of the alignment is its mean over the training: repa_until=0.5" in text
    convolution, _ = plan(TOKENIZER, "--model.repa_projection", "conv")
    more = convolution["parameters"]["trained"] - whole["parameters"]["trained"]
    assert more == 9 * 1792 * 1024 - (1792 * 2048 + 2048**2 + 2048 * 1024 + 2 * 2048)
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
        (("--num_nodes", "-1"), "num_nodes=-1 must be at least 1"),
        (("--devices", "7"), "7 devices cannot share the global batch of 2048 evenly"),
        (("--mfu", "0"), "mfu=0.0 must be in (0, 1]"),
        (("--mfu", "1.5"), "mfu=1.5 must be in (0, 1]"),
        (("--memory_gib", "0"), "memory_gib=0.0 must be positive"),
        (("--inputs", "tokens"), "inputs='tokens': a tokenizer trains on images or latents"),
        (("--trainer.precision", "64-true"), "trainer.precision='64-true' is not supported"),
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
