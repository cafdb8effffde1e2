"""Every committed YAML and every documented command is one that the program takes."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flextok_pl import config
from flextok_pl.cli import COMMANDS, main
from flextok_pl.cli.front import options_for, read
from flextok_pl.cli.options import unknown
from flextok_pl.cli.prefetch import wanted
from flextok_pl.cli.sweep import check_points, parse_sweep, sweep_parser
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig, config_from_dict
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.runtime.launch import Launch, devices_per_node, require_processes

REMOTE = ("EPFL-VILAB/", "inception", "dinov2", "perceptual_network: lpips")
"""Parts of names in the files of experiments that fetch anything; the others are the demo's."""

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"


def names(*folders: str) -> list[str]:
    return sorted(
        str(file.relative_to(EXPERIMENTS)) for folder in folders for file in (EXPERIMENTS / folder).glob("*.yaml")
    )


def parsed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_there_is_no_file_that_the_tests_below_miss() -> None:
    known = {"base.yaml", *names("vae", "tokenizer", "baselines", "prior", "nets", "data", "sweeps", "sweeps/full")}
    assert known == {str(file.relative_to(EXPERIMENTS)) for file in EXPERIMENTS.rglob("*.yaml")}


@pytest.mark.parametrize("name", names("vae", "tokenizer", "prior"))
def test_experiments_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = EXPERIMENTS / name
    found = parsed(capsys, ["fit", "--config", str(file)])
    own = yaml.safe_load(file.read_text())
    assert found["model"]["class_path"] == own["model"]["class_path"]
    assert found["data"]["train"]
    assert found["trainer"]["logger"]["init_args"]["save_dir"] == "runs", "the base is under the experiment"
    assert (found["rfid"] is not None) >= name.startswith("tokenizer/")
    assert (found["gfid"] is not None) == name.startswith("prior/")
    fetched = [item.download.title for item in wanted(found)]
    assert bool(fetched) == any(part in file.read_text() for part in REMOTE), fetched
    check_first_comment(name)


def check_first_comment(name: str) -> None:
    first = [line for line in (EXPERIMENTS / name).read_text().splitlines() if line.startswith("#")]
    assert "?" in first[0] + first[1], "the first comment asks the question that the experiment answers"
    assert any(f"experiments/{name}" in line for line in first), "and gives the command"
    if "global_batch_size" in (EXPERIMENTS / name).read_text():  # it is for a node of GPUs
        states = {fact: [line for line in first if line.startswith(f"# {fact}: ")] for fact in FACTS}
        assert all(states.values()), f"it states {', '.join(FACTS)}"


FACTS = ("Hardware", "Time", "Expected")


def leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    if not isinstance(values, dict):
        return {path: values}
    return {name: value for key in values for name, value in leaves(values[key], f"{path}.{key}").items()}


@pytest.mark.parametrize("name", names("baselines"))
def test_baselines_are_the_demo_but_for_what_they_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, demo = EXPERIMENTS / name, str(EXPERIMENTS / "tokenizer" / "demo.yaml")
    found = parsed(capsys, ["fit", "--config", demo, "--config", str(file)])
    plain, own = leaves(parsed(capsys, ["fit", "--config", demo])), leaves(yaml.safe_load(file.read_text()))
    assert leaves(found) == {**plain, **own}
    assert all(plain[option] != value for option, value in own.items()), "it repeats nothing"
    with torch.device("meta"):
        FlexTok(config_from_dict(FlexTokConfig, found["model"]["init_args"]["net"]))
    check_first_comment(name)


@pytest.mark.parametrize("name", names("data"))
def test_data_files_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = EXPERIMENTS / "tokenizer" / "tiny.yaml"
    found = parsed(capsys, ["fit", "--config", str(experiment), "--data", str(EXPERIMENTS / name)])
    for key, value in yaml.safe_load((EXPERIMENTS / name).read_text()).items():
        if not isinstance(value, dict):
            assert found["data"][key] == value


@pytest.mark.parametrize("name", names("nets"))
def test_networks_can_be_built(name: str) -> None:
    values = yaml.safe_load((EXPERIMENTS / name).read_text())
    with torch.device("meta"):
        if name.startswith("nets/prior_"):
            Prior(config_from_dict(PriorConfig, values))
        elif "encoder_width" in values:
            FlexTok(config_from_dict(FlexTokConfig, values))
        else:
            VAE(config_from_dict(VAEConfig, values))


PRESETS = {f"nets/{name}.yaml": preset for name, preset in config.TOKENIZER_PRESETS.items()} | {
    f"nets/prior_{name}.yaml": preset for name, preset in config.PRIOR_PRESETS.items()
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_their_files(name: str) -> None:
    preset, values = PRESETS[name], yaml.safe_load((EXPERIMENTS / name).read_text())
    if name == "nets/demo.yaml":  # whose experiment loads the autoencoder
        values["vae"] = yaml.safe_load((EXPERIMENTS / "nets" / "vae_demo.yaml").read_text())
    assert config_from_dict(type(preset), values) == preset


def test_networks_without_a_preset() -> None:
    others = {"d18_d28_512px", "demo_long", "prior_demo_class", "prior_demo_text", "prior_tiny", "vae_c16", "vae_demo"}
    assert set(names("nets")) - set(PRESETS) == {f"nets/{name}.yaml" for name in others}
    published = yaml.safe_load((EXPERIMENTS / "nets" / "vae_c16.yaml").read_text())
    assert config_from_dict(VAEConfig, published) == FlexTokConfig.preset("d18_d28").vae


@pytest.mark.parametrize("name", names("sweeps", "sweeps/full"))
def test_every_point_of_a_sweep_parses(name: str) -> None:
    file = EXPERIMENTS / name
    if not name.startswith("sweeps/full"):  # whose points test_plan.py plans, too
        sweep, _ = parse_sweep(sweep_parser("sweep"), [str(file)])
        check_points(sweep)
    first = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert "?" in first[0] + first[1], "the first comment asks the question that the sweep answers"
    assert any(f"experiments/{name}" in line for line in first), "and gives the command"


def documented_commands() -> list[str]:
    """Lines of shell blocks in the guides, and of the experiments' first comments."""
    lines: list[str] = []
    guides = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")]
    for guide in [*guides, *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", guide.read_text(), re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
    for name in names("vae", "tokenizer", "baselines", "prior", "data", "sweeps", "sweeps/full"):
        lines += [
            line.lstrip("# ") for line in (EXPERIMENTS / name).read_text().splitlines() if line.startswith("#   ")
        ]
    commands = {re.split(r"\s+#|\s{2,}\(", line.strip())[0].strip() for line in lines}
    return sorted(line for line in commands if line.startswith(("flextok ", "make ")))


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_taken(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    capsys.readouterr()
    if arguments[0] in ("fit", "validate", "test", "predict", "plan"):
        found = parsed(capsys, arguments)
        trainer, data = found["trainer"], found["data"]
        devices = devices_per_node(trainer["devices"])
        launch = Launch(trainer["num_nodes"], devices, data["batch_size"], trainer["accumulate_grad_batches"])
        require_processes(trainer["num_nodes"], devices, {})  # it can be given on one machine, without a launcher
        launch.require_global_batch(found["global_batch_size"])
    else:  # a tool's parser has no dry run
        words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
        command = " ".join(arguments[:words])
        options, former = options_for(command), COMMANDS[command].former
        named, _ = read([argument.replace("-", "_").replace("__", "--", 1) for argument in arguments[words:]])
        assert [unknown(former.get(name, name), options) for name, _ in named] == [None] * len(named)


def started_by_launchers() -> list[str]:
    """Lines of shell blocks in the guides, and of the cluster's script, that start a training on several nodes."""
    text = "\n".join(guide.read_text() for guide in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    text += (EXPERIMENTS / "cluster" / "train.sbatch").read_text().replace("\n#   ", "\n")
    return re.findall(r"^(?:sbatch|torchrun) .*", text.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("command", started_by_launchers())
def test_documented_trainings_of_several_nodes_have_the_global_batch(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = shlex.split(command)
    if program == "torchrun":
        nodes, each = (int(words[words.index(option) + 1]) for option in ("--nnodes", "--nproc-per-node"))
        arguments = words[words.index("fit") :]
    else:
        nodes, each = (int(words[words.index(option) + 1]) for option in ("--nodes", "--ntasks-per-node"))
        at = words.index("experiments/cluster/train.sbatch") + 1
        place = ["--trainer.num_nodes", str(nodes), "--trainer.devices", str(each)]
        arguments = ["fit", "--config", words[at], *place, *words[at + 1 :]]
    found = parsed(capsys, arguments)
    trainer, data = found["trainer"], found["data"]
    devices = devices_per_node(trainer["devices"])
    launch = Launch(trainer["num_nodes"], devices, data["batch_size"], trainer["accumulate_grad_batches"])
    require_processes(trainer["num_nodes"], devices, {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": str(nodes * each)})
    launch.require_global_batch(found["global_batch_size"])
