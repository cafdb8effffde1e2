"""Models on the Hub: what goes there, what its card says, and that it comes back, by a stand-in on this machine."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_helpers import TOKEN, Hub, running_hub
from huggingface_hub import constants

from flextok_pl.cli import main
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.evaluation.protocol import model_hashes
from flextok_pl.interop.hub import HubFiles
from flextok_pl.models.prior import Prior
from flextok_pl.models.starting import start_from
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.sharing.card import ModelFacts, model_card
from flextok_pl.sharing.publication import Publication
from flextok_pl.sharing.run import RunFacts
from flextok_pl.sharing.usage import usage

LICENCES = {"license": "apache-2.0", "data_license": "CC BY-SA 4.0"}
GIVEN = [f"--{name}={value}" for name, value in LICENCES.items()]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with running_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def tok() -> FlexTok:
    torch.manual_seed(0)
    return FlexTok(FlexTokConfig.preset("tiny")).eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(map(torch.equal, left.values(), right.values()))


def write_run(folder: Path, tok: FlexTok, digest: str | None = None) -> Path:
    """A run with an export, and an evaluation beside it."""
    run, test, data = folder / "runs" / "version_0", folder / "runs" / "version_1", folder / "secret" / "pictures"
    for each in (run, test, data / "train"):
        each.mkdir(parents=True)
    tok.save_pretrained(run / "tokenizer.safetensors")
    options = {"trainer": {"max_steps": 40, "precision": "32-true"}, "data": {"train": str(data / "train")}}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    attempt = {"from_step": 0, "to_step": 30, "seconds": 7200.0, "devices": 2, "device": "H200"}
    (run / "training.json").write_text(json.dumps({"attempts": [attempt, attempt | {"from_step": 38, "to_step": 40}]}))
    index = {"num_samples": 4133, "image_size": 32, "classes": ["a", "b"]}
    index |= {"provenance": {"images": [{"credit": "by Ada"}]}}  # as of latents
    (data / "train" / "index.json").write_text(json.dumps(index))
    protocol = {
        **{"num_samples": 9, "image_size": [32, 32], "reference": str(data / "val"), "extractor": "effnet-lite0"},
        **{"num_steps": 3, "solver": "euler", "guidance": "cfg", "guidance_scale": 2.0, "seed": 0, "complete": True},
        "tokenizer_hash": digest or weights_hash(tok),
    }
    records = [
        {"metric": metric, "value": value / k, "num_tokens": k, **protocol}
        for k in (1, 16)
        for metric, value in (("fd_x", 8.0), ("psnr", 2.0))
    ]
    (test / "rfid.json").write_text(json.dumps(records))
    (test / "grid.png").write_bytes(b"picture")
    return run


def matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def code_of(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]


def test_a_run_goes_there_and_comes_back(
    hub: Hub, tok: FlexTok, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, tok)
    command = ["push", str(run), "me/small", *GIVEN, "--data=me/pictures", "--max_shard_size=200KB"]
    main(command)
    shown = capsys.readouterr().out
    assert "repository: me/small, branch main" in shown and "Nothing was sent" in shown and "# small" in shown
    assert not hub.asked and not hub.repositories, "a dry run asks nobody"

    main([*command, "--private", "--gated=manual", "--message=First", "--send"])
    there = hub.repositories["me/small"]
    assert there.private and there.gated == "manual" and there.messages == ["initial commit", "First"]
    files = there.commits[there.branches["main"]]
    assert {"README.md", "grid.png", "rfid.json", "model.safetensors.index.json"} < set(files)
    assert sum(name.startswith("model-") for name in files) > 1
    assert "secret" not in files["rfid.json"].decode() + files["README.md"].decode(), "paths of this machine stay here"
    there.gated = there.private = False

    loaded = FlexTok.from_pretrained("me/small")
    assert same(loaded, tok) and loaded.config == tok.config
    assert loaded.loaded_from == f"me/small@{there.branches['main']}"
    assert model_hashes(loaded) == {"tokenizer_hash": weights_hash(tok), "tokenizer_source": loaded.loaded_from}
    start = start_from(FlexTok(tok.config), "me/small")
    assert start.notes["started_from"] == f"{loaded.loaded_from} ({weights_hash(tok)})"

    card = files["README.md"].decode()
    found = matter(card)
    assert (found["license"], found["library_name"], found["pipeline_tag"]) == (
        "apache-2.0",
        "flextok_pl",
        "image-to-image",
    )
    assert found["datasets"] == ["me/pictures"] and "base_model" not in found
    (measured,) = found["model-index"][0]["results"]
    assert measured["metrics"][2] == {"type": "fd_x", "value": 0.5, "name": "fd_x, tokens: 16"}
    for fact in (
        *("| 16 | 0.5 | 0.125 |", "| num_samples | `9` |", "![Held-out pictures", "Samples: 4,133", "Credit: by Ada"),
        *("Licence: CC BY-SA 4.0", "Steps: 40", "8 device hours on 2 x H200 for 32 steps", "further 8 steps were"),
        *("bachmann2025flextok", f"`{weights_hash(tok)}`", "pictures/val"),
    ):
        assert fact in card, fact
    exec(code_of(card), scope := {})
    assert scope["again"].shape == scope["images"].shape


def test_states_of_a_repository(hub: Hub, tok: FlexTok, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = {"num_steps": 2, "guidance": "none", "guidance_scale": 1.0}
    other = FlexTok(dataclasses.replace(tok.config, num_registers=8, **decoding))
    tok.push_to_hub("me/m", send=True, **LICENCES)
    first = hub.repositories["me/m"].branches["main"]
    other.push_to_hub("me/m", send=True, revision="small/8", **LICENCES)
    tok.push_to_hub("me/m", send=True, max_shard_size="200KB", **LICENCES)
    there = hub.repositories["me/m"]
    assert set(there.branches) == {"main", "small/8"}
    small = there.commits[there.branches["small/8"]]["README.md"].decode()
    assert "| Made to decode in | 2 steps, guidance none 1.0 |" in small and '("me/m@small/8")' in small
    assert "model.safetensors" not in there.commits[there.branches["main"]], "it would be loaded in place of the shards"
    assert [FlexTok.from_pretrained(f"me/m{at}").num_registers for at in ("", f"@{first}", "@small/8")] == [16, 16, 8]
    with pytest.raises(ValueError, match="me/m has no revision 'large': give a branch"):
        FlexTok.from_pretrained("me/m@large")

    asked = len(hub.asked)
    for name, value in {"HF_HUB_OFFLINE": True, "ENDPOINT": "http://127.0.0.1:9"}.items():
        monkeypatch.setattr(constants, name, value)
    assert same(FlexTok.from_pretrained("me/m"), tok) and FlexTok.from_pretrained("me/m@small/8").num_registers == 8
    assert FlexTok.from_pretrained("me/m").loaded_from == f"me/m@{there.branches['main']}"
    for name in ("me/other", "me/m@large", f"me/m@{'0' * 40}"):
        with pytest.raises(ValueError, match=rf"model.safetensors of {name} is not in the cache .*flextok prefetch"):
            FlexTok.from_pretrained(name)
    shard = next(Path(constants.HF_HUB_CACHE).glob("**/snapshots/*/model-00002-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} of me/m is not in the cache"):
        FlexTok.from_pretrained("me/m")
    assert len(hub.asked) == asked


def test_what_the_hub_refuses(hub: Hub, tok: FlexTok, monkeypatch: pytest.MonkeyPatch) -> None:
    tok.push_to_hub("me/m", send=True, gated="auto", **LICENCES)
    commits = len(hub.repositories["me/m"].commits)
    for route, status, said in (
        ("create", 403, "must be allowed to write to repositories of me"),
        ("commit", 409, "somebody else changed me/new in the meantime"),
        ("preupload", 418, "the Hub answers 418"),
        ("validate-yaml", 400, "Invalid metadata in README.md"),
    ):
        hub.refuse = {route: status}
        with pytest.raises(ValueError, match=f"nothing was committed: .*{said}"):
            tok.push_to_hub("me/new", send=True, **LICENCES)
    hub.refuse = {}
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="nothing was committed: HF_HUB_OFFLINE is set"):
            tok.push_to_hub("me/m", send=True, **LICENCES)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="the Hub does not accept the token"):
        tok.push_to_hub("me/m", send=True, **LICENCES)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no token for the Hub.*HF_TOKEN"):
        tok.push_to_hub("me/m", send=True, **LICENCES)
    assert len(hub.repositories["me/m"].commits) == commits
    with pytest.raises(ValueError, match="me/m is gated: ask for access at http"):
        FlexTok.from_pretrained("me/m")
    with pytest.raises(ValueError, match="the Hub has no me/nothing that you can see; check the name"):
        FlexTok.from_pretrained("me/nothing")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(FlexTok.from_pretrained("me/m"), tok)


def test_a_change_by_somebody_else(hub: Hub, tok: FlexTok, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at the repository and the commit."""
    from huggingface_hub import HfApi

    tok.push_to_hub("me/m", send=True, **LICENCES)
    look = HfApi.model_info

    def slow(self: HfApi, *arguments: Any, **options: Any) -> Any:
        found = look(self, *arguments, **options)
        hub.repositories["me/m"].commit("main", {}, "theirs")
        return found

    monkeypatch.setattr(HfApi, "model_info", slow)
    with pytest.raises(ValueError, match="somebody else changed me/m in the meantime"):
        tok.push_to_hub("me/m", send=True, max_shard_size="200KB", **LICENCES)
    assert hub.repositories["me/m"].messages[-1] == "theirs"


def test_it_is_private_before_anything_is_there(hub: Hub, tok: FlexTok) -> None:
    tok.push_to_hub("me/m", send=True, **LICENCES)
    there = hub.repositories["me/m"]
    hub.refuse = {"commit": 403}
    with pytest.raises(ValueError, match="nothing was committed"):
        tok.push_to_hub("me/m", send=True, private=True, gated="manual", message="More", max_shard_size=9, **LICENCES)
    assert there.private and there.gated == "manual" and "More" not in there.messages
    hub.refuse = {}
    tok.push_to_hub("me/m", send=True, message="More", max_shard_size="1MB", **LICENCES)
    assert there.private and there.gated == "manual" and there.messages[-1] == "More", "no option makes it public"


def test_a_repository_that_changes_while_it_is_read(
    hub: Hub, tok: FlexTok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tok.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    commit = hub.add("me/m", tmp_path / "m")
    fetch = HubFiles.fetch

    def slow(self: HubFiles, name: str) -> Path | None:
        file = fetch(self, name)
        if name.endswith("index.json") and file:
            hub.add("me/m", tmp_path / "cache")
        return file

    monkeypatch.setattr(HubFiles, "fetch", slow)
    assert same(FlexTok.from_pretrained("me/m"), tok)
    assert hub.repositories["me/m"].branches["main"] != commit


def test_files_that_would_be_loaded_instead(hub: Hub, tmp_path: Path) -> None:
    prior = Prior(PriorConfig(vocab_size=8, num_tokens=4, depth=1, width=32, head_dim=16))
    (tmp_path / "r").mkdir()
    prior.save_pretrained(tmp_path / "r")
    hub.add("me/both", tmp_path / "r")
    assert prior.push_to_hub("me/both", send=True, **LICENCES)
    (tmp_path / "r" / "prior.safetensors").rename(tmp_path / "r" / "model.safetensors")
    hub.add("me/both", tmp_path / "r")
    with pytest.raises(ValueError, match=r"me/both has model.safetensors, which would be loaded in place of prior"):
        prior.push_to_hub("me/both", send=True, max_shard_size="10KB", **LICENCES)


def test_an_incomplete_model_of_the_hub(hub: Hub, tok: FlexTok, tmp_path: Path) -> None:
    tok.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    next((tmp_path / "m").glob("model-00002-*")).unlink()
    hub.add("me/m", tmp_path / "m")
    with pytest.raises(ValueError, match="'me/m' of the Hub is incomplete: .* names model-00002"):
        FlexTok.from_pretrained("me/m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "../../../x.safetensors"}}')
    hub.add("me/m", tmp_path / "m")
    asked = len(hub.asked)
    with pytest.raises(ValueError, match="it must be a .safetensors file beside it"):
        FlexTok.from_pretrained("me/m")
    assert not any(path.endswith("/x.safetensors") for _, path in hub.asked[asked:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"license": "mit"}, "data_license is missing: give the licence of the training data"),
        ({"data_license": "x"}, "license is missing: give the licence for use of the weights"),
        (LICENCES | {"license": "Apache 2"}, "license='Apache 2' is not an identifier"),
        (LICENCES | {"license": "other"}, "`other` needs a link"),
        (LICENCES | {"license_link": "https://x"}, "`other` needs a link"),
        (LICENCES | {"gated": "yes"}, "gated='yes' must be auto or manual"),
        (LICENCES | {"revision": "../x y"}, "is not the name of a branch"),
        (LICENCES | {"message": " "}, "message='' is empty"),
        (LICENCES | {"repository": "me/m@main"}, "must be OWNER/NAME"),
        (LICENCES | {"repository": "m"}, "must be OWNER/NAME"),
    ],
)
def test_what_a_card_needs(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Publication(**{"repository": "me/m", **options})


def test_the_command_says_what_to_give(tiny_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="push: error: data_license is missing.*data_license='CC BY-SA 4.0'"):
        main(["push", str(tiny_tokenizer), "me/m", "--licence=mit"])
    with pytest.raises(SystemExit, match="only a prior has one"):
        main(["push", str(tiny_tokenizer), "me/m", *GIVEN, "--tokenizer=me/t"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(SystemExit, match="exists and is not empty"):
        main(["push", str(tiny_tokenizer), "me/m", *GIVEN, f"--out={tmp_path / 'full'}"])


def test_records_must_be_of_these_weights(tok: FlexTok, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, tok, digest="0123456789abcdef")
    run.with_name("version_2").mkdir()
    run.with_name("version_2").joinpath("rfid.json").write_text("{}")  # not this run's
    tok.push_to_hub("me/m", run=run, out=tmp_path / "out", **LICENCES)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No evaluation of these weights was recorded." in card and "model-index" not in matter(card)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors"]
    with pytest.raises(ValueError, match="are of the weights 0123456789abcdef, and these are"):
        tok.push_to_hub("me/m", records=run.with_name("version_1"), **LICENCES)
    with pytest.raises(ValueError, match="has no rfid.json"):
        tok.push_to_hub("me/m", records=run, **LICENCES)
    (run / "rfid.json").write_text("{}")
    with pytest.raises(ValueError, match="rfid.json is not a list of records"):
        tok.push_to_hub("me/m", run=run, **LICENCES)


def test_half_precision(tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", str(tiny_tokenizer), "me/m", *GIVEN, "--half", f"--out={tmp_path / 'out'}"])
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 0.6 * tiny_tokenizer.stat().st_size
    card, half = (tmp_path / "out" / "README.md").read_text(), FlexTok.from_pretrained(tmp_path / "out")
    assert "| Weights | float16" in card and f"`{weights_hash(half)}`" in card
    assert "Started from: not recorded" in card and "Cost: not recorded" in card and "Data: not recorded" in card


def test_cards_of_priors(hub: Hub, tok: FlexTok, tmp_path: Path) -> None:
    tok.push_to_hub("me/tok", send=True, **LICENCES)
    config = PriorConfig(
        num_classes=2, vocab_size=64000, num_tokens=16, depth=1, width=32, head_dim=16, class_names=("cat", "dog")
    )
    note = f"me/base@{'a' * 40} (0123): blocks"
    prior = Prior(dataclasses.replace(config, tokenizer="0123", started_from=note))
    prior.save_pretrained(tmp_path / "p")
    main(["push", str(tmp_path / "p"), "me/prior", *GIVEN, "--tokenizer=me/tok", "--send"])
    loaded = Prior.from_pretrained("me/prior")
    assert loaded.config.tokenizer_id == "me/tok" and same(loaded, prior)
    there = hub.repositories["me/prior"]
    card = there.commits[there.branches["main"]]["README.md"].decode()
    found = matter(card)
    assert found["pipeline_tag"] == "unconditional-image-generation" and found["base_model"] == "me/base"
    assert found["base_model_relation"] == "finetune" and "| Tokenizer | me/tok, hash `0123` |" in card
    exec(code_of(card), scope := {})
    assert scope["tokens"].shape == (2, 16) and len(scope["images"]) == 2


def test_the_code_of_a_card_has_the_shape_that_the_model_decodes(tmp_path: Path) -> None:
    config = dataclasses.replace(FlexTokConfig.preset("tiny"), trained_grids=((2, 4), (4, 2)))
    FlexTok(config).save_pretrained(tmp_path)
    exec(code_of(usage(str(tmp_path), config)), scope := {})
    assert scope["again"].shape == scope["images"].shape
    card = model_card(Publication("me/m", **LICENCES), ModelFacts(config, {}, "float32", "0", "ours"), RunFacts())
    height, width = scope["images"].shape[2:]
    assert f"pictures of {height} x {width} or {width} x {height} become" in " ".join(card.split())


def test_cards_of_text_priors_and_autoencoders(hub: Hub, tmp_path: Path) -> None:
    text = PriorConfig(text_width=8, text_encoder="minilm", tokenizer_id="/home/ada/tok")
    facts = ModelFacts(text, {"blocks": 7}, "float32", "0", "ours")
    card = model_card(Publication("me/m", **LICENCES), facts, RunFacts())
    assert matter(card)["pipeline_tag"] == "text-to-image" and "TextEncoder(" in code_of(card)
    assert "/home" not in card and "OWNER/TOKENIZER" in code_of(card) and "| Tokenizer | ada/tok |" in card

    grey = VAEConfig(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, image_channels=1
    )
    vae = VAE(grey)
    vae.save_pretrained(tmp_path / "run" / "vae")
    main(["push", str(tmp_path / "run"), "me/vae", *GIVEN, "--send"])
    assert same(VAE.from_pretrained("me/vae@main"), vae)
    there = hub.repositories["me/vae"]
    exec(code_of(there.commits[there.branches["main"]]["README.md"].decode()), scope := {})
    assert scope["again"].shape == scope["images"].shape
    with pytest.raises(ValueError, match="an autoencoder has one format"):
        vae.push_to_hub("me/vae", max_shard_size="1MB", **LICENCES)
    with pytest.raises(ValueError, match="no command measures an autoencoder"):
        vae.push_to_hub("me/vae", records=tmp_path, **LICENCES)
    with pytest.raises(ValueError, match="`pixel` autoencoder has no weights"):
        VAE(VAEConfig(kind="pixel", latent_channels=3)).push_to_hub("me/vae", **LICENCES)
