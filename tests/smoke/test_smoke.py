"""`flextok fit --smoke` of every experiment, with narrow networks, and its rule for large ones."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flextok_pl import config
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.cli import main, smoke, stand_ins

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(
    str(file.relative_to(ROOT / "experiments").with_suffix(""))
    for folder in ("vae", "tokenizer", "prior")
    for file in (ROOT / "experiments" / folder).glob("*.yaml")
)

VAE = "block_out_channels [8,8,8,8] norm_num_groups 4"
TOKENIZER = "encoder_width 64 encoder_depth 2 decoder_width 64 decoder_depth 2"
PRIOR = "width 64 depth 2 num_tokens 16"
NARROW = {
    "vae/imagenet": {"model.net": VAE, "data": "image_size 32"},
    "tokenizer/d1": {
        "model.net": TOKENIZER,
        "model.net.vae": VAE,
        "model": "teacher test_vit.r160_in1k",
        "data": "image_size 64",
    },
    "tokenizer/finetune_yours": {"model.net": TOKENIZER, "model.net.vae": VAE, "data": "image_size 64"},
    "prior/finetune_yours": {"model.net": PRIOR, "data": "image_size 32"},
    "prior/imagenet": {"model.net": PRIOR, "data": "image_size 32", "gfid": "classifier test_resnet.r160_in1k"},
    "prior/text_t5": {"model.net": f"{PRIOR} text_width 64", "data": "image_size 32"},
}
"""Beginning of an experiment's name -> options that make its networks small. The others are the demo's, and small."""

COUNTED = ("tokenizer/d18_d28_imagenet", "prior/imagenet_class", "vae/demo")
"""Experiments whose operations are counted, which takes a second."""


def narrow(name: str) -> list[str]:
    groups = next((groups for start, groups in NARROW.items() if name.startswith(start)), {})
    pairs = [(group, text.split()) for group, text in groups.items()]
    options = [
        f"--{group}.{option}={value}"
        for group, words in pairs
        for option, value in zip(words[::2], words[1::2], strict=True)
    ]
    text = (ROOT / "experiments" / f"{name}.yaml").read_text()
    measures = [group for group in ("rfid", "gfid") if "inception" in text and f"\n{group}:" in text]
    options += [f"--{group}.extractor=effnet-lite0" for group in measures]
    return options + ["--throughput=null"] * (name not in COUNTED)


@pytest.mark.usefixtures("_small")
def test_a_name_of_clip_may_be_a_path(tmp_path: Path) -> None:
    assert stand_ins.write_clip(tmp_path, Path("openai", "clip-vit-large-patch14")) == tmp_path / "clip"


def test_a_random_inception(tmp_path: Path) -> None:
    file = stand_ins.write_inception(tmp_path, "inception-v3-compat")
    assert build_extractor("inception-v3-compat", file).dim == 2048


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(config.TOKENIZER_PRESETS, "d18_d28", config.TOKENIZER_PRESETS["tiny"])
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    small = (sizes, sizes | {"image_size": 224, "patch_size": 112}, 8)
    monkeypatch.setitem(stand_ins.CLIPS, "openai/clip-vit-large-patch14", small)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", f"--config=experiments/{name}.yaml", "--smoke", "--trainer.enable_progress_bar=false", *narrow(name)])
    said = capsys.readouterr().out
    assert "the numbers above mean nothing" in said.splitlines()[-1]
    assert f"results in {tmp_path}" in said and not [*tmp_path.glob("flextok_*")], "it leaves nothing"
    assert len(re.findall(r"of (?:val|test), ", said)) >= (name.split("/")[0] != "vae")
    model = name.split("/")[0]
    assert model == "vae" or f"{model} exported to {tmp_path}" in said


@pytest.mark.parametrize("name", sorted(config.TOKENIZER_PRESETS))
def test_large_tokenizers_have_few_blocks(name: str) -> None:
    given = config.TOKENIZER_PRESETS[name]
    kept = smoke.with_few_blocks(given)
    if name in ("demo", "tiny"):
        assert kept == given
        return
    assert kept == replace(given, encoder_depth=2, decoder_depth=2)


def test_large_priors_have_few_blocks() -> None:
    given = config.PRIOR_PRESETS["1.33b"]
    assert smoke.with_few_blocks(given) == replace(given, depth=2)


TINY = "--config=experiments/tokenizer/tiny.yaml"
WRONG = [
    (f"{TINY} --ckpt_path=last", "ckpt_path=last: --smoke starts from nothing; leave it out"),
    ("--config=experiments/tokenizer/demo.yaml --model.vae=nobody/nothing", "net.vae=null"),
    (f"{TINY} --rfid.extractor=clip-rn50", "rfid.extractor: --smoke has no stand-in for https"),
    (
        "--config=experiments/prior/tiny.yaml --model.tokenizer=X",
        "model.tokenizer=X is not here, and its name does not",
    ),
]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_what_it_cannot_do(arguments: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=re.escape(said)):
        main(["fit", "--smoke", *arguments.split()])
    assert not [*tmp_path.glob("flextok_*")]
