"""Folders of images as shards."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from flextok_pl.data import ShardDataModule, ShardError, write_folder
from flextok_pl.data.stream import ShardSet


def save(path, size=(12, 8), colour=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def read(index):
    data = ShardSet([index])
    return {raw["__key__"]: raw for shard, count in enumerate(data.counts) for _, raw in data.read(shard, 0, count)}


@pytest.fixture
def classes(tmp_path):
    for name, count in (("dog", 3), ("cat", 2)):
        for i in range(count):
            save(tmp_path / "src" / name / f"{i}.png", colour=(i, i, i))
    return tmp_path / "src"


def test_class_folders_become_labels_and_bytes_are_kept(classes, tmp_path):
    (classes / "notes.txt").write_text("not an image")
    save(classes / ".hidden" / "x.png")
    index = write_folder(classes, tmp_path / "dst", num_workers=0)["all"]
    assert index.classes == ("cat", "dog") and index.fields == ("image", "label")
    samples = read(index)
    assert set(samples) == {"cat/0", "cat/1", "dog/0", "dog/1", "dog/2"}
    for key, raw in samples.items():
        assert raw["png"] == (classes / f"{key}.png").read_bytes()
        assert int(raw["cls"]) == ("cat", "dog").index(key[:3])


def test_flat_folder_has_no_labels_and_mixed_ones_are_refused(classes, tmp_path):
    save(tmp_path / "flat" / "a.b.png")
    save(tmp_path / "flat" / "a.b.jpg")  # the same stem
    index = write_folder(tmp_path / "flat", tmp_path / "dst", num_workers=0)["all"]
    assert index.fields == ("image",) and not index.classes
    assert set(read(index)) == {"a_b", "file-a_b_png"}

    save(classes / "loose.png")
    with pytest.raises(ValueError, match=r"labels=none"):
        write_folder(classes, tmp_path / "mixed", num_workers=0)
    assert write_folder(classes, tmp_path / "mixed", labels="none", num_workers=0)["all"].num_samples == 6


def test_shrinks_the_shorter_side_and_never_enlarges(tmp_path):
    save(tmp_path / "src" / "large.png", size=(60, 40))
    small = save(tmp_path / "src" / "small.png", size=(7, 30))
    samples = read(write_folder(tmp_path / "src", tmp_path / "dst", size=20, image_format="png", num_workers=0)["all"])
    shrunk = Image.open(io.BytesIO(samples["large"]["png"]))
    assert shrunk.size == (30, 20) and shrunk.getpixel((3, 3)) == (10, 20, 30)
    assert samples["small"]["png"] == small.read_bytes()
    jpeg = read(write_folder(tmp_path / "src", tmp_path / "jpg", size=20, num_workers=0)["all"])
    assert set(jpeg["large"]) >= {"jpg"} and Image.open(io.BytesIO(jpeg["large"]["jpg"])).format == "JPEG"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_captions(classes, tmp_path, suffix):
    names = [f"dog/{i}.png" for i in range(3)] + [f"cat/{i}.png" for i in range(2)]
    rows = [(name, f'a "{name}", seen') for name in names]
    file = tmp_path / f"captions.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(json.dumps({"file": name, "caption": text}) for name, text in rows))
    elif suffix == "tsv":
        file.write_text("file\tcaption\n" + "".join(f'{n}\t"a ""{n}"", seen"\n' for n, _ in rows))
    else:
        file.write_text("file,caption\n" + "".join(f'{n},"a ""{n}"", seen"\n' for n, _ in rows))
    samples = read(write_folder(classes, tmp_path / "dst", captions=file, num_workers=0)["all"])
    assert samples["dog/1"]["txt"].decode() == 'a "dog/1.png", seen'
    file.write_text(file.read_text().replace("cat/1.png", "cat/9.png"))
    with pytest.raises(ValueError, match=r"no entry for 1 of 5 images, such as cat/1\.png"):
        write_folder(classes, tmp_path / "other", captions=file, num_workers=0)


def test_captions_of_files_anywhere(tmp_path, caplog):
    """Files at any depth, named also absolutely; more entries than files; a file as Excel writes it."""
    src, file = tmp_path / "src", tmp_path / "captions.csv"
    for name in ("top.png", "a/one.png", "a/b/c/two.png"):
        save(src / name)
    rows = [("./top.png", "top"), ("a//one.png", "one"), (str(src / "a/b/c/two.png"), "two"), ("a/gone.png", "gone")]
    file.write_text("\ufefffile,caption,more\n" + "".join(f"{name},{text},x\n" for name, text in rows))
    options = {"labels": "none", "captions": file, "num_workers": 0}
    samples = read(write_folder(src, tmp_path / "dst", **options)["all"])
    assert {key: raw["txt"] for key, raw in samples.items()} == {"top": b"top", "a/one": b"one", "a/b/c/two": b"two"}
    assert "1 entries name no image" in caplog.text and "a/gone.png" in caplog.text
    file.write_text("file,caption\ntop.png,top\n")
    with pytest.raises(ValueError, match=r"no entry for 2 of 3 images, such as a/b/c/two\.png"):
        write_folder(src, tmp_path / "other", **options)
    file.write_text("file,caption\ntop.png,one\n./top.png,two\n")
    with pytest.raises(ValueError, match=r"entry 2 is a second one for top\.png; keep one"):
        write_folder(src, tmp_path / "other", **options)


def test_validation_part_is_disjoint_and_stable(tmp_path):
    for i in range(60):
        save(tmp_path / "src" / f"{i}.png", size=(2, 2))
    parts = write_folder(tmp_path / "src", tmp_path / "a", val_fraction=0.2, num_workers=0)
    train, val = (set(read(parts[part])) for part in ("train", "val"))
    assert not train & val and len(train | val) == 60 and 4 <= len(val) <= 22
    save(tmp_path / "src" / "new.png", size=(2, 2))
    more = write_folder(tmp_path / "src", tmp_path / "b", val_fraction=0.2, num_workers=0)
    assert set(read(more["val"])) - {"new"} == val


def test_a_changed_source_is_noticed(classes, tmp_path):
    first = write_folder(classes, tmp_path / "dst", num_workers=0)
    assert write_folder(classes, tmp_path / "dst", num_workers=0) == first
    save(classes / "dog" / "new.png")
    with pytest.raises(ShardError, match="overwrite"):
        write_folder(classes, tmp_path / "dst", num_workers=0)
    assert write_folder(classes, tmp_path / "dst", num_workers=2, overwrite=True)["all"].num_samples == 6


def test_every_kind_of_picture_reaches_a_batch(tmp_path):
    src = tmp_path / "src"
    save(src / "grey.png", mode="L", colour=100)
    save(src / "cmyk.jpg", mode="CMYK", colour=(0, 0, 0, 255))
    save(src / "rgba.png", mode="RGBA", colour=(0, 0, 0, 0))
    save(src / "palette.gif", mode="P", colour=0)
    save(src / "pixel.png", size=(1, 1))
    Image.fromarray(np.full((5, 9), 65535, np.uint16)).save(src / "deep.png")
    write_folder(src, tmp_path / "dst", num_workers=0)
    data = ShardDataModule(val=str(tmp_path / "dst"), image_size=8, num_workers=0)
    (batch,) = data.val_dataloader()
    images = dict(zip(batch["key"], batch["image"], strict=True))
    assert len(images) == 6 and batch["image"].shape == (6, 3, 8, 8)
    assert images["grey"].unique().tolist() == pytest.approx([100 / 127.5 - 1], abs=1e-6)
    assert images["rgba"].min() == 1 and images["deep"].min() == 1
    assert images["cmyk"].max() < -0.7
    assert images["pixel"][:, 0, 0].tolist() == pytest.approx(
        [10 / 127.5 - 1, 20 / 127.5 - 1, 30 / 127.5 - 1], abs=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"quality": 0},
        {"val_fraction": 1.0},
        {"image_format": "bmp"},
        {"labels": "x"},
        {"on_error": "x"},
        {"samples_per_shard": 0},
        {"num_workers": -1},
        {"captions": "missing.csv"},
    ],
)
def test_bad_options_are_named(classes, tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        write_folder(classes, tmp_path / "dst", **{"num_workers": 0, **options})


def test_empty_or_missing_folder(tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        write_folder(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(ValueError, match="is no folder"):
        write_folder(tmp_path / "nowhere", tmp_path / "dst")
