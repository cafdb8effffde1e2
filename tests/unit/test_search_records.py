"""What a search leaves on disk, and from where it goes on."""

import json
from pathlib import Path

import pytest
import torch

from flextok_pl.evaluation.generation import Prompt
from flextok_pl.search.records import RunFolder, mean_score, read_run
from flextok_pl.search.results import Cost, SearchResult, Step

PROTOCOL = {"algorithm": "beam", "schedule": (1, 2), "verifier": {"name": "mine"}, "device": "cpu"}
CAT = Prompt("text a cat sample 0", text="a cat", metadata={"tag": "single_object", "prompt": "a cat"})
DOG = Prompt("class 3 sample 0", 3, "dogs")


def step(k: int) -> Step:
    tokens = torch.arange(2 * k).view(2, k)
    numbers = torch.tensor([0.5, 0.25], dtype=torch.float64)
    return Step(k, tokens, numbers, -numbers, torch.tensor([1, 0]), torch.tensor([3, 2]), Cost(k, 2 * k, 3, 4))


def result() -> SearchResult:
    last = step(2)
    return SearchResult(last.tokens, last.scores, last.log_probs, last.candidates, [step(1), last], Cost(9, 8, 7, 6))


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)


def test_the_layout_is_that_of_geneval(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", PROTOCOL)
    folder.open()
    folder.finish(0, CAT, result(), images())
    folder.finish(1, DOG, result(), images(), tree=images(1)[0])
    for number, wanted in ((0, CAT.metadata), (1, {"prompt": "dogs", "label": 3})):
        place = folder.path / "images" / f"{number:05d}"
        with (place / "metadata.jsonl").open() as file:
            assert json.load(file) == wanted, "one object, as its evaluator reads it"
        assert sorted(f.name for f in (place / "samples").iterdir()) == ["0000.png", "0001.png"]
    assert [file.name for file in (folder.path / "trees").iterdir()] == ["00001.png"]


def test_records_state_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PROTOCOL)
    folder.open()
    assert folder.record(0, CAT) is None
    record = folder.finish(0, CAT, result(), images())
    assert record == folder.record(0, CAT)
    assert record["results"][0] == {
        "image": "images/00000/samples/0000.png",
        "score": 0.5,
        "log_prob": -0.5,
        "tokens": [0, 1],
    }
    assert [each["num_tokens"] for each in record["steps"]] == [1, 2]
    assert record["cost"]["decoder_calls"] == 8 and record["verifier"] == {"name": "mine"}
    assert folder.gather([CAT, DOG]) is None and not (tmp_path / "search.jsonl").exists()
    folder.finish(1, DOG, result(), images())
    records = folder.gather([CAT, DOG])
    assert (dict(PROTOCOL, schedule=[1, 2]), records) == read_run(tmp_path) and [
        each["key"] for each in records or []
    ] == [CAT.key, DOG.key]


def test_what_is_not_finite_is_no_number_in_a_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PROTOCOL)
    folder.open()
    no_prior = torch.full((2,), float("nan"), dtype=torch.float64)
    assert folder.finish(0, CAT, result()._replace(log_probs=no_prior), images())["results"][1]["log_prob"] is None


def test_infinite_scores_have_no_mean(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PROTOCOL)
    vetoed = torch.full((2,), -float("inf"), dtype=torch.float64)
    records = [folder.finish(0, CAT, result(), images()), folder.finish(1, DOG, result(), images())]
    assert mean_score(records) == 0.5
    assert mean_score([*records, folder.finish(2, DOG, result()._replace(scores=vetoed), images())]) is None


def test_a_run_that_did_nothing_does_not_bind(tmp_path: Path) -> None:
    RunFolder(tmp_path, {**PROTOCOL, "num_results": 9}).open()
    folder = RunFolder(tmp_path, {**PROTOCOL, "num_results": 1})
    folder.open()
    folder.keep_steps(0, CAT, [step(1)], None)
    with pytest.raises(ValueError, match="num_results=1, not 9"):
        RunFolder(tmp_path, {**PROTOCOL, "num_results": 9}).open()


def test_steps_are_kept_until_the_prompt_is_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PROTOCOL)
    folder.open()
    assert folder.steps(0, CAT) == []
    folder.keep_steps(0, CAT, [step(1), step(2)], images()[0])
    assert (tmp_path / "unfinished" / "00000.png").is_file()
    again = folder.steps(0, CAT)
    for found, saved in zip(again, [step(1), step(2)], strict=True):
        assert found.num_tokens == saved.num_tokens and found.cost == saved.cost
        for name in ("tokens", "scores", "log_probs", "parents", "candidates"):
            assert torch.equal(getattr(found, name), getattr(saved, name))
            assert getattr(found, name).dtype == getattr(saved, name).dtype
    folder.finish(0, CAT, result(), images())
    assert not list((tmp_path / "unfinished").iterdir())


def test_another_search_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, PROTOCOL)
    folder.open()
    folder.keep_steps(0, CAT, [step(1)], None)
    RunFolder(tmp_path, PROTOCOL | {"device": "cuda"}).open()
    with pytest.raises(ValueError, match=r"holds a search with verifier.name=mine, not other: name another folder"):
        RunFolder(tmp_path, PROTOCOL | {"verifier": {"name": "other"}}).open()
    folder.finish(1, DOG, result(), images())
    for look, number, prompt in ((folder.steps, 0, DOG), (folder.record, 1, CAT)):
        with pytest.raises(ValueError, match=f"as number {number}, which is now '{prompt.key}'"):
            look(number, prompt)
    with pytest.raises(ValueError, match="holds no finished search"):
        read_run(tmp_path)
