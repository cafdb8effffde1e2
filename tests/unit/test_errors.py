"""What a user can put right is told in one line; everything else keeps its traceback."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from flextok_pl.cli.tool import parsed
from flextok_pl.cli.tools import default_device
from flextok_pl.data import ShardDataModule, ShardError
from flextok_pl.errors import UserError, told_to_the_user


def function(body: str, package: str = "flextok_pl.made_up") -> Callable[[], Any]:
    """A function of some package."""
    names: dict[str, Any] = {"__name__": package}
    exec(f"def run():\n    {body}", names)
    return names["run"]  # type: ignore[no-any-return]


def worker() -> Any:
    """What a worker meets, which torch packs into an error of its own."""

    class Broken(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> int:
            raise ShardError("shard 3 is broken: mend it")

    return next(iter(DataLoader(Broken(), num_workers=1)))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (function("raise ValueError('k=0 must be at least 1')"), "k=0 must be at least 1"),
        (function("raise OSError(28, 'the disk is full, make room')"), "make room"),
        (function("open('/no/such/file')"), "/no/such/file"),
        (function("import pathlib; pathlib.Path('/no/such').read_text()"), "/no/such"),
        (lambda: ShardDataModule("x", batch_size=0), "batch_size=0 must be at least 1"),
        (lambda: Trainer(strategy="none such"), "none such"),
        (function("raise Wrong('no logger')", "lightning"), "no logger"),
        (worker, "shard 3 is broken: mend it"),
    ],
)
def test_what_a_user_can_put_right(act: Callable[[], Any], text: str) -> None:
    if "Wrong" in getattr(act, "__code__", worker.__code__).co_names:
        act.__globals__["Wrong"] = MisconfigurationException  # type: ignore[attr-defined]
    with pytest.raises(UserError) as told, told_to_the_user():
        act()
    assert text in str(told.value) and "Traceback" not in str(told.value)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (function("int('three')"), ValueError),
        (function("import numpy; numpy.zeros(3).reshape(2)"), ValueError),
        (function("import json; json.loads('{')"), ValueError),
        (function("raise ValueError('a size of zero')", "torch.nn"), ValueError),
        (function("raise OSError('image file is truncated')", "PIL.ImageFile"), OSError),
        (function("open('/no/such/file')", "timm"), OSError),
        (function("raise RuntimeError('out of memory')"), RuntimeError),
        (function("{}['x']"), KeyError),
    ],
)
def test_what_keeps_its_traceback(act: Callable[[], Any], kind: type[Exception]) -> None:
    with pytest.raises(kind) as met, told_to_the_user():
        act()
    assert type(met.value) is not UserError and met.traceback[-1].frame.f_globals["__name__"] != __name__


@dataclass
class Size:
    pixels: int = 1

    def __post_init__(self) -> None:
        function(f"if {self.pixels} < 1: raise ValueError('pixels={self.pixels} must be at least 1')")()


def tool(size: Size = Size(), name: str = "three") -> None:  # noqa: B008
    """Do something.

    Args:
        size: of something.
        name: of something.
    """
    function(f"int({name!r})")()


def test_tools() -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(tool, as_positional=False)
    tool(**parsed(parser, ["--size.pixels", "1", "--name", "3"]))
    with pytest.raises(UserError, match="pixels=0 must be at least 1"), told_to_the_user():
        parsed(parser, ["--size.pixels", "0"])
    with pytest.raises(ValueError, match="invalid literal"):
        tool(**parsed(parser, []))


@pytest.mark.parametrize("device", ["cuda:17", "abacus"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here"):
        default_device(device)
