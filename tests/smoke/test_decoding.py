"""`flextok decoding` through the front door."""

import json
from pathlib import Path

import pytest
from PIL import Image

from flextok_pl import FlexTok, FlexTokConfig, Prior, PriorConfig
from flextok_pl.cli import main
from flextok_pl.contracts import weights_hash

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "tokenizer" / "tiny.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tok = FlexTok(FlexTokConfig.preset("tiny"))
    prior = Prior(
        PriorConfig(num_classes=2, vocab_size=64000, num_tokens=16, depth=1, width=64, tokenizer=weights_hash(tok))
    )
    return tok.save_pretrained(folder / "tiny.safetensors"), prior.save_pretrained(folder / "prior.safetensors")


def sweep(shards, folder, *options):
    main(["decoding", str(shards / "val"), "--out", str(folder), "--num_workers", "0", *map(str, options)])
    return [json.loads((folder / name).read_text()) for name in ("decoding.json", "schedule.json")]


GRID = ["--budgets", "[2,16]", "--num_steps", "[1,2]", "--guidance", '["none","cfg"]', "--guidance_scale", "[2.0,3.0]"]


def test_reconstructions(image_shards, models, tmp_path, capsys):
    records, schedule = sweep(image_shards, tmp_path, "--tokenizer", models[0], *GRID)
    settings = {(r["num_steps"], r["guidance"], r["guidance_scale"]) for r in records}
    assert len(settings) == 2 * (1 + 2)
    by = {}
    for record in records:
        if record["metric"] == "kd_effnet_lite0":
            by.setdefault(record["num_tokens"], []).append(record["value"])
    assert [len(values) for values in by.values()] == [6, 6]
    assert {entry["num_tokens"]: entry["value"] for entry in schedule} == {k: min(v) for k, v in by.items()}
    assert "best of 6 combinations on 18 pictures" in capsys.readouterr().out
    assert Image.open(tmp_path / "decoding.png").width > 200

    # One combination gives the numbers of `flextok test` with the same settings.
    main(
        [
            *("test", "--config", str(EXPERIMENT), "--tokenizer", str(models[0])),
            *("--data.val", str(image_shards / "val"), "--rfid.budgets", "[2,16]", "--rfid.num_steps", "2"),
            *("--rfid.guidance", "cfg", "--rfid.guidance_scale", "3.0", "--rfid.output_dir", str(tmp_path)),
            *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
            *("--trainer.default_root_dir", str(tmp_path), "--codebook", "null"),
        ]
    )
    tested = {(r["metric"], r["num_tokens"]): r for r in json.loads((tmp_path / "rfid.json").read_text())}
    mine = {(r["metric"], r["num_tokens"]): r for r in records if r["guidance_scale"] == 3.0 and r["num_steps"] == 2}
    assert mine.keys() == tested.keys()
    for key, record in mine.items():
        assert record["value"] == pytest.approx(tested[key]["value"], rel=1e-5, abs=1e-9), key
        assert record["data_hash"] == tested[key]["data_hash"]


def test_generated_pictures(image_shards, models, tmp_path):
    options = ["--tokenizer", models[0], "--prior", models[1], *GRID[:4], "--guidance", '["none"]', "--batch_size"]
    records, _ = sweep(image_shards, tmp_path / "a", *options, 16)
    assert {r["cfg_scale"] for r in records} == {1.0}
    again, _ = sweep(image_shards, tmp_path / "b", *options, 5)
    assert [r["value"] for r in again] == pytest.approx([r["value"] for r in records], rel=1e-5, abs=1e-7)

    # They are the pictures, and the numbers, of `flextok test`.
    experiment = tmp_path / "prior.yaml"
    net = {"num_classes": 2, "vocab_size": 64000, "num_tokens": 16, "depth": 1, "width": 64}
    model = {"class_path": "flextok_pl.modules.PriorModule", "init_args": {"net": net}}
    gfid = {"num_steps": 1, "budgets": [2, 16]}
    experiment.write_text(json.dumps({"data": {"image_size": 32}, "model": model, "gfid": gfid}))
    main(
        [
            *("test", "--config", str(EXPERIMENT.parents[1] / "base.yaml"), "--config", str(experiment)),
            *("--tokenizer", str(models[0]), "--prior", str(models[1]), "--data.val", str(image_shards / "val")),
            *("--gfid.output_dir", str(tmp_path), "--gfid.cache_dir", "null", "--gfid.batch_size", "7"),
            *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"),
        ]
    )
    tested = {(r["metric"], r["num_tokens"]): r["value"] for r in json.loads((tmp_path / "gfid.json").read_text())}
    mine = {(r["metric"], r["num_tokens"]): r["value"] for r in records if r["num_steps"] == 1}
    assert mine and {key: tested[key] for key in mine} == pytest.approx(mine, rel=1e-5, abs=1e-7)


def test_what_cannot_be_swept(image_shards, models, tmp_path):
    def message(*options):
        with pytest.raises(SystemExit) as stop:
            sweep(image_shards, tmp_path, "--tokenizer", models[0], *options)
        return str(stop.value)

    assert "budgets=[17] must be in 1..16" in message("--budgets", "[17]")
    assert "guidance='cgf' is unknown" in message("--guidance", '["cgf"]')
    assert "num_steps=[0] must be at least 1" in message("--num_steps", "[0]")
    assert "metric='psnr' must be one of" in message("--metric", "psnr")
