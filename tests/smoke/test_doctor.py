"""`flextok doctor` on folders of runs: a sound one, and ones that are broken as runs break."""

import csv
import json
import math

import pytest
import torch
import yaml

from flextok_pl.assets import DEMO_TOKENIZER, DEMO_VAE
from flextok_pl.cli import main
from flextok_pl.data import write_folder
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE

STEPS = 400
NET = {"num_registers": 64, "fsq_levels": [7, 5, 5, 5, 5], "null_dropout": 0.1}
OPTIONS = {"net": NET, "lr": 0.003, "warmup_steps": 20, "seed": 0}


@pytest.fixture(scope="module")
def pictures(emoji_folder, tmp_path_factory):
    """Shards of real pictures."""
    folder = tmp_path_factory.mktemp("emoji_shards")
    write_folder(emoji_folder, folder, val_fraction=0.5, size=64, num_workers=1)
    return folder / "val"


def logs(end=0.8, seed=0):
    """What a training logs every ten steps: a loss that falls from 1.6, a steady gradient, a learning rate."""
    random = torch.Generator().manual_seed(seed)
    for step in range(9, STEPS, 10):
        noise = 1 + 0.02 * torch.randn((), generator=random).item()
        yield (
            step,
            {
                "train/loss": (end + (1.6 - end) * math.exp(-step / 100)) * noise,
                "train/grad_norm": 0.3 * noise,
                "lr-AdamW": 0.003 * min(1.0, (step + 1) / 21),
                "train/images_per_s": 100.0,
                "train/data_share": 0.02,
            },
        )


def run_folder(folder, data, lines=None, tok=None, module="TokenizerModule", **changes):
    """A run's folder as a training leaves it."""
    folder.mkdir(parents=True)
    rows = list(logs() if lines is None else lines)
    with (folder / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["step", *rows[0][1]])
        table.writeheader()
        table.writerows({"step": step, **values} for step, values in rows)
    config = {
        "trainer": {"max_steps": STEPS, "gradient_clip_val": 1.0, "logger": {"init_args": {"name": "mine/x"}}},
        "model": {"class_path": f"flextok_pl.modules.{module}", "init_args": OPTIONS | changes},
        "data": {"val": str(data), "image_size": 64, "batch_size": 8},
        "ema": {"decay": 0.98, "update_every_n_steps": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if tok is not None:
        tok.save_pretrained(folder / "tokenizer.safetensors")
    return folder


def diagnosed(run, tmp_path, *options, status=0):
    """Check -> verdict, and why others were left out."""
    file = tmp_path / "findings.json"
    arguments = ["doctor", str(run), "--json", str(file), "--num_samples=8", *options]
    if status:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
    else:
        main(arguments)
    found = json.loads(file.read_text())
    return {each["check"]: each["verdict"] for each in found["findings"]}, found["left_out"]


def test_a_sound_run(pictures, tmp_path, capsys):
    run = run_folder(tmp_path / "run", pictures, tok=FlexTok.from_pretrained(DEMO_TOKENIZER))
    found, left_out = diagnosed(run, tmp_path)
    assert {"token-use", "codebook-use", "latent-scale", "budgets", "fsq-levels", "null-condition"} <= found.keys()
    assert [name for name, verdict in found.items() if verdict == "wrong"] == []
    assert found["token-use"] == found["latent-scale"] == found["loss-falls"] == found["codebook-use"] == "ok"
    assert set(left_out) == {"throughput", "reference", "overfitting", "ema-distance"}
    shown = capsys.readouterr().out
    assert f"tokenizer run {run}: step 400 of 400" in shown
    assert "not checked: throughput: give --plan" in shown and " 0 wrong" in shown


def test_latents_of_a_wrong_scale(pictures, tmp_path, capsys):
    tok = FlexTok.from_pretrained(DEMO_TOKENIZER)
    vae = tok.require_vae()
    wrong = FlexTok(tok.config, vae.rescaled(5 * vae.config.scaling_factor))
    wrong.load_state_dict(tok.state_dict())
    found, _ = diagnosed(run_folder(tmp_path / "run", pictures, tok=wrong), tmp_path, status=3)
    assert found["latent-scale"] == "wrong"
    assert "docs/doctor.md#latent-scale" in capsys.readouterr().out


def test_tokens_that_say_nothing(pictures, tmp_path):
    tok = FlexTok.from_pretrained(DEMO_TOKENIZER)
    for parameter in tok.encoder.parameters():
        parameter.data.zero_()
    found, _ = diagnosed(run_folder(tmp_path / "run", pictures, tok=tok), tmp_path, status=3)
    assert [found[name] for name in ("token-use", "token-positions", "codebook-use", "fsq-levels")] == ["wrong"] * 4


def test_a_loss_that_does_not_fall(pictures, tmp_path):
    run = run_folder(tmp_path / "run", pictures, lines=logs(end=1.6))
    found, left_out = diagnosed(run, tmp_path, "--num_samples", "0", status=3)
    assert found["loss-falls"] == "wrong"
    assert left_out["running the model"] == "num_samples is 0"


def test_weights_and_values_that_are_not_finite(pictures, tmp_path):
    tok = FlexTok.from_pretrained(DEMO_TOKENIZER)
    next(tok.decoder.parameters()).data.fill_(math.nan)
    assert diagnosed(run_folder(tmp_path / "a", pictures, tok=tok), tmp_path, status=3)[0]["finite"] == "wrong"
    lines = [(step, values | {"train/loss": math.nan if step == 99 else 1.0}) for step, values in logs()]
    run = run_folder(tmp_path / "b", pictures, lines=lines)
    assert diagnosed(run, tmp_path, "--num_samples", "0", status=3)[0]["finite"] == "wrong"


def test_an_autoencoder(pictures, tmp_path):
    run = run_folder(tmp_path / "run", pictures, module="VAEModule", net={"latent_channels": 16})
    assert "latent-scale" in diagnosed(run, tmp_path)[1], "measured at the end only"
    vae = VAE.from_pretrained(DEMO_VAE)
    vae.save_pretrained(run / "vae")
    assert diagnosed(run, tmp_path)[0]["latent-scale"] == "ok"
    vae.rescaled(5 * vae.config.scaling_factor).save_pretrained(run / "vae")
    assert diagnosed(run, tmp_path, status=3)[0]["latent-scale"] == "wrong"


def test_curves_of_other_runs(pictures, tmp_path, capsys):
    runs = [run_folder(tmp_path / str(s), pictures, lines=logs(seed=s), seed=s) for s in range(3)]
    file = tmp_path / "mine.json"
    main(["doctor", "reference", str(runs[0]), str(runs[1]), "--out", str(file)])
    few = ["--num_samples", "0", "--reference", str(file)]
    assert diagnosed(runs[2], tmp_path, *few)[0]["reference"] == "ok"
    high = run_folder(tmp_path / "high", pictures, lines=logs(end=1.4))
    assert diagnosed(high, tmp_path, *few, status=3)[0]["reference"] == "wrong"
    with pytest.raises(SystemExit, match=r"model\.seed=\[0, 0\]: give runs with different seeds"):
        main(["doctor", "reference", str(runs[0]), str(high), "--out", str(file)])
    tuned = run_folder(tmp_path / "tuned", pictures, lines=logs(end=0.4), init_from="tokenizer.safetensors")
    config = tuned / "config.yaml"
    config.write_text(config.read_text().replace("mine/x", "tokenizer/demo"))
    assert "untrained weights" in diagnosed(tuned, tmp_path, "--num_samples", "0")[1]["reference"]
    other = run_folder(tmp_path / "other", pictures, lr=0.1, seed=7)
    with pytest.raises(SystemExit, match=r"model\.lr=0\.003, .* 0\.1: give runs of one experiment"):
        main(["doctor", "reference", str(runs[0]), str(other), "--out", str(file)])


def test_speed_against_a_plan(pictures, tmp_path):
    run, plan = run_folder(tmp_path / "run", pictures), tmp_path / "plan.json"
    plan.write_text(json.dumps({"images_per_s": 200.0}))
    found, _ = diagnosed(run, tmp_path, "--num_samples", "0", "--plan", str(plan))
    assert (found["throughput"], found["data-share"]) == ("look", "ok")
    plan.write_text(json.dumps({"images_per_s": None}))
    with pytest.raises(SystemExit, match=r"has no time.*--peak_tflops"):
        main(["doctor", str(run), "--num_samples", "0", "--plan", str(plan)])


def test_what_is_no_run(pictures, tmp_path):
    with pytest.raises(SystemExit, match=r"is not the folder of a run: it has neither config\.yaml nor a checkpoint"):
        main(["doctor", str(tmp_path)])
    run = run_folder(tmp_path / "run", tmp_path / "gone")
    assert "does not exist" in diagnosed(run, tmp_path)[1]["running the model"]
    with pytest.raises(SystemExit, match=r"num_samples=1 must be at least 2"):
        main(["doctor", str(run), "--num_samples", "1"])
