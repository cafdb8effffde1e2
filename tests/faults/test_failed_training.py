"""An error, wherever it comes from and on however many ranks, ends all processes of a run at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flextok_pl.callbacks import ReconstructionFID
from flextok_pl.modules import TokenizerModule

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "tokenizer" / "tiny.yaml"

PLACES: dict[str, tuple[type, str]] = {
    "set-up": (TokenizerModule, "setup"),
    "training": (TokenizerModule, "training_step"),
    "validation": (TokenizerModule, "validation_step"),
    "evaluation": (ReconstructionFID, "_finish"),
    "test": (TokenizerModule, "test_step"),
}


def arguments(shards: Path, command: str, num_workers: int, world_size: int) -> list[str]:
    return [
        *(command, "--config", str(EXPERIMENT), "--data.train", str(shards / "train")),
        *("--data.val", str(shards / "val"), "--data.batch_size", "4", "--data.num_workers", str(num_workers)),
        *(
            "--trainer.max_steps",
            "2",
            "--model.warmup_steps",
            "0",
            "--trainer.val_check_interval",
            "1",
            "--trainer.enable_progress_bar",
            "false",
        ),
        *("--trainer.accelerator", "cpu", "--trainer.devices", str(world_size), "--codebook", "null"),
        *("--rfid.num_steps", "1", "--rfid.cache_dir", "null", "--trainer.enable_model_summary", "false"),
    ]


def failing(place: str, on_ranks: set[int]) -> Callable[[int], None]:
    """Let a hook raise what no one expects, on some of the ranks."""

    def prepare(rank: int) -> None:
        os.setpgrp()
        owner, name = PLACES[place]

        def fail(*args: Any, **kwargs: Any) -> None:
            raise KeyError(f"no such thing in {place}")

        if rank in on_ranks:
            setattr(owner, name, fail)

    return prepare


@pytest.mark.parametrize(
    ("place", "num_workers", "world_size", "on_ranks"),
    [
        ("set-up", 1, 1, {0}),
        *(("training", number, 1, {0}) for number in (0, 1, 2)),
        ("validation", 1, 1, {0}),
        ("evaluation", 2, 1, {0}),
        ("test", 1, 1, {0}),
        *((place, 1, 2, {1}) for place in ("set-up", "training", "test")),
        ("validation", 1, 2, {0}),
    ],
)
def test_nothing_stays(
    place: str,
    num_workers: int,
    world_size: int,
    on_ranks: set[int],
    image_shards: Path,
    tmp_path: Path,
    start_ranks: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = "test" if place == "test" else "fit"
    options = arguments(image_shards, command, num_workers, world_size)
    ranks = start_ranks(tmp_path, world_size, options, failing(place, on_ranks))
    for rank, process in enumerate(ranks):
        process.join(60)
        assert process.exitcode == 1, f"rank {rank}"
    assert f"no such thing in {place}" in capfd.readouterr().err
    for process in ranks:
        with pytest.raises(ProcessLookupError):  # nor has it left another one
            os.killpg(process.pid, 0)
