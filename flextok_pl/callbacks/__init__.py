"""Lightning callbacks that measure and show results during training and evaluation."""

from flextok_pl.callbacks.codebook import CodebookReport
from flextok_pl.callbacks.ema import EMA
from flextok_pl.callbacks.fid import GenerationFID, ReconstructionFID
from flextok_pl.callbacks.hparams import HParams
from flextok_pl.callbacks.metrics_log import MetricsLog
from flextok_pl.callbacks.predictions import Predictions
from flextok_pl.callbacks.run_checks import RunChecks
from flextok_pl.callbacks.throughput import Throughput
from flextok_pl.callbacks.token_report import TokenReport

__all__ = [
    "EMA",
    "CodebookReport",
    "GenerationFID",
    "HParams",
    "MetricsLog",
    "Predictions",
    "ReconstructionFID",
    "RunChecks",
    "Throughput",
    "TokenReport",
]
