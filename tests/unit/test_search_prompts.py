"""Prompts of a search, from options and from files."""

import json
from pathlib import Path
from typing import Any

import pytest

from flextok_pl.evaluation.generation import balanced_prompt
from flextok_pl.search.prompts import Conditions, prompts_from_options

CLASSES = Conditions("class", 3, ("cats", "dogs", "mice"))
TEXTS = Conditions("text")
NOTHING = Conditions("none")


def write(place: Path, name: str, content: Any) -> Path:
    file = place / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_classes_by_number_and_name() -> None:
    found = prompts_from_options(CLASSES, classes=["dogs", "0"], samples=2)
    assert [(p.key, p.label, p.text) for p in found] == [
        ("class 1 sample 0", 1, "dogs"),
        ("class 1 sample 1", 1, "dogs"),
        ("class 0 sample 0", 0, "cats"),
        ("class 0 sample 1", 0, "cats"),
    ]
    assert found[0].key == balanced_prompt(1, 3).key and found[1].key == balanced_prompt(4, 3).key
    assert [p.label for p in prompts_from_options(CLASSES)] == [0, 1, 2], "all of a few classes"
    assert len(prompts_from_options(Conditions("class", 1000))) == 8


def test_a_key_depends_on_what_is_asked_for_only() -> None:
    some = prompts_from_options(TEXTS, texts=["red apple", "blue cup", "red apple"])
    alone = prompts_from_options(TEXTS, texts=["blue cup"])
    assert some[1] == alone[0]
    assert [p.key for p in some] == ["text red apple sample 0", "text blue cup sample 0", "text red apple sample 1"]
    nothing = prompts_from_options(NOTHING, samples=2)[1]
    assert (nothing.key, nothing.label) == (balanced_prompt(1, 0).key, -1)


def test_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "\ufeffred apple\r\n\n  two cups \n")
    assert [p.text for p in prompts_from_options(TEXTS, file=file)] == ["red apple", "two cups"]
    file = write(tmp_path, "b.txt", "mice\n1\n")
    assert [p.label for p in prompts_from_options(CLASSES, file=file)] == [2, 1]


def test_prompts_of_geneval(tmp_path: Path) -> None:
    rows = [
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
        {"tag": "colors", "include": [{"class": "cup", "color": "red"}], "prompt": "a photo of a red cup"},
        {"prompt": "a cat", "label": 7},
    ]
    file = write(tmp_path, "geneval.jsonl", "\n".join(map(json.dumps, rows)))
    found = prompts_from_options(TEXTS, file=file)
    assert [p.metadata for p in found] == rows and [p.text for p in found] == [row["prompt"] for row in rows]
    assert [p.label for p in found] == [-1, -1, 7]
    assert [p.key for p in found] == [f"text {row['prompt']} sample 0" for row in rows]
    assert prompts_from_options(TEXTS, file=file, limit=2) == found[:2]
    file = write(tmp_path, "classes.jsonl", '{"label": "dogs", "prompt": "a dog"}\n{"label": 2}\n')
    assert [(p.label, p.text) for p in prompts_from_options(CLASSES, file=file)] == [(1, "a dog"), (2, "mice")]


def test_the_first_caption_of_each_picture_of_coco(tmp_path: Path) -> None:
    entries = [(9, 1, "nine\n"), (2, 5, "two"), (9, 0, "nine again"), (30, 2, "thirty")]
    content = [{"image_id": image, "id": number, "caption": caption} for image, number, caption in entries]
    file = write(tmp_path, "captions.json", {"images": [], "annotations": content})
    found = prompts_from_options(TEXTS, file=file, limit=2)
    assert [(p.text, p.metadata) for p in found] == [("two", {"image_id": 2}), ("nine", {"image_id": 9})]


def test_a_shard_set(image_shards: Path) -> None:
    known = Conditions("class", 2, ("right", "left"))
    found = prompts_from_options(known, file=image_shards / "val")
    assert [known.class_names[p.label] for p in found] == [p.metadata["key"].split("/")[0] for p in found], "by name"
    assert len(found) == 18 and prompts_from_options(known, file=image_shards / "val", limit=5) == found[:5]
    with pytest.raises(ValueError, match="class 'left' is unknown"):
        prompts_from_options(CLASSES, file=image_shards / "val")
    with pytest.raises(ValueError, match="conditioned on text, but . has no prompt"):
        prompts_from_options(TEXTS, file=image_shards / "val")


@pytest.mark.parametrize(
    ("known", "options", "complaint"),
    [
        (CLASSES, {"texts": ["x"]}, "--text: this prior is conditioned on class"),
        (TEXTS, {"classes": ["0"]}, "--class: this prior is conditioned on text"),
        (TEXTS, {}, "give a prompt"),
        (CLASSES, {"classes": ["birds"]}, "class 'birds' is unknown"),
        (CLASSES, {"classes": ["0"], "file": Path("x.txt")}, "--class and --prompts both name prompts"),
        (CLASSES, {"limit": 2}, "limit=2 counts the prompts of a file"),
        (CLASSES, {"samples": 0}, "samples=0 must be at least 1"),
        (NOTHING, {"classes": ["cats"]}, "label 'cats' must be the number"),
    ],
)
def test_options_that_do_not_fit(known: Conditions, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prompts_from_options(known, **options)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "x", "must be a file of lines"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "line 2"),
        ("a.jsonl", '{"prompt": 3}', "line 1 must be an object"),
        ("a.jsonl", '{"label": 3}', "3 has no prompt"),
        ("a.json", {"annotations": [{"caption": "x"}]}, "needs `annotations` with image_id, a number, and caption"),
        ("a.json", {"annotations": [{"image_id": 1, "caption": 3}]}, "needs `annotations`"),
        ("a.json", {"annotations": [{"image_id": [1], "caption": "x"}]}, "needs `annotations`"),
        ("a.json", {"annotations": [{"image_id": i, "caption": "x"} for i in (1, "a")]}, "needs `annotations`"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "surrogates not allowed"),
        ("a.json", "[", "cannot be read"),
    ],
)
def test_files_that_are_none(name: str, content: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"prompts={tmp_path / name}.*{complaint}"):
        prompts_from_options(TEXTS, file=write(tmp_path, name, content))
    with pytest.raises(ValueError, match="cannot be read"):
        prompts_from_options(TEXTS, file=tmp_path / "nowhere.txt")
