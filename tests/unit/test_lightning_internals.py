"""Which private names of Lightning are used, where, and whether the installed version still has them as they were."""

import ast
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.fabric
import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

PACKAGE = Path(__file__).parents[2] / "flextok_pl"
PLACE = PACKAGE / "runtime" / "lightning_internals.py"

METHODS: dict[Callable[..., Any], list[str]] = {
    _FitLoop.__init__: ["self", "trainer", "min_epochs", "max_epochs"],
    _FitLoop._should_accumulate: ["self"],
    _TrainingEpochLoop.__init__: ["self", "trainer", "min_steps", "max_steps"],
    _TrainingEpochLoop._should_accumulate: ["self"],
    _TrainingEpochLoop._should_check_val_fx: ["self", "data_fetcher"],
    _CheckpointConnector.__init__: ["self", "trainer"],
    _CheckpointConnector.resume_start: ["self", "checkpoint_path", "weights_only"],
    _CheckpointConnector._select_ckpt_path: ["self", "state_fn", "ckpt_path", "model_provided", "model_connected"],
    _CheckpointConnector._parse_ckpt_path: ["self", "state_fn", "ckpt_path", "model_provided", "model_connected"],
    ModelCheckpoint._monitor_candidates: ["self", "trainer"],
    ModelCheckpoint._save_last_checkpoint: ["self", "trainer", "monitor_candidates"],
    ModelCheckpoint._save_topk_checkpoint: ["self", "trainer", "monitor_candidates"],
    ModelCheckpoint._should_save_on_exception: ["self", "trainer"],
    ModelCheckpoint._should_skip_saving_checkpoint: ["self", "trainer"],
    AsyncCheckpointIO._ensure_setup: ["self"],
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__qualname__)
def test_a_method_has_its_signature(method: Callable[..., Any]) -> None:
    assert list(inspect.signature(method).parameters) == METHODS[method]


def test_attributes_are_there() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    assert isinstance(trainer.fit_loop, _FitLoop) and isinstance(trainer.fit_loop.epoch_loop, _TrainingEpochLoop)
    assert isinstance(trainer._checkpoint_connector, _CheckpointConnector)
    assert {"_data_fetcher"} <= vars(trainer.fit_loop).keys()
    assert {"_skip_next_val"} <= vars(trainer.fit_loop.epoch_loop).keys()
    assert isinstance(inspect.getattr_static(_TrainingEpochLoop, "_is_training_done"), property)
    assert _DataFetcher in inspect.signature(_TrainingEpochLoop.advance).parameters["data_fetcher"].annotation.__mro__
    assert vars(ModelCheckpoint())["_defer_save_until_validation"] is False
    assert vars(AsyncCheckpointIO())["_executor"] is None
    assert vars(ModelParallelStrategy())["_data_parallel_size"] == "auto"
    assert vars(DDPStrategy(find_unused_parameters=True))["_ddp_kwargs"] == {"find_unused_parameters": True}
    assert vars(pl.LightningModule())["_trainer"] is None


def private_names() -> set[str]:
    """Of functions, classes and attributes of objects, in Lightning's source."""
    found = set()
    for package in (pl, lightning.fabric):
        for file in Path(*package.__path__).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def uses(file: Path, private: set[str]) -> Iterator[str]:
    """Private names that a file takes from Lightning: imports, attributes of others' objects, and overridden methods.

    A name that the file's own classes define or assign, and no base of theirs is Lightning's that has it, is its own.
    """
    tree = ast.parse(file.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr in private and node.attr not in own:
            yield ast.unparse(node)


@pytest.fixture(scope="module")
def private() -> set[str]:
    return private_names()


def test_one_file_has_them_all(private: set[str]) -> None:
    """As far as names tell: which object has them, no AST does."""
    found = {
        str(file.relative_to(PACKAGE)): names
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != PLACE and "lightning" in file.read_text() and (names := [*uses(file, private)])
    }
    assert not found
    assert len({*uses(PLACE, private)}) > 10, "they are recognised"


def test_classes_override_none(private: set[str]) -> None:
    """A class of this package that Lightning runs has no method or attribute of a private name of its bases."""
    import flextok_pl.callbacks
    import flextok_pl.cli.training
    import flextok_pl.modules
    import flextok_pl.runtime

    modules = (flextok_pl.callbacks, flextok_pl.cli.training, flextok_pl.modules, flextok_pl.runtime)
    for kind in {each for module in modules for each in vars(module).values() if isinstance(each, type)}:
        if not kind.__module__.startswith("flextok_pl") or kind.__module__.endswith(PLACE.stem):
            continue
        for base in kind.__mro__:
            if base.__module__.startswith("lightning"):
                same = {name for name in vars(base).keys() & vars(kind).keys() & private}
                assert not same, f"{kind.__name__} overrides {same} of {base.__name__}"
