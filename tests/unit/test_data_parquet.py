"""Data sets of the Hub, as parquet files on this machine."""

import builtins
import io
import json
import sys

import pytest
from data_helpers import contents, encoded
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.data import ShardIndex, write_parquet
from flextok_pl.data.convert.hub import part_of

pa = pytest.importorskip("pyarrow", reason="the extra `hub` is not installed")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}


def picture(number, kind="PNG"):
    return encoded(Image.new("RGB", (8, 6), (number % 256, 255 - number % 256, 0)), kind)


def write(path, count, first=0, group=4, features=FEATURES, pictures=None, labels=None, **columns):
    """Rows first..first+count, whose label is their number modulo 3."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    pictures = pictures or [{"bytes": picture(i, "JPEG" if i % 2 else "PNG"), "path": None} for i in numbers]
    table = pa.table(
        {
            "image": pa.array(pictures, IMAGE if isinstance(pictures[0], dict) else None),
            "label": labels or [i % 3 for i in numbers],
            "caption": [None if i == 1 else f"number {i}" for i in numbers],
            **columns,
        }
    )
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)


def test_parts_pictures_labels_and_captions(tmp_path):
    source = tmp_path / "src" / "data"
    write(source / "train-00000-of-00002.parquet", 10)
    write(source / "train-00001-of-00002.parquet", 7, first=10, group=3)
    write(source / "validation-00000-of-00001.parquet", 3, labels=[-1, 0, None])
    (source / "README.md").write_text("no parquet")
    options = ["--caption-column", "caption", "--num-workers", "2", "--samples-per-shard", "5"]
    main(["data", "parquet", str(tmp_path / "src"), str(tmp_path / "dst"), *options])
    train, val = (ShardIndex.load(tmp_path / "dst" / part) for part in ("train", "val"))
    assert train.fields == ("image", "label", "text") and train.classes == ("cat", "dog", "emu")
    assert [shard.count for shard in train.shards] == [5, 4, 4, 4]
    found = contents(train)
    assert set(found) == {f"train-{i:09d}" for i in range(17)}
    for i in range(17):
        kind = "jpg" if i % 2 else "png"
        expected = {kind: picture(i, "JPEG" if i % 2 else "PNG"), "cls": str(i % 3).encode()}
        assert found[f"train-{i:09d}"] == {**expected, "txt": b"" if i == 1 else f"number {i}".encode()}
    order = [int(key[-9:]) for key in found]
    assert order != sorted(order), "row groups are mixed"
    assert [sample["cls"] for _, sample in sorted(contents(val).items())] == [b"-1", b"0", b"-1"]


def test_memory_and_bytes_do_not_depend_on_row_groups_and_processes(tmp_path):
    write(tmp_path / "src" / "a.parquet", 100, group=100)
    one = write_parquet(str(tmp_path / "src" / "a.parquet"), tmp_path / "a", samples_per_shard=30, num_workers=1)["all"]
    two = write_parquet(str(tmp_path / "src"), tmp_path / "b", samples_per_shard=30, num_workers=2)["all"]
    assert one.shards == two.shards and [shard.count for shard in one.shards] == [25] * 4
    assert list(contents(one)) == [f"{i:09d}" for i in range(100)]


@pytest.mark.parametrize(
    "labels, classes", [([0, 2, 2], ("0", "1", "2")), (["b", "a", "b"], ("a", "b")), ([None, None, None], ())]
)
def test_labels_without_names(tmp_path, labels, classes):
    write(tmp_path / "a.parquet", 3, features=None, labels=pa.array(labels, None if classes else pa.int64()))
    index = write_parquet(str(tmp_path / "a.parquet"), tmp_path / "dst", label_column="label", num_workers=1)["all"]
    assert index.classes == classes and index.fields == (("image", "label") if classes else ("image",))
    if classes:
        given = [str(label if isinstance(label, int) else classes.index(label)) for label in labels]
        assert [sample["cls"].decode() for sample in contents(index).values()] == given
    index = write_parquet(str(tmp_path / "a.parquet"), tmp_path / "other", num_workers=1)["all"]
    assert index.fields == ("image",)


def test_classes_of_one_name(tmp_path):
    two = {**FEATURES, "label": {"names": ["crane", "dog", "crane"], "_type": "ClassLabel"}}
    write(tmp_path / "a.parquet", 3, features=two)
    index = write_parquet(str(tmp_path / "a.parquet"), tmp_path / "dst", num_workers=1)["all"]
    assert index.classes == ("crane", "dog", "crane")
    assert [sample["cls"] for sample in contents(index).values()] == [b"0", b"1", b"2"]
    write(tmp_path / "b.parquet", 3, labels=[0, 1, 3])
    with pytest.raises(ValueError, match=r"b\.parquet, row 2: its label 3 is not among the 3 classes"):
        write_parquet(str(tmp_path / "b.parquet"), tmp_path / "other", num_workers=1)


@pytest.mark.parametrize(
    "labels, features, given, expected",
    [
        ([0, 2, 1], FEATURES, ["emu", "fox", "dog", "cat"], [b"3", b"0", b"2"]),
        (["b", "a", "b"], None, ["a", "x", "b"], [b"2", b"0", b"2"]),
        ([0, 1, 1], None, ["zero", "one", "two"], [b"0", b"1", b"1"]),
        ([0, 2, 1], FEATURES, ["emu", "dog"], "1 labels that are not among the 2 classes, such as 'cat'"),
        (["b", "a", "b"], None, ["a"], "1 labels that are not among the 1 classes, such as 'b'"),
        ([0, 2, 1], None, ["zero", "one"], "2 names, but label_column=label has labels up to 2"),
    ],
)
def test_a_list_fixes_the_numbers_of_classes(tmp_path, labels, features, given, expected):
    write(tmp_path / "a.parquet", 3, features=features, labels=labels)
    options = {"label_column": "label", "classes": given, "num_workers": 1}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"classes: .*{expected}"):
            write_parquet(str(tmp_path / "a.parquet"), tmp_path / "dst", **options)
        return
    index = write_parquet(str(tmp_path / "a.parquet"), tmp_path / "dst", **options)["all"]
    assert index.classes == tuple(given) and [sample["cls"] for sample in contents(index).values()] == expected
    with pytest.raises(ValueError, match="needs labels"):
        write_parquet(str(tmp_path / "a.parquet"), tmp_path / "b", **{**options, "label_column": "none"})


def test_plain_bytes_and_shrinking(tmp_path):
    write(tmp_path / "a.parquet", 2, features=None, pictures=[picture(0), picture(1)])
    index = write_parquet(str(tmp_path / "a.parquet"), tmp_path / "dst", size=3, image_format="webp", num_workers=1)
    with Image.open(io.BytesIO(contents(index["all"])["000000000"]["webp"])) as image:
        assert image.size == (4, 3)


def test_parts_without_rows(tmp_path, caplog):
    write(tmp_path / "src" / "train-0.parquet", 2)
    pq.write_table(pq.read_table(tmp_path / "src" / "train-0.parquet").slice(0, 0), tmp_path / "src" / "test-0.parquet")
    found = write_parquet(str(tmp_path / "src"), tmp_path / "dst", num_workers=1)
    assert list(found) == ["train"] and "split=test have no rows" in caplog.text
    with pytest.raises(ValueError, match="src=.* has no rows"):
        write_parquet(str(tmp_path / "src" / "test-0.parquet"), tmp_path / "empty", num_workers=1)


def test_broken_rows(tmp_path):
    rows = [
        {"bytes": picture(0), "path": "x.png"},
        {"bytes": picture(1)[:45], "path": "y.png"},
        {"bytes": None, "path": "z.png"},
        {"bytes": b"nothing", "path": None},
    ]
    write(tmp_path / "a.parquet", 4, pictures=rows)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: not a complete picture.*on_error=skip"):
        write_parquet(str(tmp_path / "a.parquet"), tmp_path / "dst", num_workers=1)
    index = write_parquet(str(tmp_path / "a.parquet"), tmp_path / "dst", on_error="skip", num_workers=1)["all"]
    assert list(contents(index)) == ["000000000"] and index.provenance["skipped"] == 3


def test_from_the_hub_only_the_files_asked_for_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    names = ["README.md", "data/train-0.parquet", "data/test-0.parquet", "other/train-0.parquet"]
    for name in names[1:]:
        write(tmp_path / "hub" / name, 4)
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, **options: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    options = ["--split", "train", "--files", "data/*.parquet", "--revision", "v1", "--num-workers", "1"]
    main(["data", "parquet", "someone/animals", "dst", *options])
    expected = {"repo_type": "dataset", "revision": "v1", "allow_patterns": ["data/train-0.parquet"]}
    assert asked == [("someone/animals", expected)]
    assert ShardIndex.load(tmp_path / "dst" / "train").num_samples == 4
    with pytest.raises(ValueError, match=r"has no files \*\.arrow; revision=refs/convert/parquet"):
        write_parquet("someone/animals", "dst", files="*.arrow")


def test_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such data set on the Hub"):
        write_parquet("someone/animals", "dst")


def test_pyarrow_is_missing(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", 1)
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name=name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"pip install 'flextok_pl\[hub\]'"):
        main(["data", "parquet", str(tmp_path / "a.parquet"), str(tmp_path / "dst")])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "dev"}, "split=dev must be train, val or test"),
        ({"split": "val"}, "split=val is not among the parts"),
        ({"files": "*.csv"}, r"has no files \*\.csv"),
        ({"image_column": "x"}, "image_column=x is not among the columns image, label, caption"),
        ({"image_column": "caption"}, "image_column=caption holds string"),
        ({"caption_column": "label"}, "caption_column=label holds int64"),
        ({"label_column": "image"}, "label_column=image holds struct"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    write(tmp_path / "src" / "train.parquet", 2)
    with pytest.raises(ValueError, match=message):
        write_parquet(str(tmp_path / "src"), tmp_path / "dst", num_workers=1, **options)


def test_what_is_unclear_is_asked_for(tmp_path):
    two = {**FEATURES, "caption": {"names": ["a"], "_type": "ClassLabel"}}
    write(tmp_path / "two" / "a.parquet", 2, features=two)
    with pytest.raises(ValueError, match="label_column must be given: it may be any of label, caption"):
        write_parquet(str(tmp_path / "two"), tmp_path / "dst")
    write(tmp_path / "mixed" / "a.parquet", 2)
    write(tmp_path / "mixed" / "train.parquet", 2)
    with pytest.raises(ValueError, match=r"a\.parquet names no part, but others do \(train\)"):
        write_parquet(str(tmp_path / "mixed"), tmp_path / "dst")
    write(tmp_path / "differ" / "a.parquet", 2)
    write(tmp_path / "differ" / "b.parquet", 2, features=None)
    with pytest.raises(ValueError, match=r"b\.parquet differs from the first file"):
        write_parquet(str(tmp_path / "differ"), tmp_path / "dst")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read as parquet"):
        write_parquet(str(tmp_path / "broken.parquet"), tmp_path / "dst")


@pytest.mark.parametrize(
    "name, part",
    [
        ("data/train-00000-of-00010-ab12.parquet", "train"),
        ("default/partial-train/0000.parquet", "train"),
        ("validation.parquet", "val"),
        ("en/dev/0.parquet", "val"),
        ("train/test-0.parquet", "test"),
        ("latest/trains.parquet", "all"),
    ],
)
def test_parts_by_name(name, part):
    assert part_of(name) == part
