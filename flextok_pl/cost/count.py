"""Counts operations and memory on tensors without values: by torch's formulas, and by the tensors' storages.

A model is counted with one and with two blocks; each further block costs the same. Operations are counted on the meta
device. Memory is counted on fake tensors of the CPU, since meta tensors support neither autocast nor the attention
kernels that keep no scores.

Shapes: B batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FULL = 4  # bytes of a float32
BATCHES = (1, 2, 3)  # numbers of samples that a step is counted with


class Model(NamedTuple):
    """A model to count."""

    step: Callable[[int], Tensor]  # a forward pass over B samples, up to a scalar
    blocks: Iterable[nn.Module] = ()


Part = Callable[[int, bool], Model]
"""Makes a model of that many blocks, with or without activation checkpointing."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a training step, or of a part of it.

    Matrix products, convolutions and attention count, a multiplication with its addition as two. Norms, activations and
    embeddings do not, as usual for MFU (PaLM, https://arxiv.org/abs/2204.02311, appendix B). Attention counts all pairs
    of query and key that the code gives to the kernel, even if a causal kernel skips half of them.
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0  # forward passes that activation checkpointing repeats

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor, self.recomputed * factor)

    @property
    def training(self) -> float:
        """Operations of a training step as MFU counts them, without recomputation."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Numerics:
    """How numbers are stored in training."""

    compute: int = FULL  # bytes of a number that goes into a product or comes out: 4, or 2 under autocast
    fused_norms: bool = True  # RMSNorm runs as one kernel, as on a GPU, and does not keep the normalised values

    @property
    def autocast(self) -> bool:
        """Whether products run in half precision."""
        return self.compute < FULL


@dataclass(frozen=True)
class Activations:
    """Bytes that a part of a model keeps for the backward pass."""

    kept: float = 0.0  # without activation checkpointing
    inputs: float = 0.0  # with it: the inputs of blocks, and all outside of blocks
    largest_block: float = 0.0  # what one block keeps while it is computed again

    def __add__(self, other: Activations) -> Activations:
        largest = max(self.largest_block, other.largest_block)
        return Activations(self.kept + other.kept, self.inputs + other.inputs, largest)

    def __mul__(self, factor: float) -> Activations:
        return Activations(self.kept * factor, self.inputs * factor, self.largest_block * factor)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that run in this context on any device, and the memory of the tensors that they make.

    It sees neither earlier tensors nor the memory inside kernels. In the backward pass a product costs the same again
    for each factor with a gradient.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.backward = 0  # see `Flops`
        self.alive = self.peak = 0  # bytes that the tensors hold now, and the most at one time
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and record what it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # most calls, as fake tensors ask for their device again and again
            return result
        given = {storage._cdata for storage in _storages((args, kwargs))}
        if func.overloadpacket in flop_registry:
            operations = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            self.operations += operations
            factors = [value for value in args if isinstance(value, Tensor) and value.ndim > 1]  # no biases
            self.backward += operations * sum(factor.requires_grad for factor in factors)
        for storage in _storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key not in given | self._known:  # and else a view
                self._known.add(key)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._remove, key, size)
        return result

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def count_flops(part: Part, depth: int, checkpointing: bool = False, apart: int = 1) -> Flops:
    """Operations of a part with `depth` blocks on one sample; after `apart` blocks, each one costs the same."""

    def of_blocks(blocks: int) -> Flops:
        with torch.device("meta"):
            model = part(blocks, checkpointing)
        with torch.enable_grad(), Count() as count:
            loss = model.step(1)
            flops = Flops(count.operations, count.backward)
            if checkpointing and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
                flops += Flops(recomputed=count.operations - flops.training)
        return flops

    few = max(1, min(apart, depth))
    first = of_blocks(few)
    return first if few == depth else first + (of_blocks(few + 1) + first * -1) * (depth - few)


def count_activations(part: Part, depth: int, numerics: Numerics) -> Activations:
    """Memory that a part with `depth` blocks keeps of one sample."""
    # Autograd counts the devices at its first pass, and the fake mode adds one. It would then start threads, after
    # which no child process could train.
    torch.zeros((), requires_grad=True).backward()  # type: ignore[no-untyped-call]
    with FakeTensorMode():
        (kept, within), (more_kept, more_within) = (_kept(part, blocks, numerics) for blocks in (1, 2))
    block, block_within = more_kept - kept, more_within - within
    kept, within = kept + block * (depth - 1), within + block_within * (depth - 1)
    return Activations(kept, kept - within, block)


def _kept(part: Part, blocks: int, numerics: Numerics) -> tuple[int, int]:
    """Bytes that a third sample adds after a forward pass, all and those that checkpointed blocks would not keep.

    So copies of weights do not count. A single sample may share memory that each of several samples needs.
    """
    model = part(blocks, False)
    fewer, more = (_alive(model, batch, numerics) for batch in BATCHES[1:])
    return more[0] - fewer[0], more[1] - fewer[1]


def _alive(model: Model, batch: int, numerics: Numerics) -> tuple[int, int]:
    """Bytes of the tensors after a forward pass, all and those that are neither inputs nor outputs of blocks."""
    within, inputs = 0, list[Any]()

    def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal within
        within -= count.alive

    def leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal within
        given = {storage._cdata for storage in _storages(args)}
        made = {storage._cdata: storage.nbytes() for storage in _storages(output)}
        within += count.alive - sum(made[key] for key in made.keys() - given)
        if any(value.requires_grad for value in tree_leaves(output) if isinstance(value, Tensor)):
            inputs.append(args)  # as checkpointing keeps them, also those without gradients

    with ExitStack() as stack:
        for block in model.blocks:
            stack.enter_context(block.register_forward_pre_hook(enter))
            stack.enter_context(block.register_forward_hook(leave))
        count = stack.enter_context(Count())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=numerics.autocast))
        loss = model.step(batch)
        return count.alive - loss.nbytes, within


def image_work(call: Callable[[Tensor], object], size: tuple[int, int], image_channels: int = 3) -> tuple[float, float]:
    """(operations, bytes at the peak) of a network on the meta device over one image of (H, W), without gradients."""
    images = torch.empty(1, image_channels, *size, device="meta")
    with torch.no_grad(), Count() as count:
        call(images)
    return float(count.operations), float(count.peak)
