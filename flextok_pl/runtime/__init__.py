"""Runs trainings: starts processes, shards, saves, stops and resumes."""

from flextok_pl.runtime.checkpoint_files import (
    AtomicCheckpointIO,
    damage_of,
    find_checkpoint,
    newest_intact,
    without_tensors,
)
from flextok_pl.runtime.failure import Failure
from flextok_pl.runtime.lightning_internals import AsyncAtomicCheckpointIO, StepCheckpoint, step_ends
from flextok_pl.runtime.preemption import Preempted, Preemption, stop_if_preempted
from flextok_pl.runtime.sharding import FullyShardedStrategy
from flextok_pl.runtime.trainer import Trainer

__all__ = [
    "AsyncAtomicCheckpointIO",
    "AtomicCheckpointIO",
    "Failure",
    "FullyShardedStrategy",
    "Preempted",
    "Preemption",
    "StepCheckpoint",
    "Trainer",
    "damage_of",
    "find_checkpoint",
    "newest_intact",
    "step_ends",
    "stop_if_preempted",
    "without_tensors",
]
