"""What is said while a step takes long."""

import threading

import pytest

from flextok_pl.progress import announced, say


def test_only_a_long_step_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    with announced("reading", patience_s=1000.0):
        pass
    assert capsys.readouterr().err == ""
    with announced("building the model", patience_s=0.0):
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()
    assert capsys.readouterr().err == "building the model ...\n"
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_one_process_speaks(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    say("a")
    monkeypatch.setenv(name, "1")
    say("b")
    assert capsys.readouterr().err == "a\n"
