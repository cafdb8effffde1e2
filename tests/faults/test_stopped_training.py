"""A training that is killed, preempted or runs out of disk: `--ckpt_path last` goes on as if nothing had happened."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flextok_pl.cli import main
from flextok_pl.files import remove, replace_folder
from flextok_pl.modules import TokenizerModule
from flextok_pl.runtime import AtomicCheckpointIO, Preemption, damage_of, newest_intact
from flextok_pl.sweeps.sweep import as_arguments

STEPS, SAVED_EVERY = 12, 2  # an epoch has seven batches: three steps of two, and one of the seventh


def options(tiny: Any, num_workers: int = 2) -> list[str]:
    given = {"data.val": None, "data.batch_size": 3, "data.num_workers": num_workers, "data.image_size": 32}
    given |= {"trainer.max_steps": STEPS, "trainer.accumulate_grad_batches": 2, "model.warmup_steps": 2}
    given |= {"checkpoint.every_n_train_steps": SAVED_EVERY, "rfid": None, "codebook": None, "ckpt_path": "last"}
    given |= {"throughput": None}  # which would count operations in each of the processes
    return tiny("fit", given)


def train(folder: Path, arguments: list[str], prepare: Callable[[], Any] | None = None) -> int:
    """Run `flextok fit` in a process of its own and folder; returns its exit status."""

    def child() -> None:
        os.chdir(folder)
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)  # pytest keeps them else
        if prepare is not None:
            prepare()
        main(arguments)

    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def at_step(step: int, batch: int, action: Callable[[], Any]) -> Callable[[], Any]:
    """Act within the given micro-batch of an optimizer step."""

    def prepare() -> None:
        real, seen = TokenizerModule.training_step, []

        def training_step(self: TokenizerModule, *args: Any) -> torch.Tensor:
            seen.append(self.global_step)
            if self.global_step == step and seen.count(step) == batch:
                action()
            return real(self, *args)

        TokenizerModule.training_step = training_step  # type: ignore[method-assign]

    return prepare


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_of(folder: Path) -> Path:
    """The run that has checkpoints, of which there is one: whoever goes on uses its folder."""
    (checkpoints,) = (folder / "runs/tokenizer/tiny").glob("version_*/checkpoints/last.ckpt")
    return checkpoints.parents[1]


def state(folder: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Everything a training ends with: exported and raw weights, and the optimizer's state."""
    checkpoint = torch.load(run_of(folder) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    tensors = {f"exported {name}": value for name, value in load_file(run_of(folder) / "tokenizer.safetensors").items()}
    tensors |= {f"raw {name}": value for name, value in checkpoint["current_model_state"].items()}
    for number, values in checkpoint["optimizer_states"][0]["state"].items():
        tensors |= {f"optimizer {number} {name}": value for name, value in values.items()}
    return tensors


def assert_equal(folder: Path, whole: dict[str, torch.Tensor], steps: int = STEPS) -> None:
    ended = state(folder, steps)
    assert ended.keys() == whole.keys()
    different = [name for name in whole if not torch.equal(ended[name], whole[name])]
    assert not different, f"{len(different)} of {len(whole)} tensors differ, such as {different[0]}"


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The end of a training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, options(tiny)) == 0
    return state(folder)


@pytest.mark.parametrize(("step", "batch", "workers"), [(0, 1, 2), (2, 2, 0), (10, 2, 3)])
def test_killed(step: int, batch: int, workers: int, tiny: Any, tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    """At the first batch of all, within an accumulation, and within the third epoch; resumed with other workers."""
    assert train(tmp_path, options(tiny), at_step(step, batch, kill)) == -signal.SIGKILL
    assert train(tmp_path, options(tiny, workers)) == 0
    assert_equal(tmp_path, whole)


def validating_options(tiny: Any, shards: Path) -> list[str]:
    """Ten steps, with a validation of three batches after the second of an epoch's four: a checkpoint precedes it."""
    more = {"data.val": str(shards / "val"), "trainer.max_steps": 10, "data.eval_batch_size": 6, "metrics_log": {}}
    more |= {"trainer.limit_val_batches": 1.0, "trainer.val_check_interval": 4}
    return [*options(tiny, 0), *as_arguments(more | {"best.monitor": "val/loss", "best.filename": "best"})]


def in_hook(name: str, step: int, action: Callable[[], Any]) -> Callable[[], Any]:
    """Act at the start of a hook of the module that comes at the given step."""

    def prepare() -> None:
        real = getattr(TokenizerModule, name)

        def hook(self: TokenizerModule, *args: Any) -> Any:
            if self.global_step == step:
                action()
            return real(self, *args)

        setattr(TokenizerModule, name, hook)

    return prepare


def logged(folder: Path) -> dict[str, Any]:
    """The metrics of each validation by step, those of the HParams tab, and the losses by flow time and by budget."""
    found: dict[str, Any] = {"parts": {}, "shown": {}}
    for line in (run_of(folder) / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        validated = {name: value for name, value in entry["metrics"].items() if name.startswith("val/")}
        found.setdefault(f"step {entry['step']}", {}).update(validated)
    for place, kept, prefix in (("hparams", "shown", "val/"), ("", "parts", "train/loss_")):
        events = EventAccumulator(str(run_of(folder) / place)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(prefix)]
        found[kept] = {tag: [event.value for event in events.Scalars(tag)] for tag in tags}
    return found


def assert_same_run(folder: Path, whole: Path) -> None:
    """It has ended, measured and kept what the other one has."""
    assert_equal(folder, state(whole, 10), 10)
    assert logged(folder) == logged(whole)
    best = [torch.load(run_of(each) / "checkpoints" / "best.ckpt", weights_only=True) for each in (folder, whole)]
    assert best[0]["global_step"] == best[1]["global_step"]


@pytest.fixture(scope="module")
def validated_whole(tiny: Any, image_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training with validations that nobody disturbed."""
    folder = tmp_path_factory.mktemp("validated")
    assert train(folder, validating_options(tiny, image_shards)) == 0
    found = logged(folder)
    assert found["parts"] and all("val/loss" in found[name] for name in ("shown", "step 2", "step 6", "step 10"))
    return folder


# What comes after a checkpoint at each moment of a training is told apart in tests/unit/test_step_checkpoint.py.
@pytest.mark.parametrize(("hook", "step"), [("validation_step", 6), ("on_train_end", 10)])
def test_killed_after_a_checkpoint(
    hook: str, step: int, tiny: Any, image_shards: Path, tmp_path: Path, validated_whole: Path
) -> None:
    """What was to come after it still does: the validation of its step and, at the last one, the export."""
    arguments = validating_options(tiny, image_shards)
    assert train(tmp_path, arguments, in_hook(hook, step, kill)) == -signal.SIGKILL
    saved = torch.load(run_of(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step and not (run_of(tmp_path) / "tokenizer.safetensors").exists()
    assert train(tmp_path, arguments) == 0
    assert_same_run(tmp_path, validated_whole)


def test_preempted_within_a_validation(tiny: Any, image_shards: Path, tmp_path: Path, validated_whole: Path) -> None:
    """It is left at once, though the averaged weights are in place, and what it had measured is measured anew."""
    arguments, seen = validating_options(tiny, image_shards), []

    def announce() -> None:
        seen.append(1)
        assert len(seen) <= 2, "no batch is validated after the signal"
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(tmp_path, arguments, in_hook("validation_step", 6, announce)) == 128 + signal.SIGTERM
    saved = torch.load(run_of(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6 and not (run_of(tmp_path) / "tokenizer.safetensors").exists()
    assert train(tmp_path, arguments) == 0
    assert_same_run(tmp_path, validated_whole)


@pytest.mark.long
def test_killed_at_twenty_random_moments(tiny: Any, tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    """Up to three kills to a training, at any moment, loading and saving included; twenty in all."""
    started = time.monotonic()
    assert train(tmp_path / "timed", options(tiny)) == 0
    duration, generator = time.monotonic() - started, random.Random(0)
    kills = after_a_checkpoint = 0
    for attempt in itertools.count():
        if kills >= 20:
            break
        folder, of_this = tmp_path / str(attempt), 0
        while True:
            delay = generator.uniform(0.05, duration)

            def later(delay: float = delay) -> None:
                threading.Thread(target=lambda: (time.sleep(delay), kill()), daemon=True).start()

            code = train(folder, options(tiny), later if of_this < 3 else None)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            of_this += 1
            after_a_checkpoint += bool(list(folder.glob("runs/*/*/*/checkpoints/*.ckpt")))
        kills += of_this
        assert_equal(folder, whole)
    assert after_a_checkpoint >= 5, "some kills came after a checkpoint"


@pytest.mark.parametrize(("name", "whom"), [("SIGTERM", "the training"), ("SIGUSR1", "its loader processes, too")])
def test_preempted(name: str, whom: str, tiny: Any, tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    number = signal.Signals[name]

    def announce() -> None:
        if whom == "the training":
            os.kill(os.getpid(), number)
        else:  # as Slurm does, from a process that is none of the training's
            subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgrp()}"], check=True, start_new_session=True)

    def announced() -> None:
        os.setpgrp()
        at_step(5, 1, announce)()

    assert train(tmp_path, options(tiny), announced) == 128 + number
    run = run_of(tmp_path)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6, "the accumulated step is finished first"
    assert not (run / "tokenizer.safetensors").exists(), "nothing half trained is exported"
    assert not (run / "error_rank0.txt").exists(), "it is no error"
    assert train(tmp_path, options(tiny)) == 0
    assert_equal(tmp_path, whole)


def test_ranks_leave_a_validation_together(
    tiny: Any, image_shards: Path, tmp_path: Path, start_ranks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of them is told, and the other one has a batch more, after which nobody would answer it."""
    more = {"trainer.devices": 2, "trainer.accelerator": "cpu", "data.batch_size": 2, "data.val_limit": 13}
    more |= {"data.eval_batch_size": 3, "rfid": {"num_steps": 1}}
    arguments = [*validating_options(tiny, image_shards), *as_arguments(more)]

    def prepare(rank: int) -> None:
        in_hook("validation_step", 2, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGUSR1))()

    ranks = start_ranks(tmp_path, 2, arguments, prepare)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [128 + signal.SIGUSR1] * 2, capfd.readouterr().err
    saved = torch.load(run_of(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 and saved["loops"]["fit_loop"]["epoch_loop.state_dict"]["validating"]


def test_asynchronous_saving(tiny: Any, tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    """What is still being written, on a slow disk, when the signal comes is waited for."""
    plugin = [{"class_path": "flextok_pl.runtime.AsyncAtomicCheckpointIO"}]
    arguments = [*options(tiny), "--trainer.plugins", json.dumps(plugin)]

    def announced_with_a_slow_disk() -> None:
        at_step(7, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))()
        write = AtomicCheckpointIO.save_checkpoint

        def slowly(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
            time.sleep(1)
            write(self, *args, **kwargs)

        AtomicCheckpointIO.save_checkpoint = slowly  # type: ignore[method-assign]

    assert train(tmp_path, arguments, announced_with_a_slow_disk) == 128 + signal.SIGTERM
    checkpoints = run_of(tmp_path) / "checkpoints"
    assert damage_of(checkpoints / "last.ckpt") is None
    assert {file.name for file in checkpoints.iterdir()} == {"last.ckpt", "step0000004.ckpt", "step0000006.ckpt"}
    assert train(tmp_path, arguments) == 0
    assert_equal(tmp_path, whole)


def test_preempted_under_slurm(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`scontrol` stands in here; the real one is asked in `tests/slurm`. A job that is cancelled stays away."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    for name, value in {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "12",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
    }.items():
        monkeypatch.setenv(name, value)
    announced = at_step(1, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert train(tmp_path / "run", options(tiny), announced) == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "show job --oneliner 7_3\nrequeue 7_3\n"
    scontrol.write_text("#!/bin/sh\necho JobState=CANCELLED; test $1 = show\n")
    assert train(tmp_path / "cancelled", options(tiny), announced) == 128 + signal.SIGUSR1
    said = capfd.readouterr()
    assert said.out.count("in the queue again") == 1 and "requeue" not in said.err


def test_a_damaged_checkpoint(
    tiny: Any, tmp_path: Path, whole: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, options(tiny), at_step(7, 1, kill)) == -signal.SIGKILL
    checkpoints = run_of(tmp_path) / "checkpoints"
    newest = checkpoints / "step0000006.ckpt"
    assert (checkpoints / "last.ckpt").resolve() == newest and (checkpoints / "step0000004.ckpt").is_file()
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert train(tmp_path, options(tiny)) == 0
    printed = capfd.readouterr()
    assert "step0000006.ckpt is damaged" in printed.err and "going back to step0000004.ckpt" in printed.err
    assert "going on with" in printed.out and "step0000004.ckpt" in printed.out
    assert_equal(tmp_path, whole)


def test_a_loader_process_dies(
    tiny: Any, tmp_path: Path, whole: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    def kill_worker() -> None:
        worker = multiprocessing.active_children()[0]
        worker.kill()
        worker.join()

    assert train(tmp_path, options(tiny), at_step(5, 1, kill_worker)) == 1
    message = capfd.readouterr().err
    assert "a data-loading process died" in message and "lower data.num_workers" in message
    assert train(tmp_path, options(tiny)) == 0
    assert_equal(tmp_path, whole)


def checkpoint(path: Path, step: int) -> Path:
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "weights": torch.randn(5000)}, path)
    return path


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) is None
    first, second = (checkpoint(tmp_path / f"{step}.ckpt", step) for step in (1, 2))
    os.utime(first, (1, 1))
    assert newest_intact(tmp_path) == second and damage_of(second) is None
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"2\.ckpt is damaged .*going back to 1\.ckpt"):
        assert newest_intact(tmp_path) == first
    first.write_bytes(b"")
    with pytest.warns(UserWarning, match="nothing is left"), pytest.raises(ValueError, match="none of the 2 check"):
        newest_intact(tmp_path)
    assert "complete" in (damage_of(first) or "")
    (tmp_path / "parts.ckpt").mkdir()
    assert damage_of(tmp_path / "parts.ckpt") == "it has no .metadata"


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of a URL, which Lightning trusts."""
    asked: list[Any] = []
    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", lambda self, *given: asked.append(given))
    AtomicCheckpointIO().load_checkpoint("https://example.com/last.ckpt")
    AtomicCheckpointIO().load_checkpoint("last.ckpt", weights_only=False)
    assert [given[2] for given in asked] == [True, False]


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "last.ckpt", 1)
    before = path.read_bytes()

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", dies)
        with pytest.raises(KeyboardInterrupt):
            checkpoint(path, 2)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    checkpoint(path, 2)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("dies_at", ["rename 1", "rename 2", "rename 3", "rmtree"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_parts_is_replaced(
    dies_at: str, linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the process dies, a whole checkpoint is found, and the next one is put in its place."""

    def parts(name: str, content: str) -> Path:
        (tmp_path / name).mkdir()
        for file in (".metadata", "meta.pt", "part"):
            (tmp_path / name / file).write_text(content)
        return tmp_path / name

    def dying(real: Callable[..., Any], number: int) -> Callable[..., Any]:
        calls = itertools.count(1)

        def call(*args: Any) -> Any:
            if next(calls) == number:
                raise KeyboardInterrupt
            return real(*args)

        return call

    path = tmp_path / "last.ckpt"
    if linked:
        path.symlink_to(parts("step1.ckpt", "old").name)
    else:
        parts("last.ckpt", "old")
    with monkeypatch.context() as patch:
        what, _, number = dies_at.partition(" ")
        place = Path if what == "rename" else shutil
        patch.setattr(place, what, dying(getattr(place, what), int(number or 1)))
        if linked and what == "rmtree":
            replace_folder(path, parts(".last.ckpt.partial", "new"))  # there is only a link to delete
        else:
            with pytest.raises(KeyboardInterrupt):
                replace_folder(path, parts(".last.ckpt.partial", "new"))
    found = newest_intact(tmp_path)
    assert found is not None and (found / "part").read_text() == ("new" if what == "rmtree" or number == "3" else "old")
    remove(tmp_path / ".last.ckpt.partial")
    replace_folder(path, parts(".last.ckpt.partial", "newer"))
    assert (path / "part").read_text() == "newer" and not path.is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt"} | ({"step1.ckpt"} if linked else set())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(
    tiny: Any, small_disk: Path, whole: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    filler = small_disk / "filler"

    def fill() -> None:
        room = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(room - 500_000))

    assert train(small_disk, options(tiny), at_step(5, 1, fill)) == 1
    message = capfd.readouterr().err
    assert "No space left on device" in message and "resume with --ckpt_path last" in message, message
    checkpoints = run_of(small_disk) / "checkpoints"
    assert [damage_of(file) for file in checkpoints.glob("*.ckpt")] == [None, None, None]
    assert not list(checkpoints.glob(".*")), "nothing half written stays"
    filler.unlink()
    assert train(small_disk, options(tiny)) == 0
    assert_equal(small_disk, whole)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="'SIGKILL' cannot be handled"):
        Preemption(signals=["SIGKILL"])
    with pytest.raises(ValueError, match="check_every_n_steps=0"):
        Preemption(check_every_n_steps=0)


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    callback = Preemption()
    trainer = pl.Trainer(logger=False)
    callback.on_train_start(trainer, pl.LightningModule())
    assert signal.getsignal(signal.SIGUSR1) == callback._receive
    callback.on_exception(trainer, pl.LightningModule(), RuntimeError())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
