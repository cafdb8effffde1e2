"""An error, wherever it comes from and on however many ranks, ends all processes of a run at once."""

import os
import re
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flextok_pl.callbacks import ReconstructionFID
from flextok_pl.modules import TokenizerModule
from flextok_pl.runtime.failure import end

PLACES: dict[str, tuple[type, str]] = {
    "set-up": (TokenizerModule, "setup"),
    "training": (TokenizerModule, "training_step"),
    "validation": (TokenizerModule, "validation_step"),
    "evaluation": (ReconstructionFID, "report"),
    "test": (TokenizerModule, "test_step"),
}


@pytest.fixture
def arguments(tiny: Any, tiny_tokenizer: Path) -> Any:
    """Those of a command with two steps, each with a validation."""

    def given(command: str, num_workers: int, world_size: int, more: Mapping[str, Any] | None = None) -> list[str]:
        options = {"data.batch_size": 4, "data.num_workers": num_workers, "codebook": None, "trainer.max_steps": 2}
        options |= {"trainer.accelerator": "cpu", "trainer.devices": world_size, "trainer.val_check_interval": 1}
        options |= {"model.init_from": str(tiny_tokenizer)} if command == "test" else {}
        return tiny(command, options | {"rfid.num_steps": 1, "rfid.cache_dir": None} | dict(more or {}))

    return given


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
        *(("training", number, 1, {0}) for number in (0, 2)),
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
    arguments: Any,
    tmp_path: Path,
    start_ranks: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = "test" if place == "test" else "fit"
    options = arguments(command, num_workers, world_size)
    ranks = start_ranks(tmp_path, world_size, options, failing(place, on_ranks))
    for rank, process in enumerate(ranks):
        process.join(60)
        assert process.exitcode == 1, f"rank {rank}"
    assert f"no such thing in {place}" in capfd.readouterr().err
    for rank in on_ranks:
        (file,) = tmp_path.glob(f"runs/tokenizer/tiny/version_*/error_rank{rank}.txt")
        assert "Traceback" in file.read_text() and f"KeyError: 'no such thing in {place}'" in file.read_text()
    for process in ranks:
        with pytest.raises(ProcessLookupError):  # nor has it left another one
            os.killpg(process.pid, 0)


def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    """By itself, as where all met the same error, or else by force: in a collective no signal is heard."""
    patient, deaf = ("exit 3", "trap '' TERM; touch deaf; while true; do sleep 0.1; done")
    started = [subprocess.Popen(["sh", "-c", line], cwd=tmp_path) for line in (patient, deaf)]
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    started[0].wait()
    end(started, patience=0.1)
    assert [process.returncode for process in started] == [3, -signal.SIGKILL]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_stop_together_at_a_loss_that_is_not_finite(
    strategy: str, arguments: Any, tmp_path: Path, start_ranks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """One rank's loss is; the other says the same, and no checkpoint holds what came of it."""

    def prepare(rank: int) -> None:
        real = TokenizerModule.training_step

        def training_step(self: TokenizerModule, *args: Any) -> Any:
            loss = real(self, *args)
            return loss * float("nan") if rank == 1 and self.global_step == 2 else loss

        TokenizerModule.training_step = training_step  # type: ignore[method-assign]

    more = {"trainer.max_steps": 6, "trainer.val_check_interval": 2, "trainer.strategy": strategy, "rfid": None}
    more |= {"checkpoint.every_n_train_steps": 1}
    ranks = start_ranks(tmp_path, 2, arguments("fit", 0, 2, more), prepare)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [1, 1]
    message = capfd.readouterr().err
    assert message.count("RuntimeError: the loss is nan at step 2 (epoch 1, rank 1); samples of the batch: ") == 2
    assert "closed by peer" not in message and "step0000002.ckpt. Look" in message
    checkpoints = sorted((tmp_path / "runs/tokenizer/tiny/version_0/checkpoints").glob("*.ckpt"))
    assert [file.name for file in checkpoints] == ["last.ckpt", "step0000001.ckpt", "step0000002.ckpt"]
    for file in checkpoints:
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_one_rank_reads_a_checkpoint_whole_for_all(
    arguments: Any, tmp_path: Path, start_ranks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other goes on from what the first has found."""

    def prepare(rank: int) -> None:
        real = zipfile.ZipFile.testzip

        def testzip(self: zipfile.ZipFile) -> str | None:
            print(f"rank {rank} reads {Path(str(self.filename)).name}", flush=True)
            return real(self)

        zipfile.ZipFile.testzip = testzip  # type: ignore[method-assign]

    more = {"data.val": None, "rfid": None, "checkpoint.every_n_train_steps": 1, "ckpt_path": "last"}
    options = arguments("fit", 0, 2, more)

    def run(*more: str) -> tuple[list[int | None], str]:
        ranks = start_ranks(tmp_path, 2, [*options, *more], prepare)
        for process in ranks:
            process.join(60)
        printed = capfd.readouterr()
        return [process.exitcode for process in ranks], printed.out + printed.err

    assert run()[0] == [0, 0]
    newest = tmp_path / "runs/tokenizer/tiny/version_0/checkpoints/step0000002.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    codes, printed = run("--trainer.max_steps", "3")
    assert codes == [0, 0]
    assert re.findall("rank . reads .*", printed) == ["rank 0 reads step0000002.ckpt", "rank 0 reads step0000001.ckpt"]
    assert printed.count("going on with") == 1 and "step0000001.ckpt" in printed
    newest.write_bytes(content)
    codes, printed = run("--ckpt_path", str(newest), "--trainer.logger.init_args.version", "named")
    assert codes == [1, 1] and printed.count("step0000002.ckpt is damaged") == 2
    assert re.findall("rank . reads", printed) == ["rank 0 reads"]
