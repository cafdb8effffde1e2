"""Paths and patterns, and what lies in tars: every file of them, or an error."""

import tarfile

import pytest
import webdataset
from data_helpers import write_tar

from flextok_pl.data.shards.listing import matching_paths
from flextok_pl.data.shards.tars import grouped, tar_members, tar_samples


def read(path, *place):
    return {name: span.read(path.parent) for name, span in tar_members(path.parent, path.name, *place)}


@pytest.fixture
def two(tmp_path):
    """Two tars, whose last blocks end where the files do."""
    return [write_tar(tmp_path / f"{name}.tar", {f"{name}.txt": name.encode() * 600}) for name in "ab"]


def test_links_are_what_they_lead_to(tmp_path):
    entries = {
        "x/a.txt": b"a",
        "x/hard.txt": (tarfile.LNKTYPE, "x/a.txt"),
        "./y/soft.txt": (tarfile.SYMTYPE, "../x/hard.txt"),
        "early.txt": (tarfile.SYMTYPE, "late.txt"),
        "late.txt": b"late",
    }
    found = read(write_tar(tmp_path / "x.tar", entries))
    assert found == {"x/a.txt": b"a", "x/hard.txt": b"a", "y/soft.txt": b"a", "early.txt": b"late", "late.txt": b"late"}
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        folder = tarfile.TarInfo("z")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        folder.type, folder.name, folder.linkname = tarfile.SYMTYPE, "v1.0", "z"
        tar.addfile(folder)
    assert read(tmp_path / "x.tar") == found, "and folders are no files"


@pytest.mark.parametrize("target", ["/elsewhere/b.txt", "a.txt"])
def test_links_to_nothing_are_named(tmp_path, target):
    path = write_tar(tmp_path / "x.tar", {"a.txt": (tarfile.SYMTYPE, target)})
    with pytest.raises(ValueError, match=rf"x\.tar: a\.txt is a link to {target}, which .* again with --dereference"):
        read(path)


def test_tars_may_follow_one_another(tmp_path, two):
    path = tmp_path / "both.tar"
    path.write_bytes(two[0].read_bytes() + bytes(51200) + two[1].read_bytes())
    assert read(path) == {"a.txt": b"a" * 600, "b.txt": b"b" * 600}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: content[:1536], "it has no end mark: it was cut"),
        (lambda content: content[:1600], "it has no end mark: it was cut"),
        (lambda content: content[:1000], "unexpected end of data"),
        (lambda content: content[:1536] + b"x" + content[1537:], "byte 1,536 does not begin a header"),
        (lambda content: content + b"rubbish" * 100, "byte 10,240 does not begin a header"),
    ],
)
def test_what_is_not_a_whole_tar(two, damage, message):
    two[0].write_bytes(damage(two[0].read_bytes()))
    with pytest.raises(ValueError, match=rf"a\.tar is not a complete, uncompressed tar file .*{message}"):
        list(tar_members(two[0].parent, two[0].name))


def test_a_tar_within_another_ends_there(tmp_path, two):
    whole = two[0].read_bytes()
    path = write_tar(tmp_path / "outer.tar", {"cut.tar": whole[:1536], "whole.tar": whole})
    cut, complete = (span for _, span in tar_members(tmp_path, path.name))
    assert read(path, complete.offset, complete.size) == {"a.txt": b"a" * 600}
    with pytest.raises(ValueError, match="does not begin a header: it is damaged"):
        read(path, cut.offset, cut.size)


def test_files_with_holes_are_refused(two):
    content = bytearray(two[0].read_bytes())
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    two[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt is stored with holes; pack the tar again without --sparse"):
        read(two[0])


def test_samples_are_those_of_webdataset(tmp_path):
    names = ["a/1.jpg", "a/1.Seg.PNG", "a/2.jpg", ".hidden", "b.c/1.jpg", "__meta__/x.txt", "noending", "a/1.txt"]
    path = write_tar(tmp_path / "x.tar", {name: name.encode() for name in names})
    files = ({"fname": name, "data": name, "__url__": ""} for name in names if not name.startswith("__"))
    theirs = [
        (sample.pop("__key__"), {name: value for name, value in sample.items() if not name.startswith("__")})
        for sample in webdataset.tariterators.group_by_keys(files)
    ]
    ours = [
        (key, {name: span.read(tmp_path).decode() for name, span in files})
        for key, files in tar_samples(tmp_path, path.name)
    ]
    assert ours == theirs and len(ours) == 4
    assert list(grouped([])) == []


def test_a_path_that_is_there_goes_before_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("[2024] x/out/train", "[2024] x/out/val", "{a,b}/out", "a/out", "b/out", "p1", "p2", "un}even/q"):
        (tmp_path / folder).mkdir(parents=True)
    for pattern, found in {
        "[2024] x/out/train": ["[2024] x/out/train"],
        "[2024] x/out/*": ["[2024] x/out/train", "[2024] x/out/val"],
        "[2024] x/out/{val,train}": ["[2024] x/out/val", "[2024] x/out/train"],
        f"{tmp_path}/[2024] x/out/t*": [f"{tmp_path}/[2024] x/out/train"],
        "{a,b}/out": ["{a,b}/out"],
        "{b,a}/out": ["b/out", "a/out"],
        f"{{{tmp_path}/a,b}}/out": [f"{tmp_path}/a/out", "b/out"],
        "p[12]": ["p1", "p2"],
        "un}even/*": ["un}even/q"],
        "**/q": ["un}even/q"],
        "x" * 300 + "*": None,
        "p{1,3}": None,
        "q*": None,
    }.items():
        if found is None:
            with pytest.raises(ValueError, match="there is no "):
                matching_paths(pattern)
        else:
            assert [str(path) for path in matching_paths(pattern)] == found
