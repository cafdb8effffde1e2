"""WebDataset tars of others, and sets of ours, as new shard sets."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from data_helpers import contents, encoded, write_tar
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.data import ShardDataModule, ShardIndex, write_folder, write_latents, write_resharded


def picture(number, kind="JPEG", size=(8, 6)):
    return encoded(Image.new("RGB", size, (number % 256, 0, 0)), kind)


@pytest.fixture
def foreign(tmp_path):
    """Two tars whose keys are the same."""
    for t in range(2):
        files = {"./__meta__/x.txt": b"of no sample", "._0.jpg": b"of no sample"}
        for i in range(5):
            number = 5 * t + i
            record = {"label": ["red", "blue"][number % 2], "text": f"text {number}", "width": 8}
            files[f"dir/{i}.JPG" if i % 2 else f"dir/{i}.png"] = picture(number, "JPEG" if i % 2 else "PNG")
            files[f"dir/{i}.cls"] = str(number % 4).encode()
            files[f"dir/{i}.txt"] = f"number {number}".encode()
            files[f"dir/{i}.json"] = json.dumps(record).encode()
        write_tar(tmp_path / "src" / f"part.{t:02d}.tar", files)
    return tmp_path / "src"


def test_tars_of_others(foreign, tmp_path):
    pattern = str(foreign / "part.{00..01}.tar")
    main(["data", "reshard", pattern, str(tmp_path / "dst"), "--samples-per-shard", "4", "--num-workers", "2"])
    index = ShardIndex.load(tmp_path / "dst")
    assert index.fields == ("image", "label", "text") and index.classes == ("0", "1", "2", "3")
    assert [shard.count for shard in index.shards] == [4, 3, 3]
    found = contents(index)
    assert found.keys() == {f"part_{t:02d}/dir/{i}" for t in range(2) for i in range(5)}
    for key, files in found.items():
        number = 5 * int(key[6]) + int(key[-1])
        kind = "jpg" if int(key[-1]) % 2 else "png"
        assert files.pop(kind) == picture(number, "JPEG" if kind == "jpg" else "PNG")
        assert files == {"cls": str(number % 4).encode(), "txt": f"number {number}".encode()}
    data = ShardDataModule(val=str(tmp_path / "dst"), image_size=8, num_workers=0)
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 10


def test_labels_and_captions_of_json(foreign, tmp_path):
    index = write_resharded(str(foreign), tmp_path / "dst", label_key="label", caption_key="text", num_workers=1)
    assert index.classes == ("blue", "red")
    assert {int(s["txt"][5:]): int(s["cls"]) for s in contents(index).values()} == {i: 1 - i % 2 for i in range(10)}
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    for options, message in (
        ({"label_key": "width", "caption_key": "width"}, "its width 8 is not a text"),
        ({"label_key": "text", "class_names": names}, r"part\.00\.tar, dir/0: its label 'text 0' is not among the 2"),
    ):
        with pytest.raises(ValueError, match=message):
            write_resharded(str(foreign), tmp_path / "other", num_workers=1, **options)


def test_names_of_classes(foreign, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    assert write_resharded(str(foreign), tmp_path / "dst", class_names=names, num_workers=1).classes == tuple("abcde")
    names.write_bytes("\ufeffé\r\nb c\r\nc\r\nd\r\n\r\n".encode())  # as Windows writes it
    assert write_resharded(str(foreign), tmp_path / "two", class_names=names, num_workers=1).classes[:2] == ("é", "b c")
    for text, message in (
        ("a\na\n", r"class_names=.*names\.txt: line 2 is 'a', like line 1"),
        ("a\n\nb\nc\nd\n", r"class_names=.*names\.txt: line 2 is empty"),
    ):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            write_resharded(str(foreign), tmp_path / "dst", class_names=names, num_workers=1)


def test_what_some_samples_lack(tmp_path, caplog):
    files = {"a.jpg": picture(0), "a.cls": b"1", "b.jpg": picture(1), "b.txt": b"bee", "c.txt": b"no picture"}
    write_tar(tmp_path / "x.tar", files)
    with pytest.raises(ValueError, match=r"c: it has no picture.*on_error=skip"):
        write_resharded(str(tmp_path / "x.tar"), tmp_path / "dst", num_workers=1)
    index = write_resharded(str(tmp_path / "x.tar"), tmp_path / "dst", on_error="skip", num_workers=1)
    assert {key: (s["cls"], s["txt"]) for key, s in contents(index).items()} == {"a": (b"1", b""), "b": (b"-1", b"bee")}
    assert index.provenance["skipped"] == 1 and "2 of 3 samples have no label and get -1" in caplog.text


@pytest.mark.parametrize("kind", ["other size of shards", "other size of pictures"])
def test_our_own_sets(image_shards, tmp_path, kind):
    source = ShardIndex.load(image_shards / "train")
    options = {"size": 16, "image_format": "png"} if kind == "other size of pictures" else {}
    index = write_resharded(
        str(image_shards / "train"), tmp_path / "dst", samples_per_shard=7, num_workers=2, **options
    )
    assert index.classes == source.classes and index.fields == source.fields
    assert len(index.shards) == -(-source.num_samples // 7) and index.num_samples == source.num_samples
    before, after = contents(source), contents(index)
    if kind == "other size of shards":
        assert after == before
    else:
        assert after.keys() == before.keys()
        assert {Image.open(io.BytesIO(sample["png"])).size for sample in after.values()} == {(16, 16)}
    with pytest.raises(ValueError, match=r"label_key=x is for tars without an index\.json"):
        write_resharded(str(image_shards / "train"), tmp_path / "other", label_key="x")


def test_several_sets_of_ours_become_one(image_shards, tmp_path):
    index = write_resharded(f"{image_shards}/{{train,val}}", tmp_path / "dst", num_workers=1)
    assert index.num_samples == 40 and len(index.shards) == 1
    part = write_resharded(str(image_shards / "val" / "shard-000000.tar"), tmp_path / "part", num_workers=1)
    assert part.num_samples == ShardIndex.load(image_shards / "val").num_samples


def test_latents_are_copied(image_shards, tmp_path):
    source = write_latents(
        str(image_shards / "val"),
        tmp_path / "latents",
        lambda images: torch.cat([torch.nn.functional.avg_pool2d(images, 8)] * 2, dim=1),
        source_id={"vae": "pool"},
        image_size=32,
        num_workers=0,
    )
    index = write_resharded(str(tmp_path / "latents"), tmp_path / "dst", samples_per_shard=5, num_workers=1)
    assert contents(index) == contents(source) and index.image_size == 32
    assert {**index.provenance, **source.provenance} == index.provenance
    with pytest.raises(ValueError, match="size=16 is for pictures"):
        write_resharded(str(tmp_path / "latents"), tmp_path / "other", size=16)


def test_a_square_set_stays_one(tmp_path):
    (tmp_path / "src").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "src" / "a.png")
    write_folder(tmp_path / "src", tmp_path / "set", num_workers=1)
    record = json.loads((tmp_path / "set" / "index.json").read_text())
    (tmp_path / "set" / "index.json").write_text(json.dumps({**record, "image_size": 8}))
    assert write_resharded(str(tmp_path / "set"), tmp_path / "a", size=4, num_workers=1).image_size == 4
    assert write_resharded(str(tmp_path / "set"), tmp_path / "b", size=9, num_workers=1).image_size == 8


def test_unusable_sources_are_named(foreign, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*part\.02\.tar"):
        write_resharded(str(foreign / "part.{00..02}.tar"), tmp_path / "dst")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.tar files"):
        write_resharded(str(tmp_path / "empty"), tmp_path / "dst")
    (foreign / "part.01.tar").write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"part\.01\.tar is not a complete, uncompressed tar file"):
        write_resharded(str(foreign), tmp_path / "dst", num_workers=2)
    (foreign / "part.00.tar").rename(foreign / "part.00.tar.gz")
    (foreign / "part.01.tar").unlink()
    with pytest.raises(
        ValueError, match=r"no \.tar files, but 1 compressed ones, such as part\.00\.tar\.gz; unpack them"
    ):
        write_resharded(str(foreign), tmp_path / "dst")


def reshard(tmp_path, files, **options):
    """What becomes of a tar with these files."""
    write_tar(tmp_path / "src" / "x.tar", files)
    return write_resharded(str(tmp_path / "src"), tmp_path / "dst", num_workers=1, **options)


def test_files_of_a_sample_may_lie_apart(tmp_path):
    files = {"a.jpg": picture(0), "b.jpg": picture(1), "a.cls": b"1", "b.cls": b"0"}
    assert {key: s["cls"] for key, s in contents(reshard(tmp_path, files)).items()} == {"a": b"1", "b": b"0"}


def test_tars_of_one_name_in_several_folders(tmp_path):
    for folder in ("one", "two.2"):
        write_tar(tmp_path / "src" / folder / "000.tar", {"a.jpg": picture(0)})
    index = write_resharded(str(tmp_path / "src"), tmp_path / "dst", num_workers=1)
    assert contents(index).keys() == {"one/000/a", "two_2/000/a"}


@pytest.mark.parametrize(
    "files, options, message",
    [
        ({"a.json": b'{"text": "x", "kind": 3}'}, {"caption_key": "caption"}, "the .json of a has the keys text, kind"),
        (
            {"a.json": b'{"text": "x"}'},
            {"label_key": "kind"},
            "label_key=kind is in none of the 1 samples; the",
        ),
        ({"a.txt": b"x"}, {"label_key": "kind"}, r"none has a \.json, such as .*x\.tar, a \(it holds \.jpg, \.txt\)"),
        (
            {"a.json": b"[1]"},
            {"label_key": "kind"},
            r"x\.tar, a: its \.json is '\[1\]', but must have keys",
        ),
        ({"a.json": b"null"}, {"caption_key": "text"}, r"its \.json is 'None', but must have keys"),
        ({"a.json": b"{"}, {"caption_key": "text"}, r"its \.json cannot be read: Expecting property name"),
        (
            {"a.json": b'{"kind": 1.5}'},
            {"label_key": "kind"},
            r"kind of its \.json is 1\.5, which is not a class index",
        ),
        ({"a.cls": b"\n"}, {}, r"\.cls is '', which is not a class index or a name"),
        ({"a.png": picture(1, "PNG")}, {}, r"several pictures \(it holds \.jpg, \.png\); .* as image_key=jpg"),
        ({"a.JPG": picture(1)}, {}, r"two files a\.jpg \(upper and lower case are one\)"),
        (
            {"b.001.jpg": picture(1)},
            {},
            r"b: it has no picture .*\(it holds \.001\.jpg, .*give image_key=001\.jpg if all",
        ),
        ({}, {"image_key": "input.jpg"}, r"a: it has no picture \.input\.jpg \(it holds \.jpg,.* image_key=jpg if all"),
        ({}, {"image_key": "input"}, "image_key=input must end like a picture"),
        ({"b.txt": b"x"}, {}, r"b: it has no picture .*\(it holds \.txt, .*; rename the files, or pass on_error=skip"),
        ({}, {"class_names": "names.txt"}, "class_names has 2 classes, but no sample has a label"),
    ],
)
def test_what_foreign_samples_hold_is_named(tmp_path, monkeypatch, files, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=message):
        reshard(tmp_path, {"a.jpg": picture(0), **files}, **options)
    assert not (tmp_path / "dst").exists()


def test_a_name_twice_is_refused(tmp_path):
    write_tar(tmp_path / "src" / "x.tar", {"a.jpg": picture(0), "b.jpg": picture(1)})
    with tarfile.open(tmp_path / "src" / "x.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ValueError, match=r"x\.tar has two files a\.jpg"):
        write_resharded(str(tmp_path / "src"), tmp_path / "dst", num_workers=1)


def test_the_picture_to_take_may_be_chosen(tmp_path):
    files = {
        "m.1/a.Input.jpg": picture(0),
        "m.1/a.output.png": picture(1, "PNG"),
        "m.1/a.txt": b"x",
        "b.jpg": picture(2),
    }
    index = reshard(tmp_path, files, image_key="input.JPG", on_error="skip")
    assert contents(index) == {"m_1/a": {"jpg": picture(0), "txt": b"x"}} and index.provenance["skipped"] == 1


def test_labels_as_tables_of_numbers_have_them(tmp_path):
    files = {f"{i}.jpg": picture(i) for i in range(3)}
    labels = {"0.cls": b"10.0", "1.cls": b"2.0\n", "2.json": b'{"kind": 1.0}'}
    index = reshard(tmp_path, {**files, **labels})
    assert index.classes == tuple(map(str, range(11)))
    assert {key: s["cls"] for key, s in contents(index).items()} == {"0": b"10", "1": b"2", "2": b"-1"}
    index = reshard(tmp_path, {**files, **labels}, label_key="kind", overwrite=True)
    assert contents(index)["2"]["cls"] == b"1" and index.classes == ("0", "1")
