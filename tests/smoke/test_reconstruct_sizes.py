"""`flextok reconstruct` of pictures of any size, and a training at another size, through the front door."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.config import FlexTokConfig
from flextok_pl.data import write_folder
from flextok_pl.models.tokenizer import FlexTok

QUICK = {"rfid": None, "codebook": None}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_reconstruct_in_tiles(tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save("large.png")
    command = ["reconstruct", "large.png", "--tokenizer", str(tiny_tokenizer), "--num-steps", "1", "--guidance", "none"]
    main([*command, "--budgets", "4,16", "--out", "grid.png", "--tiled", "true"])
    assert "pictures: 1 in 6 tiles, at [4, 16] tokens" in capsys.readouterr().out
    width, height = Image.open("grid.png").size
    assert 3 * 70 < width < 3 * 70 + 20 and 40 < height < 40 + 40
    with pytest.raises(SystemExit) as stop:
        main([*command, "--tiled", "true", "--overlap", "2"])
    assert "overlap=2.0 must be a share" in f"{capsys.readouterr().err}{stop.value}"


def test_a_fit_on_rectangles_from_squares(tiny: Any, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says that positions were resampled, evaluates rectangles, and its export knows their shape."""
    options = {
        "trainer.max_steps": 1,
        "model.init_from": str(tiny_tokenizer),
        "model.net.grid_size": [6, 12],
        "data.image_size": [24, 40],
        "codebook": None,
        "rfid.max_samples": 4,
        "rfid.num_steps": 1,
    }
    main(tiny("fit", options))
    printed = capsys.readouterr().out
    assert "positions resampled from [8, 8] to [6, 12]" in printed
    run = next(Path("runs").glob("tokenizer/tiny/version_0"))
    made = FlexTok.from_pretrained(run / "tokenizer.safetensors")
    assert made.config.grid_size == (6, 12) and made.config.trained_grids == ((6, 10),)
    assert "resampled from [8, 8] to [6, 12]" in made.config.started_from
    assert '"image_size": [\n  24,\n  40\n' in (run / "rfid_fit" / "rfid.json").read_text().replace("   ", "  ")
    assert made.detokenize(torch.zeros(1, 4).long(), num_steps=1).shape == (1, 3, 24, 40)


def test_a_fit_on_several_shapes(tiny: Any, tmp_path: Path) -> None:
    """Batches differ in shape, each image is evaluated in its own, and the export knows them all."""
    rng = np.random.default_rng(0)
    for i in range(36):
        file = Path("pictures") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*[(32, 32), (20, 40), (44, 22)][i % 3], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    write_folder(Path("pictures"), Path("set"), val_fraction=0.4, num_workers=1)
    options = {
        **{"data.train": "set/train", "data.val": "set/val", "data.batch_size": 4, "data.eval_batch_size": 4},
        **{"data.shapes": [[24, 24], [16, 32], [32, 16]], "data.eval_shapes": True, "data.drop_last": False},
        **{"trainer.max_steps": 3, "trainer.limit_val_batches": 1.0, "trainer.val_check_interval": 3},
        **{"trainer.check_val_every_n_epoch": None, "rfid.num_steps": 1, "rfid.budgets": [16], "codebook": None},
    }
    main(tiny("fit", options))
    run = Path("runs") / "tokenizer" / "tiny" / "version_0"
    tok = FlexTok.from_pretrained(run / "tokenizer.safetensors")
    assert tok.config.trained_grids == ((6, 6), (4, 8), (8, 4)) and tok.latent_size == (12, 12)
    records = json.loads((run / "rfid_fit" / "rfid.json").read_text())
    assert sorted(records[0]["image_size"]) == [[16, 32], [24, 24], [32, 16]]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("30", "data.image_size=30 must be a multiple of the patch of 4 x 4 pixels; the nearest: 28 or 32"),
        ("[64,32]", "data.image_size=[64, 32] gives more patches, 16 x 8, than net.grid_size=[8, 8] has"),
    ],
)
def test_a_size_that_does_not_fit_stops_a_fit_and_a_plan(
    size: str, message: str, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("fit",) if size == "30" else ("plan",):
        with pytest.raises(SystemExit) as stop:
            main(tiny(command, QUICK | {"data.image_size": size, "trainer.max_steps": 1}))
        assert message in f"{capsys.readouterr().err}{stop.value}"
    assert not list(Path("runs").glob("**/version_*"))


def test_presets_keep_their_sizes() -> None:
    for name in ("d12_d12", "d18_d28", "tiny", "demo"):
        config = FlexTokConfig.preset(name)
        assert config.grids == (config.grid_size,)
