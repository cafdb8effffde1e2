"""`flextok decoding` through the front door."""

import json

import pytest
from PIL import Image

from flextok_pl import FlexTok, Prior, PriorConfig
from flextok_pl.cli import main
from flextok_pl.contracts import weights_hash


@pytest.fixture(scope="module")
def models(tiny_tokenizer, tmp_path_factory):
    made_by = weights_hash(FlexTok.from_pretrained(tiny_tokenizer))
    config = PriorConfig(num_classes=2, vocab_size=64000, num_tokens=16, depth=1, width=64, tokenizer=made_by)
    return tiny_tokenizer, Prior(config).save_pretrained(tmp_path_factory.mktemp("prior") / "prior.safetensors")


def sweep(shards, folder, *options):
    main(["decoding", str(shards / "val"), "--out", str(folder), "--num_workers", "0", *map(str, options)])
    return [json.loads((folder / name).read_text()) for name in ("decoding.json", "schedule.json")]


GRID = ["--budgets", "[2,16]", "--num_steps", "[1,2]", "--guidance", '["none","cfg"]', "--guidance_scale", "[2.0,3.0]"]


def test_reconstructions(tiny, image_shards, models, tmp_path, capsys):
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
    drawn = Image.open(tmp_path / "decoding.png").convert("RGB")
    assert len(drawn.getcolors(1 << 20)) > 10 and (255, 0, 0) in dict(map(reversed, drawn.getcolors(1 << 20)))

    # One combination gives the numbers of `flextok test` with the same settings.
    rfid = {"budgets": [2, 16], "num_steps": 2, "guidance": "cfg", "guidance_scale": 3.0, "output_dir": str(tmp_path)}
    options = {f"rfid.{name}": value for name, value in rfid.items()} | {"codebook": None, "trainer.logger": False}
    main(tiny("test", options | {"tokenizer": str(models[0]), "trainer.default_root_dir": str(tmp_path)}))
    tested = {(r["metric"], r["num_tokens"]): r for r in json.loads((tmp_path / "rfid.json").read_text())}
    mine = {(r["metric"], r["num_tokens"]): r for r in records if r["guidance_scale"] == 3.0 and r["num_steps"] == 2}
    assert mine.keys() == tested.keys()
    for key, record in mine.items():
        assert record["value"] == pytest.approx(tested[key]["value"], rel=1e-5, abs=1e-9), key
        assert record["data_hash"] == tested[key]["data_hash"]


def test_generated_pictures(tiny, image_shards, models, tmp_path):
    options = ["--tokenizer", models[0], "--prior", models[1], *GRID[:4], "--guidance", '["none"]', "--batch_size"]
    records, _ = sweep(image_shards, tmp_path / "a", *options, 16)
    assert {r["cfg_scale"] for r in records} == {1.0}
    again, _ = sweep(image_shards, tmp_path / "b", *options, 5)
    assert [r["value"] for r in again] == pytest.approx([r["value"] for r in records], rel=1e-5, abs=1e-7)

    # They are the pictures, and the numbers, of `flextok test`.
    gfid = {"num_steps": 1, "budgets": [2, 16], "output_dir": str(tmp_path), "cache_dir": None, "batch_size": 7}
    options = {"tokenizer": str(models[0]), "prior": str(models[1]), "gfid": gfid, "rfid": None, "codebook": None}
    main(tiny("test", options | {"trainer.logger": False, "trainer.default_root_dir": str(tmp_path)}))
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
    assert "num_steps=0 must be a whole number of at least 1" in message("--num_steps", "[0]")
    assert "metric='psnr' must be one of" in message("--metric", "psnr")
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    with pytest.raises(SystemExit, match="holds 1 picture, but a distance needs two: add pictures to it"):
        main(["decoding", str(tmp_path), "--tokenizer", str(models[0]), "--num_workers", "0"])


def test_intervals_of_guidance(image_shards, models, tmp_path, capsys):
    intervals = ["--guidance_interval", "[[0,1],[0.5,1]]", "--guidance", '["none","cfg"]', "--guidance_scale", "[2.0]"]
    records, schedule = sweep(
        image_shards, tmp_path, "--tokenizer", models[0], "--budgets", "[2]", "--num_steps", "[2]", *intervals
    )
    settings = {(r["guidance"], tuple(r.get("guidance_interval", ()))) for r in records}
    assert settings == {("none", ()), ("cfg", ()), ("cfg", (0.5, 1.0))} and len(schedule) == 1
    assert "best of 3 combinations" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"guidance_interval=\(0.5, 0.5\) must be two flow times"):
        sweep(image_shards, tmp_path, "--tokenizer", models[0], "--guidance_interval", "[[0.5,0.5]]")
