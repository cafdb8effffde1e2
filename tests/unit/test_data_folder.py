"""Folders of images as shards."""

import io
import json
import os

import numpy as np
import pytest
from data_helpers import contents
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.data import ShardDataModule, ShardError, ShardIndex, write_folder
from flextok_pl.data.convert.captions import read_captions
from flextok_pl.data.image_files import list_images
from flextok_pl.data.pictures import open_pictures
from flextok_pl.keys import key_hash


def save(path, size=(12, 8), colour=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


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
    samples = contents(index)
    assert set(samples) == {"cat/0", "cat/1", "dog/0", "dog/1", "dog/2"}
    for key, raw in samples.items():
        assert raw["png"] == (classes / f"{key}.png").read_bytes()
        assert int(raw["cls"]) == ("cat", "dog").index(key[:3])


def test_flat_folder_has_no_labels_and_mixed_ones_are_refused(classes, tmp_path):
    save(tmp_path / "flat" / "a.b.png")
    save(tmp_path / "flat" / "a.b.jpg")  # the same stem
    index = write_folder(tmp_path / "flat", tmp_path / "dst", num_workers=0)["all"]
    assert index.fields == ("image",) and not index.classes
    assert set(contents(index)) == {"a_b", "file-a_b_png"}

    save(classes / "loose.png")
    with pytest.raises(ValueError, match=r"labels=none"):
        write_folder(classes, tmp_path / "mixed", num_workers=0)
    assert write_folder(classes, tmp_path / "mixed", labels="none", num_workers=0)["all"].num_samples == 6


def test_shrinks_the_shorter_side_and_never_enlarges(tmp_path):
    save(tmp_path / "src" / "large.png", size=(60, 40))
    small = save(tmp_path / "src" / "small.png", size=(7, 30))
    options = {"size": 20, "num_workers": 0}
    samples = contents(write_folder(tmp_path / "src", tmp_path / "dst", image_format="png", **options)["all"])
    shrunk = Image.open(io.BytesIO(samples["large"]["png"]))
    assert shrunk.size == (30, 20) and shrunk.getpixel((3, 3)) == (10, 20, 30)
    assert samples["small"]["png"] == small.read_bytes()
    jpeg = contents(write_folder(tmp_path / "src", tmp_path / "jpg", **options)["all"])
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
    samples = contents(write_folder(classes, tmp_path / "dst", captions=file, num_workers=0)["all"])
    assert samples["dog/1"]["txt"].decode() == 'a "dog/1.png", seen'
    file.write_text(file.read_text().replace("cat/1.png", "cat/9.png"))
    with pytest.raises(ValueError, match=r"no entry for 1 of 5 images, such as cat/1\.png"):
        write_folder(classes, tmp_path / "other", captions=file, num_workers=0)


def test_names_that_are_not_utf8(tmp_path, caplog):
    """They are refused when they are written, and can be measured where they lie."""
    save(tmp_path / "src" / "a" / "fine.png")
    save(tmp_path / "src" / "a" / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(
        ValueError, match=r"^a/caf\\udce9\.png: its name is not UTF-8; rename it.*or pass on_error=skip"
    ):
        write_folder(tmp_path / "src", tmp_path / "dst", num_workers=0)
    index = write_folder(tmp_path / "src", tmp_path / "dst", on_error="skip", num_workers=0)["all"]
    assert set(contents(index)) == {"a/fine"} and index.provenance["skipped"] == 1
    assert r"left out a/caf\udce9.png: its name is not UTF-8" in caplog.text
    loader, _ = open_pictures(str(tmp_path / "src"))
    (batch,) = loader
    assert len({key_hash(key) for key in batch["key"]}) == 2

    (tmp_path / "src" / "a").rename(tmp_path / "src" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ValueError, match=r"the name of class 'caf\\udce9' is not UTF-8; rename its folder"):
        write_folder(tmp_path / "src", tmp_path / "other", on_error="skip", num_workers=0)
    source = tmp_path / os.fsdecode(b"\xe9")
    (tmp_path / "src").rename(source)
    save(source / "a.png")
    index = write_folder(source, tmp_path / "third", labels="none", on_error="skip", num_workers=0)["all"]
    assert ShardIndex.load(tmp_path / "third") == index and index.provenance["source"] == str(source)


def test_captions_of_files_anywhere(tmp_path, caplog):
    """Files at any depth, named also absolutely; more entries than files; a file as Excel writes it."""
    src, file = tmp_path / "src", tmp_path / "captions.csv"
    for name in ("top.png", "a/one.png", "a/b/c/two.png"):
        save(src / name)
    rows = [("./top.png", "top"), ("a//one.png", "one"), (str(src / "a/b/c/two.png"), "two"), ("a/gone.png", "gone")]
    file.write_text("\ufefffile,caption,more\n" + "".join(f"{name},{text},x\n" for name, text in rows))
    options = {"labels": "none", "captions": file, "num_workers": 0}
    samples = contents(write_folder(src, tmp_path / "dst", **options)["all"])
    assert {key: raw["txt"] for key, raw in samples.items()} == {"top": b"top", "a/one": b"one", "a/b/c/two": b"two"}
    assert "1 entries name no image" in caplog.text and "a/gone.png" in caplog.text
    file.write_text("file,caption\ntop.png,top\n")
    with pytest.raises(ValueError, match=r"no entry for 2 of 3 images, such as a/b/c/two\.png"):
        write_folder(src, tmp_path / "other", **options)
    link = tmp_path / "link"
    link.symlink_to(src)
    for one, other in (("top.png", "./top.png"), ("top.png", src / "top.png"), (link / "top.png", src / "top.png")):
        file.write_text(f"file,caption\n{one},one\n{other},two\n")
        with pytest.raises(ValueError, match=r"entry 2 is the second for top\.png; keep one"):
            write_folder(link, tmp_path / "other", **options)


CSV = "file,caption\n"
TSV = "file\tcaption\n"


@pytest.mark.parametrize(
    "suffix, text, expected",
    [
        (".csv", CSV + 'a.png,"a red apple, on a table"\n', "a red apple, on a table"),
        (".csv", CSV + 'a.png,"two\nlines ""and quotes"""\r\n', 'two\nlines "and quotes"'),
        (".csv", CSV + 'a.png,a 5" nail\n\n', 'a 5" nail'),
        (".csv", "\ufeffmore,caption,file\n1,x,a.png\n", "x"),
        (".csv", CSV + "a.png,\u2028one line\x0bstill\n", "\u2028one line\x0bstill"),
        (".tsv", TSV + 'a.png\t"Red" apple\n', '"Red" apple'),
        (".tsv", TSV + 'a.png\t"not closed\nb.png\tx\n', '"not closed'),
        (".tsv", TSV + 'a.png\t"as a ""sheet""\twrites it"\r\n', 'as a "sheet"\twrites it'),
        (".tsv", TSV + 'a.png\t5" nail, cut\n', '5" nail, cut'),
        (".jsonl", '\ufeff\n{"file": "a.png", "caption": "x\\ty", "more": null}\n', "x\ty"),
    ],
)
def test_captions_are_read_whole(tmp_path, suffix, text, expected):
    file = tmp_path / f"captions{suffix}"
    file.write_text(text, newline="")
    assert read_captions(file, tmp_path)["a.png"] == expected


@pytest.mark.parametrize(
    "suffix, text, message",
    [
        (".csv", CSV + "b.png,x\na.png,a red apple, on a table\n", "line 3 has 3 fields.*header 2.*in quotes"),
        (".csv", CSV + '"b.png","x\ny"\na.png,a,b\n', "line 4 has 3 fields"),
        (".csv", "file,caption,more\na.png,a\n", "line 2 has 2 fields.*header 3"),
        (".csv", "file,caption,caption\na.png,a,b\n", "line 1, the header, has the column 'caption' twice"),
        (".csv", CSV + "a.png,a\nfile,caption\n", "line 3 repeats the header"),
        (".csv", "file, caption\na.png,a\n", "line 1, the header, needs the columns file and caption"),
        (".csv", CSV + 'a.png,"not closed\nb.png,x\n', "line 2 cannot be read"),
        (".csv", CSV + 'a.png,"Red" apple\n', "line 2 cannot be read.*double the quote"),
        (".csv", "", "needs the columns file and caption"),
        (".tsv", TSV + "a.png\ta\tb\n", "line 2 has 3 fields.*tab"),
        (".tsv", TSV + "a.png\ta\n" + TSV, "line 3 repeats the header"),
        (".tsv", CSV + "a.png,a\n", "needs the columns file and caption"),
        (".jsonl", '{"file": "a", "caption": "x", "caption": "y"}\n', "line 1.*'caption' occurs twice"),
        (".jsonl", '{"file": "a", "caption": "x"}\n\n{"file": "b"}\n', "line 3 needs the texts"),
        (".jsonl", '["a", "x"]\n', "line 1 must be an object"),
        (".jsonl", '{"file": "a", "caption": 5}\n', "line 1 needs the texts"),
        (".jsonl", '{\n"file": "a"}', "line 1 cannot be read"),
    ],
)
def test_captions_that_would_be_cut_are_refused(tmp_path, suffix, text, message):
    file = tmp_path / f"captions{suffix}"
    file.write_text(text, newline="")
    with pytest.raises(ValueError, match=f"captions=.*{message}"):
        read_captions(file, tmp_path)


Image.init()
ENDINGS = {"x.jfif": "JPEG", "x.jpe": "JPEG", "x.jp2": "JPEG2000", "x.tga": "TGA", "x.pcx": "PCX", "x.AVIF": "AVIF"}
ENDINGS = {name: kind for name, kind in ENDINGS.items() if kind in Image.SAVE}


def test_all_that_pillow_reads_is_taken_and_the_rest_is_counted(tmp_path, caplog):
    src, square = tmp_path / "src", Image.new("RGB", (8, 8), (9, 9, 9))
    (src / "deep.er").mkdir(parents=True)
    kinds = {**ENDINGS, "no_ending": "JPEG", "deep.er/2024-01-01 12.30": "PNG", "12.5": "WEBP"}
    for number, (name, kind) in enumerate(kinds.items()):
        square.save(src / name.replace("x", f"x{number}", 1), kind)
    for name in ("LICENSE", "a.xyz", "b.xyz", "photo.unread", ".hidden.png", "x0.txt", "x1.jpe.json", "captions.csv"):
        (src / name).write_text("BM text, no picture")
    (src / "captions.csv").write_text("file,caption\n" + "".join(f"{name},x\n" for name in list_images(src)))
    caplog.clear()
    index = write_folder(src, tmp_path / "dst", labels="none", captions=src / "captions.csv", num_workers=0)["all"]
    assert index.num_samples == len(kinds) and index.fields == ("image", "text")
    told = caplog.records[-1].message
    for part in ("2 .xyz", "1 .unread", "1 without an ending", "1 hidden", "such as"):
        assert part in told
    assert "txt" not in told and "json" not in told and "csv" not in told
    data = ShardDataModule(val=str(tmp_path / "dst"), image_size=8, num_workers=0)
    (batch,) = data.val_dataloader()
    assert len(batch["image"]) == len(kinds) and ((batch["image"] + 1) * 127.5 - 9).abs().max() < 2
    assert {"no_ending", "deep_er/2024-01-01 12_30", "12_5"} < set(batch["key"])


def test_a_kind_that_pillow_lacks_here_is_named(tmp_path, caplog, monkeypatch):
    save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x1cftypheic")
    (tmp_path / "without").write_bytes(b"\0\0\0\x1cftypheic")
    monkeypatch.delitem(Image.registered_extensions(), ".heic", raising=False)
    assert list_images(tmp_path) == ["a.png"]
    assert "1 .heic" in caplog.text and "1 without an ending" in caplog.text and "pillow-heif" in caplog.text


def test_each_real_folder_is_read_once(classes, tmp_path, caplog):
    expected = list_images(classes)
    save(tmp_path / "elsewhere" / "sub" / "far.png")
    (classes / "dog" / "up").symlink_to(classes)
    (classes / "dog" / "over").symlink_to(tmp_path)
    (classes / "dog" / "self").symlink_to("self")
    (classes / "a_link").symlink_to(classes / "dog")
    (classes / "more").symlink_to(tmp_path / "elsewhere")
    (classes / "more2").symlink_to(tmp_path / "elsewhere" / "sub")
    assert list_images(classes) == sorted([*expected, "more/sub/far.png"])
    assert "4 links to folders that are read elsewhere" in caplog.text and "1 without an ending" in caplog.text
    linked = tmp_path / "linked"
    linked.symlink_to(classes)
    assert len(list_images(linked)) == 6


def test_a_folder_that_cannot_be_read_is_named(classes, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"dog cannot be read \(Permission denied\)"):
        list_images(classes)


def test_a_dangling_link_is_a_broken_picture(classes, tmp_path, caplog):
    (classes / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for workers in ("0", "2"):
        with pytest.raises(SystemExit, match=r"error: dog/gone\.png.*on_error=skip"):
            main(["data", "folder", str(classes), str(tmp_path / "dst"), "--num_workers", workers])
    index = write_folder(classes, tmp_path / "dst", num_workers=0, on_error="skip")["all"]
    assert index.num_samples == 5 and index.provenance["skipped"] == 1 and "gone.png" in caplog.text
    assert write_folder(classes, tmp_path / "dst", num_workers=0, on_error="skip")["all"] == index


def test_a_list_fixes_the_numbers_of_classes(classes, tmp_path, caplog):
    """Sets that are converted apart number the same name alike, also where one lacks a class."""
    save(tmp_path / "val" / "dog" / "x.png")
    (tmp_path / "names.txt").write_text("\ufeffemu\r\ndog\r\ncat\r\n")
    train = write_folder(classes, tmp_path / "a", classes=tmp_path / "names.txt", num_workers=0)["all"]
    assert train.classes == ("emu", "dog", "cat")
    for number, given in enumerate((tmp_path / "names.txt", ["emu", "dog", "cat"], tmp_path / "a")):
        index = write_folder(tmp_path / "val", tmp_path / f"b{number}", classes=given, num_workers=0)["all"]
        assert index.classes == train.classes and contents(index)["dog/x"]["cls"] == b"1"
    assert "2 of the 3 classes have no pictures here, such as cat" in caplog.text
    with pytest.raises(ShardError, match="classes"):
        write_folder(tmp_path / "val", tmp_path / "b0", classes=["dog"], num_workers=0)


@pytest.mark.parametrize(
    "given, options, message",
    [
        (["dog"], {}, "1 folders that are not among the 1 classes, such as 'cat'"),
        (["dog", "dog"], {}, "entry 2 is 'dog', like entry 1"),
        ([], {}, "holds no classes"),
        ("dog\n\ncat\n", {}, "line 2 is empty"),
        ("dog\ncat\ndog\n", {}, "line 3 is 'dog', like line 1"),
        (["cat", "dog"], {"labels": "none"}, "labels=none"),
        ("missing", {}, "cannot be read"),
    ],
)
def test_bad_lists_of_classes(classes, tmp_path, given, options, message):
    if isinstance(given, str) and given != "missing":
        (tmp_path / "names.txt").write_text(given)
        given = tmp_path / "names.txt"
    with pytest.raises(ValueError, match=f"classes.*{message}"):
        write_folder(classes, tmp_path / "dst", classes=given, num_workers=0, **options)


def test_validation_part_is_disjoint_and_stable(tmp_path):
    for i in range(60):
        save(tmp_path / "src" / f"{i}.png", size=(2, 2))
    parts = write_folder(tmp_path / "src", tmp_path / "a", val_fraction=0.2, num_workers=0)
    train, val = (set(contents(parts[part])) for part in ("train", "val"))
    assert not train & val and len(train | val) == 60 and 4 <= len(val) <= 22
    save(tmp_path / "src" / "new.png", size=(2, 2))
    more = write_folder(tmp_path / "src", tmp_path / "b", val_fraction=0.2, num_workers=0)
    assert set(contents(more["val"])) - {"new"} == val


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


BAD = {"size": 0, "quality": 0, "val_fraction": 1.0, "image_format": "bmp", "labels": "x", "on_error": "x"}
BAD |= {"samples_per_shard": 0, "num_workers": -1, "captions": "missing.csv"}


@pytest.mark.parametrize("option", BAD)
def test_bad_options_are_named(classes, tmp_path, option):
    """Those of all converters, too; and a name that is none is refused before anything is read."""
    with pytest.raises(ValueError, match=option):
        write_folder(classes, tmp_path / "dst", **{"num_workers": 0, option: BAD[option]})
    with pytest.raises(TypeError, match=f"un{option}"):
        write_folder(classes, tmp_path / "dst", **{f"un{option}": BAD[option]})


def test_empty_or_missing_folder(tmp_path):
    (tmp_path / "src").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        write_folder(tmp_path / "src", tmp_path / "dst")
    with pytest.raises(ValueError, match="is not a folder"):
        write_folder(tmp_path / "nowhere", tmp_path / "dst")
