"""On a system that cannot lock files, such as Windows, what needs it says so in one line; models work."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from flextok_pl import posix
from flextok_pl.cli import main
from flextok_pl.posix import UnsupportedPlatform

NEED_IT = ("flextok_pl.data.shards.remote", "flextok_pl.sweeps.runner")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is no `fcntl`."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("flextok_pl.posix", "flextok_pl.cli.shards", "flextok_pl.data.shards.sources", *NEED_IT):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("module", NEED_IT)
def test_the_import_is_refused(module: str) -> None:
    with pytest.raises(ImportError, match=r"need Linux or macOS; on Windows only models work.* WSL") as error:
        importlib.import_module(module)
    assert type(error.value).__name__ == UnsupportedPlatform.__name__ and "\n" not in str(error.value)


@pytest.mark.usefixtures("windows")
def test_a_command_says_it_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^flextok data verify: error: reading shards, .* need Linux or macOS"):
        main(["data", "verify", "tests"])


def test_models_need_no_locks() -> None:
    """Imports point downward, so that no more than these parts matter to a model."""
    package = Path(posix.__file__).parent
    parts = ("models", "interop", "layers", "flow", "backbones")
    files = [file for part in parts for file in (package / part).rglob("*.py")]
    files += [file for file in package.glob("*.py") if file.name != "posix.py"]
    assert len(files) > 50
    for file in files:
        assert not re.search(r"^\s*(from|import) (flextok_pl\.posix|fcntl)", file.read_text(), re.MULTILINE), file
