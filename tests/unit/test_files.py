"""Files that are there as a whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest

from flextok_pl.files import whole_file, whole_files, write_file


def test_the_name_is_given_when_the_file_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "new" and [each.name for each in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), OSError(errno.EIO, "broken")])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)), whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_told_with_its_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left on device.*Free some space and run it again") as told,
        whole_file(tmp_path / "file", "run it again"),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_everyone_may_read_it(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))  # as safetensors makes them
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_files_that_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("a", "b", "index")]
    for path in paths:
        path.write_text("old")
    with pytest.raises(ValueError), whole_files(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        raise ValueError
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["old"] * 3

    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target == paths[1]:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), whole_files(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["new", "old"], "no index of two sets"

    monkeypatch.setattr(os, "replace", replace)
    with whole_files(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["new"] * 3


def test_processes_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file", shared=True) as temporary:
        assert str(os.getpid()) in temporary.name
        temporary.write_bytes(b"first")
        write_file(tmp_path / "other", "second")
    assert (tmp_path / "file").read_bytes() == b"first" and (tmp_path / "other").read_text() == "second"
