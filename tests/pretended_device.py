"""A GPU that is pretended: it keeps its tensors in host memory, and writes down what would wait for it.

On a CPU every tensor is at hand, so that `.item()` and `.to(device)` cost nothing and no test would see them. Here
tensors say that they are on `cuda:0`, compute on the CPU, and mix with host tensors only as those of a GPU may.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
aten: Any = torch.ops.aten

SIZES_FROM_VALUES = (  # a GPU's host must know how many there are, and waits
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten._local_scalar_dense,
)


class Remote(torch.Tensor):
    """A tensor on the device; to C++, which would look for a driver, it is on another that has none."""

    inner: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        outer: Remote = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="lazy",
        )
        outer.inner = inner
        return outer

    def tolist(self) -> Any:
        """By way of the host, which C++ refuses for a class of Python's."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Remote({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside the mode")


class PretendedDevice(TorchDispatchMode):
    """Runs operations on the device, and notes those for which the host would wait while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.waits: list[str] = []
        self.pinned: dict[int, torch.UntypedStorage] = {}  # kept, or a pageable one could take its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        remote = [value for value in leaves if isinstance(value, Remote)]
        local = [value for value in leaves if not isinstance(value, Remote)]
        asked = kwargs.get("device")
        target = bool(remote) if asked is None else torch.device(asked).type in (DEVICE.type, "lazy")
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.copy_):
            self._note_copy(func, args, kwargs, target)
        elif packet is aten._pin_memory or kwargs.pop("pin_memory", False):
            assert not remote
            result = args[0].clone() if packet is aten._pin_memory else func(*args, **kwargs)
            storage = result.untyped_storage()
            self.pinned[storage.data_ptr()] = storage
            return result
        elif remote:
            self._note_wait(func, args, kwargs)
            assert all(value.ndim == 0 for value in local), f"{func} of tensors on host and device"
        if asked is not None:
            kwargs["device"] = torch.device("cpu") if target else torch.device(asked)
        kwargs.pop("non_blocking", None) if packet is aten._to_copy else None
        inner_args, inner_kwargs = tree_map(lambda v: v.inner if isinstance(v, Remote) else v, (args, kwargs))
        result = func(*inner_args, **inner_kwargs)
        if packet is aten._to_copy and any(result is value for value in tree_leaves(inner_args)):
            result = result.clone()
        if not target and not remote:
            return result
        if target:
            result = tree_map(lambda v: Remote(v) if isinstance(v, Tensor) else v, result)
        return return_and_correct_aliasing(func, args, kwargs, result)

    def _note_copy(self, func: Any, args: Any, kwargs: Mapping[str, Any], target: bool) -> None:
        if func.overloadpacket is aten.copy_:
            target, source = isinstance(args[0], Remote), args[1]
            at_once = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            here = args[0] if not target else source
        else:
            source, here = args[0], args[0]
            at_once = not kwargs.get("non_blocking") or not target  # what is not pinned is copied at once
        if isinstance(source, Remote) == target or (target and source.ndim == 0 and func.overloadpacket is aten.copy_):
            return
        if at_once or here.untyped_storage().data_ptr() not in self.pinned:
            self._note(f"{func} {'to' if target else 'from'} the device")

    def _note_wait(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        packet = func.overloadpacket
        masks = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        fills = masks and packet is not aten.index and args[2].numel() == 1
        repeats = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        if packet in SIZES_FROM_VALUES or (masks and not fills) or repeats:
            self._note(str(func))

    def _note(self, what: str) -> None:
        if self.watching:
            stack = traceback.extract_stack()
            frames = [f for place in ("/flextok_pl/", "/lightning/", "") for f in stack[::-1] if place in f.filename]
            self.waits.append(f"{what} in {frames[0].filename}:{frames[0].lineno}")


class _MakesTensors(TorchFunctionMode):
    """Lets tensors of Python's numbers be made on the host and sent, as C++ does where it finds a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Remote):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        return func(*args, **kwargs)


class _Event:
    """A `torch.cuda.Event` of a device that is never behind."""

    def record(self) -> None:
        """Nothing."""

    synchronize = record


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    """Let `cuda:0` be there."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    with PretendedDevice() as mode, _MakesTensors():
        yield mode
