"""What `make` would run on a fresh clone: the data that an experiment names are made before it starts."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MAKERS = {
    "data/openmoji64": "data demo data/openmoji64 ",
    "data/openmoji64_latents": "data latents data/openmoji64/train data/openmoji64_latents ",
    "data/openmoji64_features": "data latents data/openmoji64/train data/openmoji64_features ",
    "data/openmoji64_tokens": "data tokens data/openmoji64/train data/openmoji64_tokens ",
}
TARGETS = {"vae": "train-vae", "tokenizer": "train-tokenizer", "prior": "train-prior"}
EXPERIMENTS = sorted(
    str(file.relative_to(ROOT)) for kind in TARGETS for file in (ROOT / "experiments" / kind).glob("*.yaml")
)
SWEEPS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "experiments" / "sweeps").rglob("*.yaml"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, set up."""
    for name in ("Makefile", "pyproject.toml", "experiments", "flextok_pl"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    return tmp_path


def made(clone: Path, *arguments: str) -> list[str]:
    """The `flextok` commands that make would run."""
    dry = ["make", "-n", "--no-print-directory", *arguments]
    done = subprocess.run(dry, cwd=clone, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return [f"{command} " for command in re.findall(r"\.venv/bin/flextok (.*)", done.stdout.replace("\\\n", " "))]


def sets_made(commands: list[str]) -> set[str]:
    return {name for name, maker in MAKERS.items() if any(command.startswith(maker) for command in commands)}


def sets(content: Any, folder: Path) -> set[str]:
    """The demo's shard sets that values name, and files that they name."""
    if isinstance(content, dict | list):
        return {s for each in (content.values() if isinstance(content, dict) else content) for s in sets(each, folder)}
    if isinstance(content, str) and content.endswith(".yaml"):
        file = folder / content
        return sets(yaml.safe_load(file.read_text()), file.parent)
    return set(re.findall(r"^data/openmoji64(?:_\w+)?", str(content)))


def sets_of(file: str) -> set[str]:
    return sets(yaml.safe_load((ROOT / file).read_text()), (ROOT / file).parent)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_training_has_what_it_names(experiment: str, clone: Path) -> None:
    *before, fit = made(clone, TARGETS[experiment.split("/")[1]], f"EXP={experiment}")
    assert fit.startswith(f"fit --config {experiment}")
    assert sets_made(before) == sets_of(experiment) and len(before) == len(sets_of(experiment))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_evaluation_has_the_pictures_that_it_names(experiment: str, clone: Path) -> None:
    *before, test, _ = made(clone, "eval-fid", f"EXP={experiment}", "PRIOR=")
    assert test.startswith(f"test --config {experiment}")
    assert before == [MAKERS["data/openmoji64"]] * ("data/openmoji64" in sets_of(experiment))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_has_what_it_names(sweep: str, clone: Path) -> None:
    *before, last = made(clone, "sweep", f"SWEEP={sweep}")
    assert last.startswith(f"sweep {sweep}")
    assert sets_made(before) == sets_of(sweep) and len(before) == len(sets_of(sweep))


def test_options_name_data_too(clone: Path) -> None:
    tiny = ["train-tokenizer", "EXP=experiments/tokenizer/tiny.yaml"]
    assert sets_made(made(clone, *tiny, "ARGS=--data.train data/openmoji64_latents --x '[\"a\"]'")) >= {
        "data/openmoji64_latents"
    }
    assert len(made(clone, "train-tokenizer")) == 3, "the demo is the default"


def test_tokens_are_those_of_the_tokenizer(clone: Path) -> None:
    """Made by another tokenizer, they are made anew; by the same, not."""
    shipped = "flextok_pl/assets/tokenizer_demo.safetensors"
    for index in ("data/openmoji64/val/index.json", "data/openmoji64_tokens/index.json"):
        (clone / index).parent.mkdir(parents=True)
        (clone / index).touch()
    (clone / "data/openmoji64_tokens.of").write_text(f"{shipped}\n")
    sweep = ["sweep", "SWEEP=experiments/sweeps/prior_size.yaml"]
    assert sets_made(made(clone, "train-prior")) == sets_made(made(clone, *sweep)) == set()
    (clone / "data/openmoji64_tokens.of").write_text("another\n")
    assert sets_made(made(clone, "train-prior")) == {"data/openmoji64_tokens"}
    assert sets_made(made(clone, *sweep)) == {"data/openmoji64_tokens"}
