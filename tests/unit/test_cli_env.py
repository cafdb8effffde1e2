"""What `flextok env` says, and what it keeps to itself."""

from pathlib import Path

import pytest
import torch

from flextok_pl.cli import main
from flextok_pl.cli.env import without_secrets

ROOT = Path(__file__).parents[2]


def test_versions_devices_and_commit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["env"])
    said = capsys.readouterr().out
    facts = dict(line.split(": ", 1) for line in said.splitlines())
    assert torch.__version__.startswith(facts["torch"]) and facts["flextok_pl"] == "0.1.0"
    assert {"python", "system", "lightning", "CUDA", "MPS", "threads"} <= facts.keys()
    assert ("commit" in facts) == (ROOT / ".git").exists()
    assert "hf_secret" not in said


def test_the_merged_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    other = tmp_path / "other.yaml"
    other.write_text("data:\n  train: https://me:password@host/set?token=abc\n  val: 'pipe:curl -u me {name}'\n")
    main(["env", "--config", "experiments/tokenizer/tiny.yaml", "--config", str(other)])
    head, _, text = capsys.readouterr().out.partition("\n\n")
    assert "configuration: other, SHA-256 " in head.splitlines()[-1]
    assert "class_path: flextok_pl.modules.TokenizerModule" in text and "gradient_clip_val: 1.0" in text
    assert "train: https://***@host/set?***\n" in text and "pipe:***" in text
    assert not any(secret in head + text for secret in ("password", "abc", "curl"))
    with pytest.raises(SystemExit, match="there is no file nowhere.yaml"):
        main(["env", "--config", "nowhere.yaml"])
    with pytest.raises(SystemExit, match="belongs to an experiment: give --config FILE"):
        main(["env", "--model.lr", "1"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a", "s3://bucket/a"),
        ("a: [https://u:p@h/x?k=v, 'b']", "a: [https://***@h/x?*** 'b']"),
        ("https://h/x?k=v&l=w\nnext: 1", "https://h/x?***\nnext: 1"),
    ],
)
def test_what_may_be_secret(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_the_home_folder_is_not_named() -> None:
    assert without_secrets(f"train: {Path.home()}/data") == "train: ~/data"
