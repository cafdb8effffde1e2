"""A published prior by the command line, with the tokenizer, the text encoder and the options that it names."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_helpers import randomized

from flextok_pl.cli import UserError, main
from flextok_pl.config import FlexTokConfig
from flextok_pl.interop.interpolation import read_yaml

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
GENERATION = {
    "cfg_factor": 2.5,
    "temperature": 0.8,
    "top_k": 9,
    "top_p": 0.9,
    "timesteps": 2,
    "tokenizer_cfg_factor": 1.5,
    "tokenizer_perform_norm_guidance": False,
}
SAME = {
    "--cfg-scale": "2.5",
    "--temperature": "0.8",
    "--top-k": "9",
    "--top-p": "0.9",
    "--num-steps": "2",
    "--guidance-scale": "1.5",
    "--guidance": "cfg",
}
OTHER = {
    "--cfg-scale": "1",
    "--temperature": "2.0",
    "--top-k": "2",
    "--top-p": "0.2",
    "--num-steps": "1",
    "--guidance-scale": "4",
    "--guidance": "apg",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 16 tokens of 80, in which guidance and steps matter."""
    config = dataclasses.replace(FlexTokConfig.preset("tiny"), fsq_levels=(5, 4, 4))
    return randomized(config).save_pretrained(tmp_path_factory.mktemp("tokenizer")).parent


def release(kind: str, folder: Path, tokenizer: Path | None) -> Path:
    shutil.copytree(GOLDEN / f"flexar_{kind}_a", folder)
    config: dict[str, Any] = read_yaml(folder / "config.yaml")
    config["generation"] |= GENERATION
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")
        named = {"_target_": "flextok_ar.model.integration.ImageResamplerTokenizer", "model_id": "tokenizer"}
        config["model"]["meta_model"]["models"]["image_tokenizer"] = named
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def generate(folder: Path, *arguments: str) -> bytes:
    main(["generate", "--prior", str(folder), "--budgets", "16", "--out", "out.png", *arguments])
    return Path("out.png").read_bytes()


@pytest.mark.parametrize(("kind", "condition"), [("class", ["--class", "3"]), ("text", ["--text", "a red cat"])])
def test_a_release_by_itself(
    kind: str, condition: list[str], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = release(kind, tmp_path / "release", tokenizer)
    picture = generate(folder, *condition)
    assert generate(folder, *condition, *(word for option in SAME.items() for word in option)) == picture
    for option in OTHER.items():
        assert generate(folder, *condition, *option) != picture, option
    assert generate(folder, *condition, "--tokenizer", str(tokenizer)) == picture


def test_what_a_release_does_not_name(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = release("text", tmp_path / "release", None)
    with pytest.raises((UserError, SystemExit)) as error:
        generate(folder, "--text", "a red cat")  # with the demo tokenizer, which has other tokens
    assert "give the tokenizer of the prior's tokens" in f"{capsys.readouterr().err}{error.value}"
    picture = generate(folder, "--text", "a red cat", "--tokenizer", str(tokenizer))
    (folder / "t5_tiny").rename(tmp_path / "elsewhere")
    with pytest.raises((UserError, SystemExit)) as error:
        generate(folder, "--text", "a red cat", "--tokenizer", str(tokenizer))
    assert "text_encoder='t5_tiny' cannot be loaded" in f"{capsys.readouterr().err}{error.value}"
    own = ["--tokenizer", str(tokenizer), "--text-encoder", str(tmp_path / "elsewhere")]
    assert generate(folder, "--text", "a red cat", *own) == picture


def test_one_search_from_anywhere(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of models are recorded whole, so that the folder they are given from changes nothing."""
    release("text", tmp_path / "release", tokenizer)
    for place, prior in ((tmp_path, "release"), (tmp_path.parent, str(tmp_path / "release"))):
        monkeypatch.chdir(place)
        options = ["--text", "a red cat", "--schedule", "[1]", "--num_candidates", "2", "--out", str(tmp_path / "run")]
        main(["search", "--prior", prior, *options])
