"""Safetensors files: opened as data, read tensor by tensor into a model, written atomically."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flextok_pl.files import whole_file
from flextok_pl.progress import announced

ModelT = TypeVar("ModelT", bound=nn.Module)

_SHOWN = 5
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """A memory-mapped safetensors file; only its header is read.

    Raises:
        ValueError: there is no such file, or it is damaged or of another format.
    """
    if not file.is_file():
        raise ValueError(f"no checkpoint file {str(file)!r}")
    try:
        opened = safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no intact safetensors file: {error}") from error
    with opened as handle, announced(f"reading {file}"):
        yield handle


def build_model(
    handle: Any,
    file: Path,
    make: Callable[[], ModelT],
    depths: Mapping[str, int],
    name_in_file: Callable[[str], str] = lambda name: name,
    ignorable: Callable[[str], bool] = lambda name: False,
    device: str | torch.device | None = None,
) -> ModelT:
    """A model with the weights of an open file, in evaluation mode.

    Names and shapes are compared with the configuration before any weight is read. Each tensor is then copied once,
    from the mapped file to its place, so the peak is one copy of the weights. They become float32, as in the official
    loader.

    Args:
        handle: from `open_tensors`.
        file: its path, for messages.
        make: builds what the file should hold, without weights.
        depths: the configuration's numbers of layers, by option.
        name_in_file: from a name in our state dict to the name in the file.
        ignorable: tells which tensors of the file may be left over.
        device: where to put the weights.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape or type than the configuration says.
    """
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118  not a dict
    # A depth that no file of this size can have would keep the constructor busy for hours.
    if max(depths.values()) > len(shapes):
        stated = " and ".join(f"{name}={depth}" for name, depth in depths.items())
        raise ValueError(f"{file} has {len(shapes)} tensors, too few for {stated}")
    try:
        with torch.device("meta"):
            model = make()
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{file}: its configuration describes no model: {error}") from error
    expected = {name_in_file(name): (name, tensor) for name, tensor in model.state_dict().items()}
    problems = _differences({name: tuple(tensor.shape) for name, (_, tensor) in expected.items()}, shapes, ignorable)
    types = {name: handle.get_slice(name).get_dtype() for name in expected if name in shapes}
    problems += [f"not floating point: {name} {kind}" for name, kind in types.items() if kind not in _FLOATS][:_SHOWN]
    if problems:
        raise ValueError(f"{file} does not fit its configuration: " + "; ".join(problems))
    left_out = [name for name in shapes if name not in expected]
    if left_out:
        warnings.warn(f"{file}: the model leaves out {', '.join(left_out[:_SHOWN])}", stacklevel=2)
    weights = {
        ours: handle.get_tensor(theirs).to(device=device or "cpu", dtype=torch.float32, copy=True)
        for theirs, (ours, _) in expected.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then move it to its own: a reader never sees half of it.

    Raises:
        OSError: the folder or the disk does not take it; what was there before stays.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(file, shared=True) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {file}: {error}") from error


def _differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], ignorable: Callable[[str], bool]
) -> list[str]:
    """One phrase per kind of difference, naming the first few tensors."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and not ignorable(name)]
    misshaped = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    phrases = []
    for label, names in (("missing tensors", missing), ("unexpected tensors", extra), ("wrong shapes", misshaped)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            phrases.append(f"{label}: {', '.join(names[:_SHOWN])}{more}")
    return phrases
