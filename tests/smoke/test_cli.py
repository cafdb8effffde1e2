"""The `flextok` command, through its front door."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.cli import UserError, base_config, main
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.data import ShardDataModule, ShardIndex
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.sweeps.sweep import as_arguments

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


PRIOR_EXPERIMENT: dict[str, Any] = {
    "data": {"image_size": 32, "batch_size": 8, "eval_batch_size": 8, "num_workers": 0},
    "model": {
        "class_path": "flextok_pl.modules.PriorModule",
        "init_args": {
            "net": {
                "num_classes": 2,
                "vocab_size": 64000,
                "num_tokens": 16,
                "depth": 1,
                "width": 32,
                "head_dim": 16,
            },
            "warmup_steps": 0,
        },
    },
    "ema": {"decay": 0.5},
    "gfid": {"num_steps": 1, "budgets": [1, 16], "max_samples": 6, "grid_samples": 2},
    "positions": {},
}


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code not in (0, None)
    message = f"{capsys.readouterr().err}{stop.value}"
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("arguments", [["nosuch"], ["data"], ["data", "nosuch"]])
def test_unknown_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"error: {' '.join(arguments)!r} is not one of the commands above" in error_of(capsys, *arguments)


def test_fit_resume_validate_test(tiny: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {"rfid.extractor": "effnet-lite0", "rfid.num_steps": 1, "rfid.budgets": [1, 16]}
    own = [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "mine", "every_n_train_steps": 1}}]
    short = {"trainer.max_steps": 2, "trainer.val_check_interval": 1, "global_batch_size": 16, "checks": {}}
    main(tiny("fit", quick | short | {"trainer.callbacks": own, "rfid.fit-budgets": [1]}))
    assert "global batch 16 = batch_size 16 x 1 devices x 1 nodes x 1 accumulated" in capsys.readouterr().out
    first = workplace / "runs" / "tokenizer" / "tiny" / "version_0"
    assert {"config.yaml", "tokenizer.safetensors", "checkpoints"} <= {path.name for path in first.iterdir()}
    assert FlexTok.from_pretrained(first / "tokenizer.safetensors").config.num_registers == 16
    assert list((workplace / "mine").glob("*.ckpt")), "users' callbacks stay free"
    (cost,) = json.loads((first / "training.json").read_text())["attempts"]
    assert [cost[name] for name in ("from_step", "to_step", "devices", "device")] == [0, 2, 1, "cpu"]

    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(first), "--num_samples", "8", "--json", "doctor.json"])
    assert stop.value.code == 3, "two steps teach nobody to use tokens"
    findings = json.loads((workplace / "doctor.json").read_text())["findings"]
    found = {each["check"]: each["verdict"] for each in findings}
    assert found["token-use"] == "wrong" and found["finite"] == "ok"
    assert {"ema-distance", "latent-scale"} <= found.keys()

    last = str(first / "checkpoints" / "last.ckpt")
    main(tiny("fit", {"trainer.max_steps": 3, "rfid": None, "ckpt_path": last}))
    second = first.with_name("version_1")
    assert (second / "checkpoints" / "step0000003.ckpt").is_file(), "each run has its own directory, and goes on from 2"

    # The saved configuration is whole: it needs no base.
    main(["validate", "--config", str(first / "config.yaml"), "--ckpt_path", last, "--trainer.limit_val_batches=1"])
    capsys.readouterr()
    main(tiny("test", quick | {"tokenizer": str(first / "tokenizer.safetensors")}))
    shown = capsys.readouterr().out
    *_, file = sorted(first.parent.glob("version_*/rfid.json"))
    records = json.loads(file.read_text())
    assert {record["num_tokens"] for record in records} == {1, 16}
    assert all(record["metric"] in shown for record in records), "the table has what the file has"


@pytest.mark.parametrize("name", ["fixed_length", "grid_2d", "mse_decoder", "full_attention_registers"])
def test_a_fit_of_a_baseline(name: str, tiny: Any, workplace: Path) -> None:
    """Priors of their tokens are trained in tests/unit/test_baselines.py."""
    file = EXPERIMENTS / "baselines" / f"{name}.yaml"
    registers = 64 if name == "grid_2d" else 16  # the network of `tiny` has 8 x 8 patches
    options = {"model.net.num_registers": registers, "trainer.max_steps": 2, "rfid.max_samples": 4}
    main(tiny("fit", {}, f"--config={file}", *as_arguments(options)))
    run = workplace / "runs" / "baselines" / name / "version_0"
    net = yaml.safe_load(file.read_text())["model"]["init_args"]["net"] | {"num_registers": registers}
    made = FlexTok.from_pretrained(run / "tokenizer.safetensors").config
    assert made == dataclasses.replace(FlexTokConfig.preset("tiny"), **net)
    records = json.loads((run / "rfid_fit" / "rfid.json").read_text())
    assert {record["num_tokens"] for record in records} == ({1, 8, 64} if registers == 64 else {1, 4, 16})
    assert {record["num_steps"] for record in records} == {1 if name == "mse_decoder" else 2}


def test_experiments_differ_from_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(EXPERIMENTS / "base.yaml", tmp_path)
    experiment = tmp_path / "mine" / "x.yaml"
    model = {
        "class_path": "flextok_pl.modules.VAEModule",
        "init_args": {"net": {"kind": "pixel", "latent_channels": 3}},
    }
    experiment.write_text(yaml.safe_dump({"model": model, "data": {"train": "t"}, "ema": {"decay": 0.5}}))
    base = yaml.safe_load((EXPERIMENTS / "base.yaml").read_text())

    found = parsed(
        capsys, "fit", "--config", str(experiment), "--checkpoint.save-top-k=3", "--ema.update_every_n_steps", "2"
    )
    assert found["trainer"]["gradient_clip_val"] == base["trainer"]["gradient_clip_val"]
    assert found["checkpoint"]["save_top_k"] == 3 and found["checkpoint"]["save_last"] == "link"
    assert (found["ema"]["decay"], found["ema"]["update_every_n_steps"]) == (0.5, 2)
    assert found["rfid"] is None and found["codebook"] is None, "an autoencoder has no tokens to evaluate"

    # Groups merge field by field over files and the command line, and null leaves one out.
    more, off = tmp_path / "mine" / "more.yaml", tmp_path / "mine" / "off.yaml"
    more.write_text("rfid: {budgets: [1, 2]}\nema: {decay: 0.25}\n")
    off.write_text("ema: null\n")
    files = ["--config", str(experiment), "--config", str(more)]
    found = parsed(capsys, "fit", *files, "--rfid.num_steps", "10")
    assert found["rfid"]["budgets"] == [1, 2] and found["rfid"]["num_steps"] == 10 and found["ema"]["decay"] == 0.25
    found = parsed(capsys, "fit", *files, "--config", str(off), "--rfid=null")
    assert found["rfid"] is None and found["ema"] is None
    assert parsed(capsys, "fit", "--config", str(experiment), "--rfid={}")["rfid"]["num_seeds"] == 1


def test_where_the_base_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "base.yaml").touch()
    assert base_config(tmp_path / "x.yaml") == tmp_path / "base.yaml"
    assert base_config(tmp_path / "a" / "x.yaml") == tmp_path / "base.yaml"
    assert base_config(tmp_path / "a" / "b" / "x.yaml") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rfid.nosuch=1"], "there is no option rfid.nosuch"),
        (["--data.batch_size=0"], "batch_size=0 must be at least 1"),
        (["--data.train=/nowhere"], "/nowhere"),
        (["--model.net.encoder_width=30"], "encoder_width=30"),
        (["--model.vae=/nowhere"], "/nowhere"),
        (["--rfid.num_steps=0"], "num_steps=0"),
        (["--trainer.num_nodes=2"], "no launcher has started this command on each node"),
        (["--global_batch_size=64"], "give --trainer.accumulate_grad_batches 4"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
        (["--ckpt_path=/nowhere.ckpt"], "/nowhere.ckpt"),
        (["--trainer.max_steps=many"], "trainer.max_steps"),
        (["--trainer.max_steps=3", "--model.warmup_steps=3", "--rfid=null"], "warmup_steps=3 must be below"),
    ],
)
def test_wrong_options_of_a_fit(
    arguments: list[str], message: str, tiny: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, *tiny("fit", {}, *arguments))


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        ("tokenizer/tiny", ["--trainer.precision=bf16-true"], "trainer.precision='bf16-true'"),
        ("prior/tiny", ["--trainer.precision=16-true"], "trainer.precision='16-true'"),
        ("vae/demo", ["--trainer.precision=16-mixed", "--model.gan_weight=0.5"], "with model.gan_weight above 0"),
    ],
)
def test_precisions_that_do_not_train(
    experiment: str,
    options: list[str],
    message: str,
    image_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused before anything is built, and by the plan, with the remedy."""
    monkeypatch.setattr("flextok_pl.cli.training.FlexTokCLI.instantiate_classes", lambda self: pytest.fail("built"))
    given = ["--config", str(EXPERIMENTS / f"{experiment}.yaml"), *options]
    given += [f"--data.train={image_shards / 'train'}", f"--data.val={image_shards / 'val'}"]
    for command in ("fit", "plan"):
        error = error_of(capsys, command, *given)
        assert message in error and "use bf16-mixed" in error, command


def test_an_evaluation_by_two_processes_is_that_of_one(tiny: Any, tiny_tokenizer: Path, workplace: Path) -> None:
    """18 samples in batches of 4 by two workers each: neither batches nor processes come out even."""
    values = {}
    for name, devices, strategy in (("one", 1, "auto"), ("two", 2, "ddp_fork")):
        options = {"trainer.devices": devices, "trainer.strategy": strategy, "tokenizer": str(tiny_tokenizer)}
        options |= {"data.eval_batch_size": 4, "data.num_workers": 2, "rfid.output_dir": name}
        main(tiny("test", options | {"rfid.num_steps": 1, "rfid.cache_dir": None}))
        records = json.loads((workplace / name / "rfid.json").read_text())
        values[name] = {(r["metric"], r["num_tokens"]): r["value"] for r in records}
        assert {r["num_samples"] for r in records} == {18}
    assert values["two"] == pytest.approx(values["one"], rel=1e-6)
    for picture in ("grid.png", "extremes.png"):
        assert (workplace / "one" / picture).read_bytes() == (workplace / "two" / picture).read_bytes()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_weights_must_be_given(
    command: str, tiny: Any, tiny_tokenizer: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of(capsys, *tiny(command))
    assert f"no trained weights to {command}: give --tokenizer or --prior FILE" in message
    main(tiny(command, {"model.init_from": str(tiny_tokenizer), "trainer.fast_dev_run": True, "rfid": None}))


def test_wrong_tokenizer(tiny: Any, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, *tiny("test", {"tokenizer": "nowhere"}))
    assert "no checkpoint 'nowhere'" in message and "Union" not in message
    assert "give one of them" in error_of(capsys, *tiny("test", {"tokenizer": "a", "ckpt_path": "b"}))


def test_debug_shows_the_error_itself(tiny: Any, workplace: Path) -> None:
    with pytest.raises(UserError, match="batch_size=0"):
        main(tiny("fit", {"data.batch_size": 0}, "--debug"))


def test_reconstruct(tiny_tokenizer: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for i, mode in enumerate(("RGB", "L", "RGBA")):
        Image.new(mode, (40 + i, 50)).save(f"{i}.png")
        pictures.append(f"{i}.png")
    command = ["reconstruct", *pictures, "--tokenizer", str(tiny_tokenizer), "--num-steps", "2", "--guidance", "none"]
    main([*command, "--budgets", "1,4,16", "--out", "new/grid.png"])
    assert "[1, 4, 16]" in capsys.readouterr().out
    side = 32  # of the tiny tokenizer's pictures
    width, height = Image.open("new/grid.png").size
    fitted = 27  # of a side of 42 beside one of 50
    assert 4 * fitted < width < 4 * fitted + 20 and 3 * side < height < 3 * side + 40
    first = Path("new/grid.png").read_bytes()
    main([*command, "--budgets", "1,4,16", "--out", "again.png"])
    assert Path("again.png").read_bytes() == first, "the same seed gives the same picture"
    main([*command, "--budgets", "1,4,16", "--out", "other.png", "--seed", "1"])
    assert Path("other.png").read_bytes() != first

    assert "budgets='1,x'" in error_of(capsys, *command, "--budgets", "1,x")
    assert "budgets=17" in error_of(capsys, *command, "--budgets", "17")
    assert "budgets=0" in error_of(capsys, *command, "--budgets", "0")
    assert "nowhere.png" in error_of(capsys, "reconstruct", "nowhere.png", "--tokenizer", str(tiny_tokenizer))
    Path("broken.png").write_bytes(b"no picture")
    assert "broken.png" in error_of(capsys, "reconstruct", "broken.png", "--tokenizer", str(tiny_tokenizer))
    assert "no checkpoint" in error_of(capsys, "reconstruct", "0.png", "--tokenizer", "nowhere")


@pytest.fixture(scope="module")
def tiny_prior(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tok = FlexTok.from_pretrained(tiny_tokenizer)
    config = PriorConfig(
        num_classes=2, vocab_size=64000, num_tokens=16, depth=1, width=32, head_dim=16, class_names=("left", "right")
    )
    prior = Prior(dataclasses.replace(config, tokenizer=weights_hash(tok)))
    return prior.save_pretrained(tmp_path_factory.mktemp("prior"))


def test_generate(
    tiny_prior: Path, tiny_tokenizer: Path, workplace: Path, capsys: pytest.CaptureFixture[str], image_shards: Path
) -> None:
    files = ["--prior", str(tiny_prior), "--tokenizer", str(tiny_tokenizer), "--num-steps", "1", "--guidance", "none"]
    command = ["generate", *files, "--budgets", "1,16"]
    main([*command, "--class", "right", "--class", "0", "--out", "new/grid.png"])
    assert "pictures: 2, at [1, 16] tokens" in capsys.readouterr().out
    side = 32
    width, height = Image.open("new/grid.png").size
    assert 4 * side < width < 4 * side + 20 and 2 * side < height < 2 * side + 40, "names are as wide as two"
    first = Path("new/grid.png").read_bytes()
    main([*command, "--class", "Right", "--class", "left", "--out", "again.png"])
    assert Path("again.png").read_bytes() == first, "the same seed gives the same pictures"
    main([*command, "--class", "1", "--class", "0", "--out", "other.png", "--seed", "1"])
    assert Path("other.png").read_bytes() != first
    main([*command, "--samples", "3", "--cfg-scale", "[1.0,3.0]", "--top-k", "50", "--top-p", "0.9"])
    assert "pictures: 6" in capsys.readouterr().out, "all classes"

    for arguments, message in (
        (["--class", "up"], "class 'up' is unknown; did you mean"),
        (["--class", "2"], "class 2 is not in 0..1"),
        (["--class", "-1"], "class -1 is not in 0..1"),
        (["--text", "red"], "this prior is conditioned on class"),
        (["--budgets", "17"], "budgets=17"),
        (["--budgets", "a"], "budgets='a'"),
        (["--top-p", "0"], "top_p=0.0"),
        (["--samples", "0"], "samples=0"),
        (["--prior", "nowhere"], "no checkpoint 'nowhere'"),
        (["--tokenizer", str(DEMO_TOKENIZER)], "give the tokenizer of the prior's tokens"),
    ):
        assert message in error_of(capsys, *command, *arguments)


def test_a_prior_from_pictures_to_gfid(
    tiny_tokenizer: Path, image_shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenize, train, resume, evaluate, generate: all by the command line."""
    main(
        [
            "data",
            "tokens",
            str(image_shards / "train"),
            "tokens",
            "--tokenizer",
            str(tiny_tokenizer),
            "--num-views=2",
            "--num-workers=0",
        ]
    )
    index = ShardIndex.load(workplace / "tokens")
    assert index.num_samples == 2 * ShardIndex.load(image_shards / "train").num_samples and index.image_size == 32
    config = workplace / "prior.yaml"
    config.write_text(yaml.safe_dump(PRIOR_EXPERIMENT | {"trainer": {"max_steps": 4, "val_check_interval": 2}}))
    shards = [f"--data.train={workplace / 'tokens'}", f"--data.val={image_shards / 'val'}"]
    model = [f"--model.tokenizer={tiny_tokenizer}"]
    base = ["--config", str(EXPERIMENTS / "base.yaml"), "--config", str(config), *shards]
    main(["fit", *base, *model])
    run = workplace / "runs" / "prior" / "version_0"
    assert {"prior.safetensors", "gfid_fit", "checkpoints"} <= {path.name for path in run.iterdir()}
    last = run / "checkpoints" / "last.ckpt"
    main(["fit", *base, *model, "--trainer.max_steps=5", "--gfid=null", "--ckpt_path", str(last)])

    capsys.readouterr()
    finished = ["--prior", str(run / "prior.safetensors"), "--tokenizer", str(tiny_tokenizer)]
    rfid = ["--rfid.num_steps=1", "--rfid.budgets=[1,16]"]
    main(["test", *base, *finished, *rfid, "--gfid.num_samples=8"])
    assert "8 generated images, 18 real ones of test" in capsys.readouterr().out
    tested = workplace / "runs" / "prior" / "version_2"
    assert {"gfid.json", "gfid_grid.png", "rfid.json", "grid.png"} <= {path.name for path in tested.iterdir()}

    # Two processes, each with a share of the probe's pictures and of the generated ones, find what one does.
    values, written = {}, {}
    judged = ["--gfid.classifier=probe", f"--gfid.classifier_data={image_shards / 'train'}", "--gfid.num_samples=9"]
    for name, devices, strategy in (("one", 1, "auto"), ("two", 2, "ddp_fork")):
        places = [f"--gfid.output_dir={name}", f"--gfid.images_dir={name}/images", f"--gfid.cache_dir={name}/cache"]
        parallel = [f"--trainer.devices={devices}", f"--trainer.strategy={strategy}", "--rfid=null"]
        main(["test", *base, *finished, *judged, *places, *parallel])
        records = json.loads((workplace / name / "gfid.json").read_text())
        values[name] = {(r["metric"], r["num_tokens"]): r["value"] for r in records}
        images = workplace / name / "images"
        written[name] = {file.relative_to(images): file.read_bytes() for file in images.rglob("*.png")}
        assert len(list((workplace / name / "cache").glob("probe_*.pt"))) == 1
    assert ("class_agreement", 16) in values["one"]
    assert values["two"] == pytest.approx(values["one"], rel=1e-6, abs=1e-9)
    assert written["two"] == written["one"] and len(written["one"]) == 2 * 9
    main(["generate", *finished, "--budgets", "16", "--num-steps", "1", "--class", "left"])

    assert "names no tokenizer: give --tokenizer" in error_of(capsys, "test", *base, *finished[:2])
    prior = Prior.from_pretrained(run / "prior.safetensors")
    prior.config = dataclasses.replace(prior.config, tokenizer_id=str(tiny_tokenizer))
    naming = ["--prior", str(prior.save_pretrained(workplace / "naming.safetensors"))]
    main(["test", *base, *naming, "--rfid=null", "--gfid.num_samples=8"])
    assert "8 generated images, 18 real ones of test" in capsys.readouterr().out
    torch.manual_seed(17)  # a command leaves its own seed behind, and the first tokenizer may have had the same
    other = FlexTok(FlexTokConfig.preset("tiny")).save_pretrained(workplace / "other.safetensors")
    assert "tokens fit only their own" in error_of(capsys, "test", *base, *finished[:2], "--tokenizer", str(other))
    message = error_of(capsys, "fit", *base, f"--model.tokenizer={other}")
    assert "the set of token shards belongs to tokenizer" in message
    assert "set model.net.num_classes" in error_of(capsys, "fit", *base, *model, "--model.net.num_classes=1")


def test_predictions_are_functions_of_the_key(
    tiny: Any,
    tiny_prior: Path,
    tiny_tokenizer: Path,
    image_shards: Path,
    workplace: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a prior by batches of 2 and of 5 and by two processes, and of a tokenizer."""
    tokenizer, written = {"tokenizer": str(tiny_tokenizer), "rfid": None}, []
    prior = tokenizer | {"prior": str(tiny_prior)}
    two = {"trainer.devices": 2, "trainer.strategy": "ddp_fork"}
    for size, options in ((2, prior), (5, prior), (2, prior | two), (2, tokenizer)):
        main(tiny("predict", options | {"data.eval_batch_size": size}))
        files = (workplace / "runs" / "tokenizer" / "tiny" / f"version_{len(written)}").glob("predictions/*.jsonl")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        written.append({line["key"]: line["tokens"] for line in lines})
        assert len(lines) == len(written[-1]) == 18
    assert written[0] == written[1] == written[2]
    assert len({tuple(tokens) for tokens in written[0].values()}) == 18, "each sample has numbers of its own"
    assert written[3].keys() == written[0].keys() and written[3] != written[0]

    net = {"block_out_channels": (8,), "norm_num_groups": 4}
    VAE(VAEConfig(**net)).save_pretrained(workplace / "vae")
    model = {"class_path": "VAEModule", "init_args": {"net": {**net, "block_out_channels": [8]}, "init_from": "vae"}}
    (workplace / "vae.yaml").write_text(yaml.safe_dump({"model": model, "data": {"image_size": 32, "num_workers": 0}}))
    vae = ["predict", "--config", "vae.yaml", "--data.val", str(image_shards / "val")]
    assert "VAEModule has none" in error_of(capsys, *vae)


def test_data_tools(
    tiny: Any, tiny_tokenizer: Path, image_shards: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures become shards, and shards latents and features, which replace pictures and teacher."""
    (workplace / "pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(workplace / "pictures" / "a.png")
    main(["data", "folder", "pictures", "shards", "--num-workers", "1"])
    assert ShardIndex.load(workplace / "shards").num_samples == 1
    assert "nowhere" in error_of(capsys, "data", "folder", "nowhere", "elsewhere")

    source = ["data", "latents", str(image_shards / "train"), "latents", "--image-size", "32", "--num-workers", "0"]
    assert "/nowhere" in error_of(capsys, *source, "--vae", "/nowhere")
    write = [*source, "--vae", str(tiny_tokenizer), "--teacher-grid", "8", "--num-views", "2"]
    assert "teacher_grid=8 need a teacher" in error_of(capsys, *write)
    assert "teacher='nosuch' cannot be loaded" in error_of(capsys, *write, "--teacher", "nosuch")
    assert "teacher_grid=0 must be" in error_of(capsys, *write, "--teacher", "effnet-lite2", "--teacher-grid", "0")
    main([*write, "--teacher", "effnet-lite2"])
    assert ShardIndex.load(workplace / "latents").num_samples == 2 * 22
    data = ShardDataModule(val="latents", image_size=32, eval_batch_size=4, num_workers=0)
    assert next(iter(data.val_dataloader()))["latent"].shape == (4, 24, 16, 16)

    options = {"data.train": "latents", "data.val": "latents", "trainer.max_steps": 2, "trainer.log_every_n_steps": 1}
    options |= {"model.net.repa_layer": 0, "model.teacher": "effnet-lite2", "model.vae": str(tiny_tokenizer)}
    fit = tiny("fit", options | {"rfid": None, "codebook": None, "metrics_log": {}})
    main(fit)
    assert "train/repa" in next((workplace / "runs").rglob("metrics.jsonl")).read_text()
    assert "features of the teacher" in error_of(capsys, *fit, "--model.teacher=vit_tiny_patch16_224")
