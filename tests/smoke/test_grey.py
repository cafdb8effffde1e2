"""Commands that read pictures themselves read them with a tokenizer's own number of channels."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from flextok_pl import FlexTok, FlexTokConfig
from flextok_pl.app.work import example_pictures, tokenized
from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.cli import main
from flextok_pl.cli.run_contents import RunContents
from flextok_pl.config import VAEConfig
from flextok_pl.evaluation.probe import tokenizer_probe
from flextok_pl.flow.decoding import Decoding


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tokenizer of grey pictures."""
    vae = VAEConfig(kind="pixel", latent_channels=4, scaling_factor=1.0, image_channels=1)
    config = dataclasses.replace(
        FlexTokConfig.preset("tiny"), encoder_depth=1, decoder_depth=1, vae=vae, latent_channels=4
    )
    return FlexTok(config).save_pretrained(tmp_path_factory.mktemp("grey") / "tok.safetensors")


def test_pictures_of_a_grey_tokenizer(grey: Path, image_shards: Path, emoji_folder: Path, tmp_path: Path) -> None:
    few, val = tmp_path / "few", str(image_shards / "val")
    few.mkdir()
    for file in sorted((emoji_folder / "a").iterdir())[:2]:
        (few / file.name).write_bytes(file.read_bytes())
    named, quick = ["--tokenizer", str(grey)], ["--budgets", "[1]", "--num_steps"]
    main(["reconstruct", *map(str, few.iterdir()), *named, *quick, "1", "--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").width > 2 * 32
    main(["probe", val, val, str(grey), "--num_workers", "0", "--budgets", "[1]"])
    unguided = ["--guidance", '["none"]', "--num_workers", "0", "--out", str(tmp_path)]
    main(["decoding", str(few), *named, *quick, "[1]", *unguided])
    assert json.loads((tmp_path / "schedule.json").read_text())[0]["num_samples"] == 2

    tok = FlexTok.from_pretrained(grey)
    means = FeatureExtractor("means", torch.nn.Identity(), lambda network, x: x.float().mean((2, 3)), "none")
    assert tokenizer_probe(val, 32, means, tok, Decoding(1, "none"), 0, None).num_classes == 2
    np.savez(tmp_path / "two.npz", arr_0=np.zeros((2, 32, 32, 3), np.uint8))
    for source in (few, val, tmp_path / "two.npz"):
        example = example_pictures(str(source), 32, 2, 1)[0]
        assert tokenized(tok, example, 32).image.mode == "L"


def test_a_run_is_checked_on_pictures_as_it_reads_them(image_shards: Path, tmp_path: Path) -> None:
    options = {"val": [str(image_shards / "val")], "image_size": 32, "channels": 1, "labels": False}
    model = {"class_path": "flextok_pl.modules.TokenizerModule", "init_args": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {**options, "cache_dir": "kept"}}))
    data = RunContents.open(tmp_path).data(None, 2)
    assert (data.channels, data.labels, data.cache_dir) == (1, False, "kept")
    assert next(iter(data.val_dataloader()))["image"].shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match=r"channels=5 must be 1 \(grey\), 3"):
        example_pictures(str(image_shards / "val"), 32, 1, 5)
