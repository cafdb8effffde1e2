"""`flextok test`, killed without warning and given again, ends with the result of one that was not."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flextok_pl.cli import main
from flextok_pl.models.tokenizer import FlexTok

BUDGETS = [1, 4, 16]


def evaluate(arguments: list[str], folder: Path, home: Path, kill_at: int | None) -> None:
    """Run the command; SIGKILL comes at the given decoding."""
    os.environ["HOME"] = str(home)
    decode, decoded = FlexTok.detokenize, []

    def detokenize(self, *args, **kwargs):
        decoded.append(1)
        if len(decoded) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, *args, **kwargs)

    FlexTok.detokenize = detokenize
    main([*arguments, f"--rfid.output_dir={folder}"])
    (folder / "decoded").write_text(str(len(decoded)))


def run(*arguments: object) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=evaluate, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def test_killed(tiny: Any, tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"tokenizer": str(tiny_tokenizer), "data.eval_batch_size": 5, "rfid.save_every_minutes": 0}
    test = tiny("test", options | {"rfid.budgets": BUDGETS, "rfid.num_steps": 1})
    home, other = tmp_path / "home", tmp_path / "other"
    assert run(test, tmp_path / "whole", other, None) == 0
    assert run(test, tmp_path / "after", home, 5) == -signal.SIGKILL
    assert len(list(home.rglob("unfinished_*"))) == 1
    assert run(test, tmp_path / "after", home, None) == 0
    assert not list(home.rglob("unfinished_*"))
    whole, after = (json.loads((tmp_path / name / "rfid.json").read_text()) for name in ("whole", "after"))
    assert after == whole, "bit-equal"
    total, rest = (int((tmp_path / name / "decoded").read_text()) for name in ("whole", "after"))
    assert rest == total - len(BUDGETS), "the first batch was done"
