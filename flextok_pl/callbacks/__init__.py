"""Lightning callbacks: what is measured and shown during training and evaluation."""

from flextok_pl.callbacks.codebook import CodebookReport
from flextok_pl.callbacks.reconstruction_fid import ReconstructionFID
from flextok_pl.callbacks.throughput import Throughput

__all__ = ["CodebookReport", "ReconstructionFID", "Throughput"]
