"""Load and save models in the formats of `flextok_pl.interop`.

Names and shapes are compared with the configuration before any weight is read. Each tensor is then copied once, from
the mapped file to its place, so peak memory is one copy of the weights. Weights become float32, as in the official
loader.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from flextok_pl.downloads import Download, HubRepository
from flextok_pl.interop.format import ConfigT, Contents, Format, Made
from flextok_pl.interop.hub import HubId, commit_of
from flextok_pl.interop.tensor_file import TensorFile, files_of, find_file, open_tensors, write_tensors
from flextok_pl.models.publishing import Publishable

ModelT = TypeVar("ModelT", bound="PretrainedModel")

_SHOWN = 5
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class PretrainedModel(Publishable):
    """Base of models that load and save in the formats of `flextok_pl.interop`."""

    formats: ClassVar[Mapping[str, Format[Any]]]

    def file_names(self) -> list[str]:
        """Names that the model's file may have in a folder, in order of preference."""
        return _file_names(self.formats)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, device: str | torch.device | None = None) -> Self:
        """Load a model saved by this package or in a published format, in evaluation mode and float32.

        Args:
            path_or_hub_id: a `.safetensors` file, a folder with one or with an index of several, or a Hub id
                `OWNER/NAME` or `OWNER/NAME@REVISION`; a local file or folder comes first.
            device: where to put the weights.

        Raises:
            ValueError: the file is missing or damaged, or its model is not supported.
        """
        return load_model(path_or_hub_id, cls.formats, cls, device)

    def save_pretrained(
        self,
        path: str | Path,
        format: str = "ours",
        weights: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str | None = None,
    ) -> Path:
        """Save configuration and weights, with a tokenizer's autoencoder, as safetensors; returns the file.

        The write is atomic: an old file stays whole until the new one is complete.

        Args:
            path: a `.safetensors` file or a folder. A folder gets `model.safetensors`, or `prior.safetensors` for a
                prior in our format.
            format: `ours`; `official` for the published code of tokenizers, `flexar` for that of priors.
            weights: the state dict, if the model itself holds only parts of it.
            max_shard_size: largest file in a folder, in bytes or such as `5GB`. A larger model becomes several files
                and an index, which is returned and written last. Default 5 GB for our format, and one file for the
                published ones, whose code reads no other.

        Raises:
            ValueError: the format cannot express the model, or the size is invalid.
        """
        return save_model(self.weights_to_save(weights), self.config, path, self.formats, format, max_shard_size)

    def save_to_publish(self, folder: Path, format: str, max_shard_size: int | str | None) -> Path:
        """Save the model in a folder."""
        return self.save_pretrained(folder, format, max_shard_size=max_shard_size)


def model_downloads(path_or_hub_id: str | Path, formats: Mapping[str, Format[Any]]) -> list[Download]:
    """The downloads of `load_model`."""
    if Path(path_or_hub_id).expanduser().exists() or str(path_or_hub_id).endswith(".safetensors"):
        return []
    names = _file_names(formats)
    companions = [each.companion for each in formats.values() if each.companion]
    shards = [f"{name.removesuffix('.safetensors')}-*.safetensors" for name in names]
    beside = [(each,) for each in (*companions, *(f"{name}.index.json" for name in names))]
    repository, _, revision = str(path_or_hub_id).partition("@")
    return [HubRepository(repository, ((*names, *shards), *beside), revision or None)]


def load_model(
    path_or_hub_id: str | Path,
    formats: Mapping[str, Format[ConfigT]],
    make: type[ModelT],
    device: str | torch.device | None = None,
    vae_config: Mapping[str, Any] | str | Path | None = None,
) -> ModelT:
    """Load a model of class `make`, in evaluation mode, from a local file or folder, or else from the Hub.

    Raises ValueError if the file is missing or damaged, has another format, or does not fit its configuration.
    """
    companions = dict.fromkeys(each.companion for each in formats.values() if each.companion)
    path, beside = find_file(path_or_hub_id, _file_names(formats), list(companions))
    with open_tensors(path, beside) as file:
        format_ = next((each for each in formats.values() if each.recognises(file)), None)
        if format_ is None:
            lacking = "".join(f", and there is no {name} beside it" for name in companions)
            raise ValueError(
                f"{path} is not a {make.__name__} checkpoint: its metadata (keys: {sorted(file.metadata)[:8]}) do not "
                f"describe one{lacking}; give a file that {make.__name__}.save_pretrained has written"
            )
        try:
            contents = format_.read(file, vae_config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        model = _build(file, contents, make, device)
    source, commit = HubId.parse(str(path_or_hub_id)), commit_of(path)
    if source is not None and commit is not None:
        model.loaded_from = str(HubId(source.repository, commit))
    return model


def kind_of(path_or_hub_id: str | Path, *kinds: type[ModelT]) -> tuple[type[ModelT], Path]:
    """The class of a file, folder or Hub id among these, and its file; ValueError for none of them."""
    names = dict.fromkeys(chain.from_iterable(_file_names(each.formats) for each in kinds))
    formats = [(kind, each) for kind in kinds for each in kind.formats.values()]
    companions = [each.companion for _, each in formats if each.companion]
    path, beside = find_file(path_or_hub_id, list(names), companions)
    with open_tensors(path, beside) as file:
        found = next((kind for kind, each in formats if each.recognises(file)), None)
    if found is None:
        raise ValueError(f"the metadata of {path} describe none of {', '.join(kind.__name__ for kind in kinds)}")
    return found, path


def save_model(
    weights: Mapping[str, Tensor],
    config: ConfigT,
    path: str | Path,
    formats: Mapping[str, Format[ConfigT]],
    name: str,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write a state dict and its configuration to a `.safetensors` file or a folder, atomically; returns the file."""
    if name not in formats:
        raise ValueError(f"format={name!r} is unknown; use one of {list(formats)}")
    path = Path(path).expanduser()
    file, most = path, max_shard_size
    if path.suffix != ".safetensors":
        file = path / formats[name].file_name
        most = formats[name].max_shard_size if max_shard_size is None else max_shard_size
    elif max_shard_size is not None:
        raise ValueError(f"max_shard_size={max_shard_size!r} makes several files: give a folder, not {path}")
    written = formats[name].write(config, weights)
    if written.beside and file.name != formats[name].file_name:
        raise ValueError(f"format={name!r} writes files beside {formats[name].file_name}: give a folder, not {path}")
    for beside in written.beside:
        if file.with_name(beside).exists() and not any(map(Path.exists, files_of(file))):
            raise ValueError(f"{file.with_name(beside)} is there and belongs to something else: give another folder")
    return write_tensors(written.tensors, file, written.metadata, most, written.beside)


def _file_names(formats: Mapping[str, Format[Any]]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(each.file_names for each in formats.values())))


def _build(
    file: TensorFile,
    contents: Contents[ConfigT],
    make: type[ModelT],
    device: str | torch.device | None,
) -> ModelT:
    # A file's number of tensors bounds the depth; a larger one would keep the constructor busy for hours.
    for name, depth in _depths(dataclasses.asdict(contents.config)):
        if depth > len(file.shapes):
            raise ValueError(f"{file.path} has {len(file.shapes)} tensors, too few for {name}={depth}")
    try:
        with torch.device("meta"):
            model = make(contents.config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{file.path}: its configuration does not describe a model: {error}") from error
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
        warnings.warn(f"{file.path}: the model does not use {_some(left_out)}", stacklevel=4)
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
    """Describe wrong shapes among the file's tensors for one of ours; None where one is missing."""
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
