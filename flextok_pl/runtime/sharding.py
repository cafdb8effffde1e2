"""Fully sharded training (FSDP2): each process holds a part of the weights, gradients, averages and optimizer states.

Use `trainer.strategy: fsdp2`. A module names the networks to shard in `configure_model`. Each block of a network is a
unit of its own, gathered when it runs and released afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as distributed_load
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from flextok_pl.files import remove, replace_folder
from flextok_pl.precision import HALF
from flextok_pl.runtime.lightning_internals import shard_over_all_processes

CURRENT_STATE = "current_model_state"
"""Key in a checkpoint for the weights in training, if its `state_dict` is their average."""


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with all processes in one data-parallel group.

    Args:
        save_distributed_checkpoint: write a checkpoint as a folder with a part for each process, instead of one file
            that any strategy can read.
        process_group_backend: default the device's.
        timeout: how long a process waits for the others before the job ends with an error.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        self.writes_parts = save_distributed_checkpoint
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module; refuse one that trains neither a tokenizer nor a prior."""
        module = self.lightning_module
        if not is_overridden("configure_model", module):
            raise MisconfigurationException(
                f"trainer.strategy=fsdp2 shards trainings of tokenizers and priors, and {type(module).__name__} is "
                "neither; use --trainer.strategy ddp"
            )
        super().setup(trainer)

    def setup_environment(self) -> None:
        """Count the processes, and connect them."""
        shard_over_all_processes(self)
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file, or a folder with the parts of all processes; it gets its name when it is complete."""
        if not self.writes_parts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        # Lightning stores the parts of `state_dict` and the optimizers; a second state is added under a prefix.
        current = checkpoint.pop(CURRENT_STATE, {})
        state = {f"{CURRENT_STATE}.{name}": value for name, value in current.items()}
        checkpoint = {**checkpoint, "state_dict": checkpoint["state_dict"] | state, "has_current_state": bool(current)}
        path = Path(self.broadcast(str(filepath)))
        temporary = path.with_name(f".{path.name}.partial")
        if self.is_global_zero:
            remove(temporary)  # left by a process that was killed
        self.barrier()
        super().save_checkpoint(checkpoint, temporary)
        self.barrier()
        if self.is_global_zero:
            replace_folder(path, temporary)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, or a folder of parts."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if checkpoint.pop("has_current_state", False):
            held = self.lightning_module_state_dict()
            state = {f"{CURRENT_STATE}.{name}": value.clone() for name, value in held.items()}
            distributed_load({"state_dict": state}, checkpoint_id=checkpoint_path)
            checkpoint[CURRENT_STATE] = {name.removeprefix(f"{CURRENT_STATE}."): value for name, value in state.items()}
        return checkpoint


StrategyRegistry.register("fsdp2", FullyShardedStrategy, description="Fully sharded data parallel, PyTorch's second")


GATHERS_HALF = "param_dtype_override_fn" in MixedPrecisionPolicy.__dataclass_fields__
"""Whether this torch (2.15 or newer) can gather some weights of a network in half precision and others not."""


def shard(module: pl.LightningModule, networks: Sequence[nn.Module], methods: Sequence[str] = ()) -> None:
    """Shard the trained networks of a module, if its strategy asks for it; for `configure_model`.

    They must contain all trained parameters: a gradient norm cannot combine sharded and other tensors. `methods` names
    the methods, other than `forward`, by which training runs the networks.

    In half precision the trained matrices are gathered as autocast would use them, everything else and all gradients in
    float32. Results are the same as without sharding, also for a frozen encoder, which computes in float32.
    """
    if module.device_mesh is None or isinstance(networks[0], FSDPModule):
        return
    mesh, policy = module.device_mesh["data_parallel"], _policy(networks, HALF.get(str(module.trainer.precision)))
    for network in networks:
        for block in getattr(network, "blocks", ()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The backward pass needs what is outside the blocks again at once, and the prior's loss needs its head.
        fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for method in methods:
            register_fsdp_forward_method(network, method)


def _policy(networks: Sequence[nn.Module], half: torch.dtype | None) -> MixedPrecisionPolicy:
    if half is None or not GATHERS_HALF:
        return MixedPrecisionPolicy()
    modules = [part for network in networks for part in network.modules()]
    products = [part.weight for part in modules if isinstance(part, nn.Linear | nn.Conv2d)]
    matrices = {id(weight) for weight in products if weight.requires_grad}
    return MixedPrecisionPolicy(
        param_dtype=half,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast knows which inputs to cast
        param_dtype_override_fn=lambda weight: half if id(weight) in matrices else weight.dtype,
    )


@torch.no_grad()
def gather_for_evaluation(module: nn.Module) -> None:
    """Gather all weights on each process, so that processes may run networks at different times and unequally often.

    They are float32, whatever training gathers.
    """
    sharded = dict(module.named_parameters())
    for network in _sharded(module):
        network.set_reshard_after_forward(False, recurse=False)
        network.unshard()
    for name, gathered in list(module.named_parameters()):
        if gathered.dtype != sharded[name].dtype:
            owner, _, own = name.rpartition(".")
            whole = nn.Parameter(cast(DTensor, sharded[name]).full_tensor(), gathered.requires_grad)
            gathered.untyped_storage().resize_(0)  # as when the network is sharded again; it makes room for the next
            setattr(module.get_submodule(owner), own, whole)


def shard_again(module: nn.Module) -> None:
    """Undo `gather_for_evaluation`; the weights in the module are then sharded again."""
    blocks = {id(block) for part in module.modules() for block in getattr(part, "blocks", ())}
    for network in _sharded(module):
        network.set_reshard_after_forward(id(network) in blocks, recurse=False)
        network.reshard()


def whole_weights(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network that may be sharded, on the CPU of rank 0; empty on others. All must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options)  # type: ignore[return-value]


def gradient_norm(weights: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the gradient of these weights. If they are sharded, all processes must call this."""
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _sharded(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
