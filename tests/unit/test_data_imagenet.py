"""ImageNet from its tar files and from its folders, in small."""

import io
import tarfile

import numpy as np
import pytest
import scipy.io
from data_helpers import contents, encoded, write_tar
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.data import ShardDataModule, ShardIndex, write_imagenet
from flextok_pl.data.shards.tars import tar_samples

# Not in the order of their ILSVRC2012_ID; a synset that others refine stands between them.
SYNSETS = [
    (1, "n02012849", "crane", 0),
    (2, "n01440764", "tench, Tinca tinca", 0),
    (3, "n00001740", "entity", 3),
    (4, "n03126707", "Crane", 0),
    (5, "n02088364", "beagle", 0),
]
WNIDS = ["n01440764", "n02012849", "n02088364", "n03126707"]
VAL_IDS = [4, 1, 2, 5, 2, 1]


def picture(number, size=(9, 7)):
    return encoded(Image.new("RGB", size, (40 * (number % 6), number, 255 - number)), "JPEG")


def train_files():
    return {wnid: {f"{wnid}_{i}.JPEG": picture(10 * k + i) for i in range(3 + k)} for k, wnid in enumerate(WNIDS)}


def val_files():
    return {f"ILSVRC2012_val_{i:08d}.JPEG": picture(100 + i) for i in range(1, len(VAL_IDS) + 1)}


def write_devkit(folder):
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.array([(number, wnid, words, "what it is", n) for number, wnid, words, n in SYNSETS], kind)
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets[:, None]})
    truth = "".join(f"{number}\n" for number in VAL_IDS).encode()
    files = {"meta.mat": buffer.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    packed = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in files.items()}
    write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", packed, "w:gz")


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    inner = {
        f"{wnid}.tar": write_tar(tmp_path / "inner.tar", files).read_bytes()
        for wnid, files in reversed(train_files().items())
    }
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)
    write_tar(folder / "ILSVRC2012_img_val.tar", val_files())
    write_devkit(folder)
    return folder


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    for wnid, files in train_files().items():
        (folder / "train" / wnid).mkdir(parents=True)
        for name, content in files.items():
            (folder / "train" / wnid / name).write_bytes(content)
    (folder / "val").mkdir()
    for name, content in val_files().items():
        (folder / "val" / name).write_bytes(content)
    write_devkit(folder)
    return folder


def labelled(index):
    """Label and picture by key."""
    return {key: (int(files["cls"]), files["jpeg"]) for key, files in contents(index).items()}


def test_tars_are_read_in_place(tars, tmp_path):
    before = sorted(path.name for path in tars.iterdir())
    main(["data", "imagenet", str(tars), str(tmp_path / "dst"), "--num-workers", "2", "--samples-per-shard", "4"])
    assert sorted(path.name for path in tars.iterdir()) == before
    train, val = ShardIndex.load(tmp_path / "dst" / "train"), ShardIndex.load(tmp_path / "dst" / "val")
    assert [shard.count for shard in train.shards] == [4, 4, 4, 3, 3] and val.num_samples == 6
    assert train.classes == val.classes == ("tench", "crane (n02012849)", "beagle", "Crane (n03126707)")
    assert train.provenance["wnids"] == WNIDS and train.provenance["skipped"] == 0
    expected = {
        f"{wnid}/{name[:-5]}": (WNIDS.index(wnid), content)
        for wnid, files in train_files().items()
        for name, content in files.items()
    }
    assert labelled(train) == expected
    wnid_of = {number: wnid for number, wnid, *_ in SYNSETS}
    labels = {key[-1]: (key[:9], label) for key, (label, _) in labelled(val).items()}
    assert labels == {
        str(i): (wnid_of[number], WNIDS.index(wnid_of[number])) for i, number in enumerate(VAL_IDS, start=1)
    }
    first = [key[:9] for key, _ in tar_samples(train.folder, train.shards[0].name)]
    assert len(set(first)) > 1, "the order mixes classes"
    data = ShardDataModule(val=str(val.folder), image_size=8, num_workers=0)
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 6


def as_kaggle(tree):
    """The folders and the development kit as Kaggle packs them."""
    (tree / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    place = tree / "ILSVRC" / "Data" / "CLS-LOC"
    place.mkdir(parents=True)
    for part in ("train", "val"):
        (tree / part).rename(place / part)
    (place / "test").mkdir()
    (place / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(picture(1))
    wnid_of = {number: wnid for number, wnid, *_ in SYNSETS}
    classes = sorted(f"{wnid} {words}\n" for _, wnid, words, children in SYNSETS if not children)
    (tree / "LOC_synset_mapping.txt").write_text("".join(classes))
    rows = [
        f"ILSVRC2012_val_{i:08d},{wnid_of[number]} 85 1 499 272 {wnid_of[number]} 1 2 3 4 \n"
        for i, number in enumerate(VAL_IDS, start=1)
    ]
    (tree / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    return tree


@pytest.mark.parametrize("packed", ["folders", "kaggle"])
def test_tars_and_folders_give_the_same_shards(tars, tree, tmp_path, packed):
    write_imagenet(tars, tmp_path / "a", num_workers=2)
    write_imagenet(as_kaggle(tree) if packed == "kaggle" else tree, tmp_path / "b", num_workers=1)
    for part in ("train", "val"):
        one, other = ShardIndex.load(tmp_path / "a" / part), ShardIndex.load(tmp_path / "b" / part)
        assert one.shards == other.shards and one.classes == other.classes
    assert write_imagenet(tree, tmp_path / "c", "val", num_workers=1)["val"].shards == other.shards


def test_what_the_package_of_kaggle_lacks_is_named(tree, tmp_path):
    solution = as_kaggle(tree) / "LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    for text, message in (
        ("\n".join(lines[:-1]), "val_00000001.JPEG: it is not among the 5 validation pictures whose classes"),
        ("\n".join([*lines, "ILSVRC2012_val_00000007,tench 1 2"]), "solution.csv, line 8: .* does not name a synset"),
    ):
        solution.write_text(text)
        with pytest.raises(ValueError, match=message):
            write_imagenet(tree, tmp_path / "dst", num_workers=1)
    solution.unlink()
    with pytest.raises(ValueError, match=r"or Kaggle's LOC_synset_mapping\.txt and LOC_val_solution\.csv"):
        write_imagenet(tree, tmp_path / "dst", num_workers=1)
    (tree / "LOC_synset_mapping.txt").unlink()
    assert write_imagenet(tree, tmp_path / "dst", "train", num_workers=1)["train"].classes == tuple(WNIDS)


def test_without_the_development_kit(tree, tmp_path):
    (tree / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert write_imagenet(tree, tmp_path / "dst", "train", num_workers=1)["train"].classes == tuple(WNIDS)
    with pytest.raises(ValueError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz into src="):
        write_imagenet(tree, tmp_path / "dst", num_workers=1)
    for name in (".ipynb_checkpoints/a.jpg", "dogs/notes.txt", "n00000001"):  # not a class, or one without pictures
        (tree / "train" / name).mkdir(parents=True)
    for i, wnid in enumerate(WNIDS, start=1):  # in folders it is not needed
        (tree / "val" / wnid).mkdir()
        (tree / "val" / f"ILSVRC2012_val_{i:08d}.JPEG").rename(tree / "val" / wnid / f"x{i}{'.JPEG' * (i > 1)}")
    for file in (tree / "val").glob("*.JPEG"):
        file.unlink()
    index = write_imagenet(tree, tmp_path / "dst", "val", num_workers=1)["val"]
    assert {key: int(files["cls"]) for key, files in contents(index).items()} == {
        f"{wnid}/x{i + 1}": i for i, wnid in enumerate(WNIDS)
    }


def test_an_unpacked_development_kit_and_no_training_part(tree, tmp_path):
    with tarfile.open(tree / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(tree, filter="data")
    (tree / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    (tree / "train").rename(tree / "elsewhere")
    result = write_imagenet(tree, tmp_path / "dst", num_workers=1)
    assert list(result) == ["val"] and len(result["val"].classes) == 4


def test_a_choice_of_classes(tars, tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("n03126707 a crane\nn01440764\n\n")
    result = write_imagenet(tars, tmp_path / "dst", classes=file, num_workers=1)
    assert result["train"].classes == ("tench", "Crane") and result["train"].num_samples == 3 + 6
    assert sorted(label for label, _ in labelled(result["val"]).values()) == [0, 0, 1]


def test_a_subset_numbers_its_own_classes(tree, tmp_path):
    for file in (tree / "train" / WNIDS[0]).iterdir():
        file.unlink()
    (tree / "train" / WNIDS[0]).rmdir()
    index = write_imagenet(tree, tmp_path / "dst", part="train", num_workers=1)["train"]
    assert len(index.classes) == 3 and {label for label, _ in labelled(index).values()} == {0, 1, 2}
    with pytest.raises(ValueError, match=r"pictures of 1 classes that train lacks, such as n01440764.*classes=FILE"):
        write_imagenet(tree, tmp_path / "dst", part="val", num_workers=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"part": "test"}, "part='test' must be one of"),
        ({"classes": "missing.txt"}, "classes=missing.txt cannot be read"),
    ],
)
def test_bad_options_are_named(tars, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_imagenet(tars, tmp_path / "dst", **{"num_workers": 1, **options})


def test_wrong_sources_are_named(tars, tree, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"holds no ILSVRC2012_img_train\.tar, train/ or ILSVRC/Data/CLS-LOC/train/ and"
    ):
        write_imagenet(tmp_path / "empty", tmp_path / "dst")
    tar = tars / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes()[:30_000])
    with pytest.raises(SystemExit) as stop:
        main(["data", "imagenet", str(tars), str(tmp_path / "dst")])
    assert "ILSVRC2012_img_train.tar is not a complete, uncompressed tar file" in str(stop.value)
    (tree / "train" / "dogs").mkdir()
    (tree / "train" / "dogs" / "a.jpg").write_bytes(picture(1))
    with pytest.raises(ValueError, match=r"dogs/a\.jpg is not in the folder of a synset.*flextok data folder"):
        write_imagenet(tree, tmp_path / "dst", num_workers=1)
    (tree / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no kit")
    with pytest.raises(ValueError, match="development kit ILSVRC2012_devkit_t12 in src="):
        write_imagenet(tree, tmp_path / "dst", num_workers=1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_broken_picture_in_a_tar(tars, tmp_path, num_workers):
    files = val_files()
    files["ILSVRC2012_val_00000002.JPEG"] = files["ILSVRC2012_val_00000002.JPEG"][:200]
    write_tar(tars / "ILSVRC2012_img_val.tar", files)
    with pytest.raises(ValueError, match=r"img_val\.tar, n02012849/ILSVRC2012_val_00000002: not a complete picture"):
        write_imagenet(tars, tmp_path / "dst", part="val", num_workers=num_workers)
    index = write_imagenet(tars, tmp_path / "dst", part="val", on_error="skip", num_workers=num_workers)["val"]
    assert index.num_samples == 5 and index.provenance["skipped"] == 1
