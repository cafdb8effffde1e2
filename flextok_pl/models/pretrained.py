"""Load and save models: a format of `flextok_pl.interop` says what a file holds, and the model is built from it here.

Names and shapes are compared with the configuration before any weight is read. Each tensor is then copied once, from
the mapped file to its place, so the peak is one copy of the weights. They become float32, as in the official loader.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flextok_pl.files import write_file
from flextok_pl.interop.format import ConfigT, Contents, Format, Made
from flextok_pl.interop.tensor_file import TensorFile, find_file, open_tensors, write_tensors

ModelT = TypeVar("ModelT", bound=nn.Module)

_SHOWN = 5
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def load_model(
    path_or_hub_id: str | Path,
    formats: Mapping[str, Format[ConfigT]],
    make: type[ModelT],
    device: str | torch.device | None = None,
    vae_config: Mapping[str, Any] | str | Path | None = None,
) -> ModelT:
    """A model of class `make`, in evaluation mode, from a file or folder on this machine, or else from the Hub.

    ValueError where there is no such file, or it is damaged, has another format, or does not fit its configuration.
    """
    names = dict.fromkeys(chain.from_iterable(each.file_names for each in formats.values()))
    companions = dict.fromkeys(each.companion for each in formats.values() if each.companion)
    path, beside = find_file(path_or_hub_id, list(names), list(companions))
    with open_tensors(path, beside) as file:
        format_ = next((each for each in formats.values() if each.recognises(file)), None)
        if format_ is None:
            lacking = "".join(f", and there is no {name} beside it" for name in companions)
            raise ValueError(
                f"{path} is no {make.__name__} checkpoint: its metadata (keys: {sorted(file.metadata)[:8]}) do not "
                f"tell the model{lacking}; give a file that {make.__name__}.save_pretrained has written"
            )
        try:
            contents = format_.read(file, vae_config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return _build(file, contents, make, device)


def save_model(
    weights: Mapping[str, Tensor], config: ConfigT, path: str | Path, formats: Mapping[str, Format[ConfigT]], name: str
) -> Path:
    """Write a state dict and its configuration to a `.safetensors` file or a folder, atomically; returns the file."""
    if name not in formats:
        raise ValueError(f"format={name!r} is unknown; use one of {list(formats)}")
    path = Path(path).expanduser()
    file = path if path.suffix == ".safetensors" else path / formats[name].file_name
    written = formats[name].write(config, weights)
    if written.beside and file.name != formats[name].file_name:
        raise ValueError(f"format={name!r} writes files beside {formats[name].file_name}: give a folder, not {path}")
    for beside, text in written.beside.items():
        if file.with_name(beside).exists() and not file.exists():
            raise ValueError(f"{file.with_name(beside)} is there and belongs to something else: give another folder")
        write_file(file.with_name(beside), text)
    write_tensors(written.tensors, file, written.metadata)
    return file


def _build(
    file: TensorFile,
    contents: Contents[ConfigT],
    make: type[ModelT],
    device: str | torch.device | None,
) -> ModelT:
    # A depth that no file of this size can have would keep the constructor busy for hours.
    for name, depth in _depths(dataclasses.asdict(contents.config)):
        if depth > len(file.shapes):
            raise ValueError(f"{file.path} has {len(file.shapes)} tensors, too few for {name}={depth}")
    try:
        with torch.device("meta"):
            model = make(contents.config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{file.path}: its configuration describes no model: {error}") from error
    wanted = {ours: tuple(tensor.shape) for ours, tensor in model.state_dict().items()}
    sources = {ours: contents.source(ours) for ours in wanted}
    made = {ours: Made((each,), _as_it_is) if isinstance(each, str) else each for ours, each in sources.items()}
    used = dict.fromkeys(name for each in made.values() for name in each.names)
    left_out = [name for name in file.shapes if name not in used]
    problems = {
        "missing tensors": [name for name in used if name not in file.shapes],
        "unexpected tensors": [name for name in left_out if not contents.ignorable(name)],
        "wrong shapes": [wrong for ours, shape in wanted.items() if (wrong := _wrong_shape(file, made[ours], shape))],
        "not floating point": [
            f"{name} {file.types[name]}" for name in used if file.types.get(name, "F32") not in _FLOATS
        ],
    }
    if any(problems.values()):
        phrases = [f"{problem}: {_some(found)}" for problem, found in problems.items() if found]
        raise ValueError(f"{file.path} does not fit its configuration: {'; '.join(phrases)}{contents.doubt}")
    if left_out:
        warnings.warn(f"{file.path}: the model leaves out {_some(left_out)}", stacklevel=4)
    weights = {
        ours: each.make(*map(file.handle.get_tensor, each.names)).to(
            device or "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
        )
        for ours, each in made.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.to(device or "cpu").eval()  # its buffers


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _wrong_shape(file: TensorFile, made: Made, wanted: tuple[int, ...]) -> str | None:
    """What is wrong with the shapes of those that a tensor of ours is made of; None where one is missing."""
    if any(name not in file.shapes for name in made.names):
        return None
    found = [list(file.shapes[name]) for name in made.names]
    try:
        shape = made.make(*(torch.empty(each, device="meta") for each in found)).shape
    except (ValueError, IndexError, RuntimeError):
        shape = None
    if shape == wanted:
        return None
    said = " and ".join(f"{name} is {each}" for name, each in zip(made.names, found, strict=True))
    return f"{said} instead of {list(wanted)}" if made.make is _as_it_is else f"{said}, which make no {list(wanted)}"


def _depths(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of layers in a configuration, by option."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _depths(value)
        elif name.endswith("depth") or name == "layers_per_block":
            yield name, value


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
