"""A process that dies or hangs ends the whole training with a message, and the checkpoints are as they were."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flextok_pl.modules import TokenizerModule
from flextok_pl.runtime import damage_of

DDP = "{class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {timeout: '0:00:08'}}"
SHARDED = "{class_path: flextok_pl.runtime.FullyShardedStrategy, init_args: {timeout: '0:00:08'}}"


@pytest.mark.parametrize(
    ("strategy", "number"), [(DDP, signal.SIGKILL), (SHARDED, signal.SIGSTOP)], ids=["ddp dies", "fsdp2 hangs"]
)
def test_a_lost_process(
    strategy: str,
    number: signal.Signals,
    tiny: Any,
    tmp_path: Path,
    start_ranks: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def prepare(rank: int) -> None:
        real = TokenizerModule.training_step

        def training_step(self: TokenizerModule, *args: Any) -> Any:
            if rank == 1 and self.global_step == 3:
                os.kill(os.getpid(), number)
            return real(self, *args)

        TokenizerModule.training_step = training_step  # type: ignore[method-assign]

    options = {"data.val": None, "data.batch_size": 2, "checkpoint.every_n_train_steps": 1, "trainer.devices": 2}
    options |= {"trainer.accelerator": "cpu", "trainer.strategy": strategy, "rfid": None, "codebook": None}
    first, _ = start_ranks(tmp_path, 2, tiny("fit", options), prepare)
    first.join(60)
    assert first.exitcode == 1
    message = capfd.readouterr().err
    assert "another process of this training died or hangs" in message and "--ckpt_path last" in message, message
    checkpoints = list(tmp_path.glob("runs/tokenizer/tiny/version_0/checkpoints/*.ckpt"))
    assert len(checkpoints) == 3 and not any(map(damage_of, checkpoints))
