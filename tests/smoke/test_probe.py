"""`flextok probe` through the front door, on tokens that know the class from the second on."""

import json

import pytest
import torch

from flextok_pl import FlexTok
from flextok_pl.cli import main
from flextok_pl.data import write_tokens


def test_accuracy_by_budget(image_shards, tiny_tokenizer, tmp_path, capsys):
    tok = FlexTok.from_pretrained(tiny_tokenizer)

    def tokens_of(images):
        """All the same, but the second: whether the square begins in the left half, which is the class."""
        square = (images < 0.99).any(1).any(1)  # (B, W)
        tokens = torch.zeros(len(images), 16, dtype=torch.int64)
        tokens[:, 1] = torch.where(square.int().argmax(1) < 8, 7, 40)
        return tokens

    for part in ("train", "val"):
        write_tokens(image_shards / part, tmp_path / part, tokens_of, tokenizer_id=tok.identity(), image_size=32)
    options = [str(tmp_path / "train"), str(tmp_path / "val"), str(tiny_tokenizer), "--num_workers", "0"]
    main(["probe", *options, "--budgets", "[1,2,16]", "--json", str(tmp_path / "probe.json")])
    assert "18 pictures of 2 classes" in capsys.readouterr().out
    records = json.loads((tmp_path / "probe.json").read_text())
    balanced = {r["num_tokens"]: r["value"] for r in records if r["metric"] == "probe_balanced_accuracy"}
    assert balanced == {1: 0.5, 2: 1.0, 16: 1.0}


def test_pictures_and_wrong_sets(image_shards, tiny_tokenizer, tmp_path):
    train, val = str(image_shards / "train"), str(image_shards / "val")
    main(["probe", train, val, str(tiny_tokenizer), "--num_workers", "0", "--json", str(tmp_path / "probe.json")])
    records = json.loads((tmp_path / "probe.json").read_text())
    assert [r["num_tokens"] for r in records if r["metric"] == "probe_accuracy"] == [1, 2, 4, 8, 16]
    assert all(0 <= r["value"] <= 1 and r["train_samples"] == 22 for r in records)
    with pytest.raises(SystemExit, match=r"budgets=\[0\] must be in 1..16"):
        main(["probe", train, val, str(tiny_tokenizer), "--budgets", "[0]"])
    foreign = {"sha256": "f" * 16, "vocab_size": 64000, "num_tokens": 16}
    made = tmp_path / "foreign"
    write_tokens(train, made, lambda x: torch.zeros(len(x), 16).long(), tokenizer_id=foreign, image_size=32)
    with pytest.raises(SystemExit, match="holds tokens of tokenizer ffff"):
        main(["probe", str(made), val, str(tiny_tokenizer)])
