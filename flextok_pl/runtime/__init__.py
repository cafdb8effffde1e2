"""How a run is shared out, saved, interrupted and gone on with."""

from flextok_pl.runtime.checkpoint_files import (
    AsyncAtomicCheckpointIO,
    AtomicCheckpointIO,
    damage_of,
    newest_intact,
    without_tensors,
)
from flextok_pl.runtime.failure import Failure
from flextok_pl.runtime.fit_loop import FitLoop
from flextok_pl.runtime.preemption import Preempted, Preemption, stop_if_preempted
from flextok_pl.runtime.resume import Resume
from flextok_pl.runtime.sharding import FullyShardedStrategy
from flextok_pl.runtime.step_checkpoint import StepCheckpoint

__all__ = [
    "AsyncAtomicCheckpointIO",
    "AtomicCheckpointIO",
    "Failure",
    "FitLoop",
    "FullyShardedStrategy",
    "Preempted",
    "Preemption",
    "Resume",
    "StepCheckpoint",
    "damage_of",
    "newest_intact",
    "stop_if_preempted",
    "without_tensors",
]
