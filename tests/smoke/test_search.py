"""`flextok search` and `flextok search measure`, through the front door, on tiny models."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flextok_pl.cli import main
from flextok_pl.config import GenerationConfig, PriorConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.data import write_folder
from flextok_pl.evaluation.generation import Prompt, generate_tokens
from flextok_pl.flow.decoding import Decoding
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.saved import SavedPrior
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.records import read_run
from flextok_pl.search.scoring import decode_tokens

CLASSES = ("left", "right", "up")
VERIFIER = """
import os, signal
from pathlib import Path

def red(images, prompts, context):
    with open("calls", "a") as file:
        file.write(f"{prompts[0].key} {context.tokens.shape[1]}\\n")
    if len(Path("calls").read_text().splitlines()) == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return images[:, 0].double().mean((1, 2)) - images[:, 2].double().mean((1, 2))

def veto(images, prompts, context):
    return red(images, prompts, context) - float("inf")
"""


@pytest.fixture(scope="module")
def models(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tokenizer and a prior of three classes before any training."""
    sha = weights_hash(FlexTok.from_pretrained(tiny_tokenizer))
    net = {"vocab_size": 64000, "num_tokens": 16, "depth": 1, "width": 32, "head_dim": 16, "tokenizer": sha}
    torch.manual_seed(0)
    prior = Prior(PriorConfig(num_classes=3, class_names=CLASSES, **net))
    file = prior.save_pretrained(tmp_path_factory.mktemp("prior"))
    return ["--prior", str(file), "--tokenizer", str(tiny_tokenizer), "--num_steps", "1", "--guidance", "none"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with a verifier that likes red."""
    monkeypatch.chdir(tmp_path)
    name = f"verifier_{abs(hash(tmp_path))}"  # a module is imported once
    (tmp_path / f"{name}.py").write_text(VERIFIER)
    monkeypatch.setenv("VERIFIER", f"{name}:red")
    return tmp_path


def beam(models: list[str], *more: str) -> list[str]:
    small = ["--schedule", "[1,4,16]", "--num_candidates", "3", "--beam_width", "2"]
    return ["search", *models, *small, "--verifier", os.environ["VERIFIER"], *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pixels(file: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1)


def occurs(small: Tensor, large: Tensor) -> bool:
    """Whether a picture stands somewhere in another one."""
    _, height, width = small.shape
    corners = (large == small[:, :1, :1]).all(0).nonzero().tolist()
    return any(torch.equal(large[:, y : y + height, x : x + width], small) for y, x in corners)


def test_what_a_search_leaves(models: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(beam(models, "--class", "up", "--class", "0", "--trees", "1", "--num_results", "2", "--out", "run"))
    assert "run: prompts: 2, mean score" in capsys.readouterr().out
    run = place / "run"
    assert sorted(contents(run)) == [
        *(
            f"images/0000{n}/{file}"
            for n in (0, 1)
            for file in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
        ),
        "protocol.json",
        *(f"records/0000{n}.json" for n in (0, 1)),
        "search.jsonl",
        "trees/00000.png",
    ]
    assert json.loads((run / "images/00000/metadata.jsonl").read_text()) == {"prompt": "up", "label": 2}
    protocol, records = read_run(run)
    assert protocol["class_names"] == list(CLASSES) and protocol["verifier"]["verifier"] == os.environ["VERIFIER"]
    first = records[0]
    assert first["key"] == "class 2 sample 0" and len(first["prior_hash"]) == len(first["tokenizer_hash"]) == 16
    assert [len(step["scores"]) for step in first["steps"]] == [2, 2, 2]
    # Pools of 3, 6 and 6, each decoded in one step without guidance.
    assert first["cost"]["decoder_calls"] == first["cost"]["verifier_calls"] == 15
    scores = [result["score"] for result in first["results"]]
    shown = pixels(run / first["results"][0]["image"]).double()
    assert scores == sorted(scores, reverse=True)
    assert float(shown[0].mean() - shown[2].mean()) == pytest.approx(scores[0]), "the image is what was judged"
    # Every kept candidate has its tile in the tree.
    tree, tok = pixels(run / "trees/00000.png"), FlexTok.from_pretrained(models[3])
    tiles = [tokens for step in first["steps"] for tokens in step["tokens"]]
    options = SearchOptions(decoding=Decoding(1, "none"))
    assert len(tiles) == 6
    for tokens in tiles:
        assert occurs(decode_tokens(tok, torch.tensor([tokens]), Prompt(first["key"]), options)[0], tree)


def test_all_candidates_refused(models: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    veto = os.environ["VERIFIER"].replace(":red", ":veto")
    options = ["--class", "up", "--verifier", veto, "--schedule", "[1]", "--num_candidates", "2", "--out", "run"]
    main(["search", *models, *options])
    assert "run: prompts: 1, mean score infinite" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="run has infinite scores, which have no mean"):
        main(["search", "measure", "run"])


def test_the_best_of_one_is_a_sample(models: list[str], place: Path) -> None:
    one = ["--algorithm", "best_of_n", "--num_candidates", "1", "--verifier", "likelihood"]
    main(["search", *models, *one, "--seed", "5", "--samples", "2", "--class", "right"])
    module = SavedPrior(models[1], models[3]).eval()
    prompts = [Prompt(f"class 1 sample {i}", 1) for i in range(2)]
    wanted = generate_tokens(module, prompts, seed=5).tolist()
    _, records = read_run(place / "runs/search")
    assert [record["results"][0]["tokens"] for record in records] == wanted
    assert records[0]["cost"]["decoder_calls"] == 0, "the verifier looks at tokens"


def test_options_of_a_published_prior(models: list[str], place: Path) -> None:
    """What its configuration names holds where the command line says nothing else."""
    prior = Prior.from_pretrained(models[1])
    prior.config = replace(prior.config, generation=GenerationConfig(cfg_scale=3.0, top_k=7, num_steps=2))
    own = ["--prior", str(prior.save_pretrained(place / "published")), *models[2:4], "--guidance", "none"]
    one = ["--algorithm", "best_of_n", "--num_candidates", "2", "--class", "0"]
    for more, wanted in (([], (3.0, 7, 2)), (["--cfg_scale", "1.0", "--num_steps", "25"], (1.0, 7, 25))):
        main(["search", *own, *one, *more, "--out", f"run{len(more)}"])
        _, (record,) = read_run(place / f"run{len(more)}")
        assert (record["cfg_scale"], record["top_k"], record["num_steps"]) == wanted


def test_the_steps_of_a_distilled_tokenizer(models: list[str], place: Path) -> None:
    """They count more than what the prior's configuration names, and less than the command line."""
    prior, tok = Prior.from_pretrained(models[1]), FlexTok.from_pretrained(models[3])
    prior.config = replace(prior.config, generation=GenerationConfig(num_steps=9, guidance="cfg", guidance_scale=5.0))
    tok.config = replace(tok.config, num_steps=2, guidance="none", guidance_scale=1.0)
    own = ["--prior", str(prior.save_pretrained(place / "p")), "--tokenizer", str(tok.save_pretrained(place / "t"))]
    given = ["--guidance", "cfg", "--guidance_scale", "3.0", "--guidance_interval", "[0.0,0.5]"]
    searched = ["search", *own, "--algorithm", "best_of_n", "--num_candidates", "2", "--class", "0"]
    for more, wanted in (([], (2, "none", 1.0, None)), (given, (2, "cfg", 3.0, [0.0, 0.5]))):
        main([*searched, *more, "--verifier", os.environ["VERIFIER"], "--out", f"run{len(more)}"])
        _, (record,) = read_run(place / f"run{len(more)}")
        names = ("num_steps", "guidance", "guidance_scale", "guidance_interval")
        assert tuple(record.get(name) for name in names) == wanted
        assert record["cost"]["decoder_calls"] == 2 * (3 if more else 2), "of each candidate"

    drawn: list[tuple[object, ...]] = []
    made = FlexTok.sample_latents

    def noted(*given: object, **named: object) -> object:
        options = ("num_steps", "guidance", "guidance_scale")
        drawn.append(given[3:6] or tuple(named.get(name) for name in options))
        return made(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlexTok, "sample_latents", noted)
        main(["generate", *own, "--budgets", "4", "--class", "0"])
        main(["generate", *own, "--budgets", "4", "--class", "0", "--num_steps", "1"])
        Image.new("RGB", (32, 32)).save("picture.png")
        main(["reconstruct", "picture.png", *own[2:], "--budgets", "4"])
        main(["reconstruct", "picture.png", *own[2:], "--budgets", "4", "--guidance", "none", "--num_steps", "3"])
    assert drawn[:2] == [(2, "none", 1.0), (1, "none", 1.0)], "resolved by the command"
    assert drawn[2:] == [(None, None, None), (3, "none", None)], "left to the tokenizer"


def killed_at(call: int, arguments: list[str]) -> int | None:
    def child() -> None:
        os.environ["KILL_AT"] = str(call)
        main(arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    return process.exitcode


def assert_same_runs(one: Path, other: Path) -> None:
    """Bit-equal, but for log-probabilities: a prefix that is run again rounds in another way than one in a cache."""
    files, others = (contents(each) for each in (one, other))
    assert sorted(files) == sorted(others)
    for name, data in files.items():
        assert "json" in name or data == others[name], name
    for first, second in zip(read_run(one)[1], read_run(other)[1], strict=True):
        for parts in zip(first["results"] + first["steps"], second["results"] + second["steps"], strict=True):
            mine, theirs = ([part.pop(n) for n in ("log_prob", "log_probs") if n in part] for part in parts)
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5, atol=0)
        assert first == second


def test_killed_and_given_again(models: list[str], place: Path) -> None:
    main(beam(models, "--class", "up", "--class", "left", "--out", "whole"))
    calls = (place / "calls").read_text().splitlines()
    assert len(calls) == 6
    (place / "calls").unlink()
    again = beam(models, "--class", "up", "--class", "left", "--decode_batch_size", "2", "--out", "again")
    # In the first prompt's second step, then in the second one's last.
    assert killed_at(2, again) == -signal.SIGKILL
    assert sorted(contents(place / "again")) == ["protocol.json", "unfinished/00000.png", "unfinished/00000.pt"]
    assert killed_at(7, again) == -signal.SIGKILL
    assert (place / "again" / "records" / "00000.json").exists()
    main(again)
    done = (place / "calls").read_text().splitlines()
    assert done == [*calls[:2], *calls[1:6], calls[5]], "only the steps that were killed are searched twice"
    assert_same_runs(place / "again", place / "whole")
    main(again)
    assert len((place / "calls").read_text().splitlines()) == len(done), "nothing is left to do"
    with pytest.raises(SystemExit, match="out=again holds a search with seed=0, not 1: name another folder"):
        main([*again, "--seed", "1"])
    with pytest.raises(SystemExit, match="holds the search for 'class 2 sample 0' as number 0, which is now"):
        main(beam(models, "--class", "left", "--out", "again"))


@pytest.mark.parametrize("algorithm", ["beam", "lookahead", "best_of_n"])
def test_stopped_when_the_last_step_is_done(
    models: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """Nothing is left to search, only to write."""
    command = beam(models, "--class", "up", "--algorithm", algorithm, "--lookahead", "3", "--num_results", "3")
    main([*command, "--out", "whole"])
    calls = (place / "calls").read_text()

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flextok_pl.search.driver.RunFolder.finish", stopped)
        main([*command, "--out", "again"])
    assert (place / "calls").read_text() == 2 * calls
    main([*command, "--out", "again"])
    assert (place / "calls").read_text() == 2 * calls
    assert_same_runs(place / "again", place / "whole")


def test_two_processes_find_what_one_does(models: list[str], place: Path, start_ranks: Callable[..., Any]) -> None:
    asked = ["--class", "up", "--class", "left", "--class", "right", "--trees", "2"]
    main(beam(models, *asked, "--out", "one"))
    for process in start_ranks(place, 2, beam(models, *asked, "--out", "two")):
        process.join(120)
        assert process.exitcode == 0
    assert contents(place / "two") == contents(place / "one")


@pytest.mark.parametrize("algorithm", ["lookahead", "best_of_n"])
def test_other_algorithms(models: list[str], place: Path, algorithm: str) -> None:
    main(beam(models, "--algorithm", algorithm, "--lookahead", "4", "--class", "0", "--out", "run"))
    _, (record,) = read_run(place / "run")
    assert record["algorithm"] == algorithm and len(record["results"][0]["tokens"]) == 16
    assert record["cost"]["verifier_calls"] == (3 if algorithm == "best_of_n" else 15)


def test_without_a_prior(models: list[str], place: Path) -> None:
    main(beam(["--prior", "uniform", *models[2:]], "--text", "a red square", "--out", "run"))
    protocol, (record,) = read_run(place / "run")
    assert (record["key"], record["text"]) == ("text a red square sample 0", "a red square")
    assert protocol["prior"] == "uniform" and record["cost"]["prior_positions"] == 0


def test_texts_in_genevals_layout(tiny_tokenizer: Path, place: Path) -> None:
    net = {"vocab_size": 64000, "num_tokens": 16, "depth": 1, "width": 32, "head_dim": 16, "text_width": 384}
    config = PriorConfig(text_encoder="minilm", tokenizer=weights_hash(FlexTok.from_pretrained(tiny_tokenizer)), **net)
    prior = Prior(config).save_pretrained(place / "text_prior")
    rows = [
        {"tag": "colors", "include": [], "prompt": "a photo of a red cup"},
        {"tag": "counting", "prompt": "two cups"},
    ]
    (place / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--prior", str(prior), "--tokenizer", str(tiny_tokenizer), "--num_steps", "1", "--guidance", "none"]
    main(beam(files, "--prompts", "geneval.jsonl", "--out", "run"))
    found = [json.loads((place / "run/images" / name / "metadata.jsonl").read_text()) for name in ("00000", "00001")]
    assert found == rows


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--class", "down"], "class 'down' is unknown"),
        (["--text", "red"], "--text: this prior is conditioned on class"),
        (["--prompts", "nowhere.txt"], "prompts=nowhere.txt: there is no such file"),
        (["--samples", "0"], "samples=0 must be at least 1"),
        (["--schedule", "[4,2]"], "schedule=[4, 2] must be ascending"),
        (["--schedule", "[64]"], "in 1..16"),
        (["--algorithm", "beam", "--num_candidates", "0"], "num_candidates=0 must be a whole number of at least 1"),
        (["--verifier", "taste"], "'taste' is unknown"),
        (["--verifier", "class"], "needs a classifier"),
        (["--verifier", "nowhere:function"], "there is no module nowhere"),
        (["--top_p", "0"], "top_p=0.0"),
        (["--trees", "-1"], "trees=-1 must be 0 or more"),
        (["--out", ""], "out='' names no folder"),
        (["--text-encoder", "minilm"], "text_encoder='minilm': this prior takes no text"),
    ],
)
def test_wrong_options_are_one_line(
    models: list[str], place: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    verifier = [] if "--verifier" in options else ["--verifier", "likelihood"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["search", *models, *verifier, *options])
    message = str(stop.value)
    assert message.startswith("flextok search: error: ") and complaint in message and "\n" not in message
    assert not (place / "runs").exists()


def test_quality_against_cost(
    models: list[str], place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A probe of one network is the verifier, one of another network the judge."""
    rng = np.random.default_rng(0)
    for i in range(24):
        file = tmp_path / "pictures" / CLASSES[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = np.eye(3)[i % 3] * 200 + rng.integers(0, 40, (32, 32, 3))
        Image.fromarray(colour.astype(np.uint8)).save(file)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    write_folder(tmp_path / "pictures", tmp_path / "shards", num_workers=1, classes=names)
    (data,) = {str(file.parent) for file in (tmp_path / "shards").rglob("*.tar")}
    probe = ["--classifier", "probe", "--classifier_data", data]
    verifier = ["--verifier", "class", *probe, "--classifier_extractor", "effnet-lite2"]
    common = ["search", *models, *verifier, "--schedule", "[2,16]", "--beam_width", "2", "--samples", "3"]
    for seed in ("0", "1"):
        main([*common, "--algorithm", "best_of_n", "--num_candidates", "1", "--seed", seed, "--out", f"direct{seed}"])
    main([*common, "--num_candidates", "2", "--out", "beam"])
    capsys.readouterr()
    main(["search", "measure", "direct0", "direct1", "beam", *probe, "--reference", data])
    printed = capsys.readouterr().out
    assert "class_agreement" in printed and "3 searches" in printed
    records = json.loads((place / "runs/quality/quality.json").read_text())
    assert {r["run"] for r in records} == {"direct0", "direct1", "beam"}
    metrics = {r["metric"] for r in records}
    assert {"class_agreement", "fd_effnet_lite0", "kd_effnet_lite0", "verifier_score"} <= metrics
    assert {(r["run"], r["decoder_calls"]) for r in records} == {("direct0", 1.0), ("direct1", 1.0), ("beam", 6.0)}
    assert all(r["num_samples"] == 9 and r["classifier"] == "probe_effnet_lite0" for r in records)
    with Image.open(place / "runs/quality/quality.png") as picture:
        assert picture.format == "PNG"
    for arguments, complaint in (
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["beam", "--classifier", "probe"], "a probe needs real images"),
        (["beam", "--batch_size", "0"], "batch_size=0 must be at least 1"),
        ([str(tmp_path / "pictures")], "holds no finished search"),
    ):
        with pytest.raises(SystemExit, match=complaint):
            main(["search", "measure", *arguments])
