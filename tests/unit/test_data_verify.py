"""Looking at shard sets: everything wrong is told, and what is in them is counted."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from data_helpers import encoded
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.data import ShardError, ShardIndex
from flextok_pl.data.encode.encoded import npy
from flextok_pl.data.shards.index import INDEX_NAME
from flextok_pl.data.shards.stats import shard_statistics, spread
from flextok_pl.data.shards.tars import tar_samples
from flextok_pl.data.shards.writer import Sample, write_index, write_shard


def picture(number=0, size=(8, 8), kind="PNG"):
    return encoded(Image.new("RGB", size, (number, 0, 255)), kind)


def sample(key, number, label=b"0", text=b"a text", content=None):
    files = {"png": picture(number) if content is None else content, "cls": label, "txt": text}
    return Sample(key, {extension: value for extension, value in files.items() if value is not None})


def write_set(folder, *shards, size=8):
    folder.mkdir(exist_ok=True)
    infos = tuple(write_shard(folder / f"shard-{i:06d}.tar", samples) for i, samples in enumerate(shards))
    index = ShardIndex(folder, ("image", "label", "text"), infos, ("a", "b"), size)
    write_index(index)
    return index


def verify(capsys, *arguments):
    """The lines that were printed, and the exit status."""
    capsys.readouterr()
    try:
        main(["data", "verify", *map(str, arguments), "--num-workers", "1"])
    except SystemExit as stop:
        return capsys.readouterr().out.splitlines(), stop.code
    return capsys.readouterr().out.splitlines(), 0


def test_a_whole_set(image_shards, capsys):
    lines, status = verify(capsys, image_shards / "{train,val}")
    assert status == 0 and len(lines) == 1
    assert re.fullmatch(r"40 samples in 2 shards, 0\.1 MiB: 0 errors, 0 duplicate pictures", lines[0])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_everything_wrong_is_told(tmp_path, capsys, num_workers):
    write_set(
        tmp_path,
        [
            sample("fine", 1),
            sample("broken", 2, content=picture(2)[:40]),
            sample("label", 3, label=b"2"),
            sample("none", 4, label=None, text=None),
            sample("size", 5, content=picture(5, (9, 8))),
        ],
        [sample("fine", 6), sample("word", 7, label=b"cat", text=b"\xff"), sample("copy", 1)],
        [sample("cut", 8)],
        [sample("changed", 9)],
        [sample("gone", 10)],
    )
    paths = [tmp_path / f"shard-{i:06d}.tar" for i in range(5)]
    paths[2].write_bytes(paths[2].read_bytes()[:700])
    content = bytearray(paths[3].read_bytes())
    content[200] ^= 1  # within the first header, whose checksum no longer fits
    paths[3].write_bytes(content)
    paths[4].unlink()
    shutil.copy(paths[0], tmp_path / "other.tar")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["data", "verify", str(tmp_path), "--num-workers", str(num_workers)])
    *lines, summary = capsys.readouterr().out.splitlines()
    expected = [
        ("other.tar", f"it is not in {INDEX_NAME}"),
        ("shard-000000.tar, sample 'broken'", "not a complete picture"),
        ("shard-000000.tar, sample 'label'", r"label 2 is outside 0\.\.1"),
        ("shard-000000.tar, sample 'none'", r"it has no \.cls file"),
        ("shard-000000.tar, sample 'none'", r"it has no \.txt file"),
        ("shard-000000.tar, sample 'size'", "it has 9 x 8 pixels instead of 8 x 8"),
        ("shard-000001.tar, sample 'word'", "label b'cat' is not an integer"),
        ("shard-000001.tar, sample 'word'", "'utf-8' codec can't decode"),
        ("shard-000001.tar, sample 'fine'", "the same key is in .*shard-000000.tar"),
        ("shard-000002.tar", "it has 700 bytes instead of 10,240"),
        ("shard-000002.tar", "not a complete, uncompressed tar file"),
        ("shard-000002.tar", "it holds 0 samples instead of 1"),
        ("shard-000003.tar", "does not match its checksum"),
        ("shard-000003.tar", "not a complete, uncompressed tar file"),
        ("shard-000003.tar", "it holds 0 samples instead of 1"),
        ("shard-000004.tar", "it is missing"),
    ]
    wrong = [line for line in lines if line.startswith("wrong: ")]
    assert len(wrong) == len(expected)
    for line, (where, problem) in zip(wrong, expected, strict=True):
        assert re.fullmatch(f"wrong: {tmp_path}/{re.escape(where)}: .*{problem}.*", line)
    (duplicate,) = set(lines) - set(wrong)
    assert re.fullmatch(r"duplicate: .*shard-000001\.tar, sample 'copy': the same picture is 'fine' in .*", duplicate)
    assert summary.endswith("16 errors, 1 duplicate pictures")
    assert re.search(r"16 errors in .*, listed above", str(stop.value))


def test_equal_pictures_among_sets(tmp_path, capsys):
    write_set(tmp_path / "train", [sample("a", 1)])
    write_set(tmp_path / "val", [sample("a", 1), sample("b", 2)])
    lines, status = verify(capsys, tmp_path / "*")
    assert status == 0 and len(lines) == 2 and "val/shard-000000.tar, sample 'a': the same picture is 'a'" in lines[0]
    assert verify(capsys, tmp_path / "*", "--duplicates", "fail")[1] not in (0, None)


def test_tokens_that_their_tokenizer_does_not_have(tmp_path, capsys):
    def tokens(key, *values):
        return Sample(key, {"tokens.npy": npy(np.array(values, np.int32))})

    info = write_shard(tmp_path / "shard-000000.tar", [tokens("a", 0, 7), tokens("b", 8, 0), tokens("c", 0, -1)])
    maker = {"tokenizer": {"sha256": "x", "vocab_size": 8, "num_tokens": 2}}
    write_index(ShardIndex(tmp_path, ("tokens",), (info,), (), 32, {}, maker))
    lines, status = verify(capsys, tmp_path)
    assert status not in (0, None) and len(lines) == 3
    assert all(f"sample {key!r}: it has tokens outside 0..7" in line for key, line in zip("bc", lines, strict=False))


def test_shapes_that_do_not_go_into_one_batch(tmp_path, capsys):
    def latent(key, side):
        return Sample(key, {"latent.npy": npy(np.zeros((2, side, side), np.float16))})

    shards = [[latent("a", 4), latent("b", 8)], [latent("c", 8)]]
    infos = tuple(write_shard(tmp_path / f"shard-{i:06d}.tar", samples) for i, samples in enumerate(shards))
    write_index(ShardIndex(tmp_path, ("latent",), infos, (), 32))
    lines, status = verify(capsys, tmp_path)
    assert status not in (0, None) and len(lines) == 3
    assert re.search(
        r"000000\.tar, sample 'b': its latent have the shape \(2, 8, 8\) instead of the \(2, 4, 4\)", lines[0]
    )
    assert re.search(r"000001\.tar: its latent have the shape \(2, 8, 8\) instead of the \(2, 4, 4\)", lines[1])


def test_keys_that_are_not_utf8(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flextok_pl.data.shards.writer.is_utf8", lambda key: True)  # as releases before 0.2 wrote them
        write_set(tmp_path, [sample("caf\udce9", 1)])
    lines, status = verify(capsys, tmp_path)
    assert (
        status not in (0, None) and r"sample 'caf\udce9': its key is not UTF-8; rename" in lines[0] and len(lines) == 2
    )


def test_unusable_indices(tmp_path, capsys):
    index = write_set(tmp_path / "a", [sample("a", 1)])
    (tmp_path / "b").mkdir()
    (index.folder / INDEX_NAME).write_text("{}")
    lines, status = verify(capsys, tmp_path / "*")
    assert status not in (0, None) and "index.json is damaged" in lines[0] and "it is missing" in lines[1]
    _, status = verify(capsys, tmp_path / "c")
    assert "there is no" in status


def test_statistics(tmp_path, capsys):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # seen with its sides exchanged
    Image.new("RGB", (20, 10)).save(turned, "JPEG", exif=exif)
    write_set(
        tmp_path / "set",
        [sample("a", 255, content=picture(255, (8, 6))), sample("b", 255, b"1", b"one two", picture(255, (30, 6)))],
        [sample("c", 0, b"0", b"", turned.getvalue()), sample("d", 255, b"-1"), sample("e", 255)],
        size=None,
    )
    main(["data", "stats", str(tmp_path / "set"), "--json", str(tmp_path / "x" / "s.json"), "--pixel-samples", "2"])
    record = json.loads((tmp_path / "x" / "s.json").read_text())
    assert (record["samples"], record["shards"], record["bytes"]) == (5, 2, 2 * 10240)
    classes = record["classes"]
    assert [entry["samples"] for entry in classes["counts"]] == [3, 1] and classes["samples_without_class"] == 1
    assert classes["imbalance"] == 3 and classes["without_samples"] == 0
    pictures = record["pictures"]
    assert pictures["formats"] == {"png": 4, "jpeg": 1}
    assert pictures["width"] == {"min": 8, "median": 8, "max": 30}
    assert pictures["height"] == {"min": 6, "median": 8, "max": 20}
    assert pictures["aspect_ratio"] == {"min": 0.5, "median": 1.0, "max": 5.0}
    captions = record["captions"]
    assert captions["empty"] == 1 and captions["words"] == {"min": 0, "median": 2, "max": 2}
    # The first and the third: (1, 0, 1) and black, of equal weight.
    assert record["pixels"] == {"pictures": 2, "mean": [0.5, 0.0, 0.5], "std": [0.5, 0.0, 0.5]}
    shown = capsys.readouterr().out
    assert re.search(r"pictures: width +8 \.\. 8 \.\. 30\n", shown) and re.search(r" 0 a +3\n +1 b +1\n", shown)


def test_statistics_of_all_and_of_several_sets(image_shards):
    indices = [ShardIndex.load(image_shards / part) for part in ("train", "val")]
    one, two = (shard_statistics(indices, num_workers=workers) for workers in (1, 2))
    assert one["pixels"]["mean"] == pytest.approx(two["pixels"]["mean"])
    assert one["samples"] == sum(entry["samples"] for entry in one["classes"]["counts"]) == 40
    files = [file.read(index.folder) for index in indices for file in _pictures(index)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files]) / 255
    assert one["pixels"]["mean"] == pytest.approx(pixels.mean((0, 1, 2)).tolist(), abs=1e-4)
    assert one["pixels"]["std"] == pytest.approx(pixels.std((0, 1, 2)).tolist(), abs=1e-4)


def _pictures(index):
    return [dict(f)["png"] for path in index.paths for _, f in tar_samples(index.folder, path.name)]


def test_statistics_name_a_broken_sample(tmp_path):
    index = write_set(tmp_path / "set", [sample("a", 1), sample("b", 2, content=b"nothing")])
    with pytest.raises(ValueError, match=r"shard-000000\.tar, sample 'b': .*flextok data verify"):
        shard_statistics([index], num_workers=1)
    with pytest.raises(ShardError, match=r"no index\.json|is not a folder"):
        shard_statistics([ShardIndex.load(tmp_path)])


def test_spread():
    assert spread({3: 1, 1: 2, 9: 0}) == {"min": 1, "median": 1, "max": 3}
    assert spread({1: 1, 2: 1, 5: 1}) == {"min": 1, "median": 2, "max": 5}
