"""A process that dies or hangs ends the whole training with a message, and the checkpoints are as they were."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from flextok_pl.modules import TokenizerModule
from flextok_pl.runtime import damage_of

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "tokenizer" / "tiny.yaml"


STRATEGIES = {"ddp": "lightning.pytorch.strategies.DDPStrategy", "fsdp2": "flextok_pl.runtime.FullyShardedStrategy"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_process(
    strategy: str,
    number: signal.Signals,
    image_shards: Path,
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

    short = f"{{class_path: {STRATEGIES[strategy]}, init_args: {{timeout: '0:00:08'}}}}"
    arguments = [
        *("fit", "--config", str(EXPERIMENT), "--data.train", str(image_shards / "train"), "--data.val", "null"),
        *("--data.batch_size", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "2"),
        *("--trainer.strategy", short),
        *("--checkpoint.every_n_train_steps", "1", "--trainer.enable_progress_bar", "false", "--rfid", "null"),
        *("--codebook", "null", "--model.warmup_steps", "0", "--trainer.enable_model_summary", "false"),
    ]
    started = time.monotonic()
    first, _ = start_ranks(tmp_path, 2, arguments, prepare)
    first.join(90)
    assert first.exitcode == 1 and time.monotonic() - started < 60
    message = capfd.readouterr().err
    assert "another process of this training died or hangs" in message and "--ckpt_path last" in message, message
    checkpoints = list(tmp_path.glob("runs/tokenizer/tiny/version_0/checkpoints/*.ckpt"))
    assert len(checkpoints) == 3 and not any(map(damage_of, checkpoints))
