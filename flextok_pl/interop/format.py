"""What a checkpoint format is: a file's metadata, tensor names and shapes <-> a configuration and names of ours.

No tensor is read here; `flextok_pl.models.pretrained` opens the file and builds the model. A further format is one more
file with a `Format` in it, listed in `flextok_pl.interop`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.interop.tensor_file import TensorFile

ConfigT = TypeVar("ConfigT", FlexTokConfig, PriorConfig)


@dataclass(frozen=True)
class Made:
    """A tensor of ours that is not simply one of the file: merged, split, transposed, reshaped or constant."""

    names: tuple[str, ...]  # of the file's tensors; none for a constant
    make: Callable[..., Tensor]  # makes ours of them; first called on the `meta` device, to learn the shape


@dataclass(frozen=True)
class Contents(Generic[ConfigT]):
    """What a file holds."""

    config: ConfigT
    source: Callable[[str], str | Made] = lambda name: name  # what one of our state dict is in the file
    ignorable: Callable[[str], bool] = lambda name: False  # which tensors of the file may be left over
    doubt: str = ""  # what may be wrong where the tensors do not fit the configuration


@dataclass(frozen=True)
class Written:
    """What is written of a model."""

    metadata: dict[str, str]
    tensors: Mapping[str, Tensor]  # by their names in the file
    beside: Mapping[str, str] = field(default_factory=dict)  # texts of files beside it, by name


class Format(ABC, Generic[ConfigT]):
    """One way to keep a model in a safetensors file."""

    file_name: str = "model.safetensors"  # in a folder
    other_names: tuple[str, ...] = ()  # under which a folder may hold it instead, such as that of a run
    companion: str | None = None  # a file beside it that may describe the model
    max_shard_size: str | None = None  # of a file in a folder, where more than one is read; None for one file

    @property
    def file_names(self) -> tuple[str, ...]:
        """Those that a folder may have, in order of preference."""
        return (self.file_name, *self.other_names)

    @abstractmethod
    def recognises(self, file: TensorFile) -> bool:
        """Whether an open file is one of this format."""

    @abstractmethod
    def read(self, file: TensorFile, vae_config: Mapping[str, Any] | str | Path | None = None) -> Contents[ConfigT]:
        """What an open file of this format holds; ValueError where it describes no model of ours.

        `vae_config` describes an autoencoder that the file does not: diffusers' configuration or a JSON file of it.
        """

    @abstractmethod
    def write(self, config: ConfigT, weights: Mapping[str, Tensor]) -> Written:
        """A model by its configuration and state dict; ValueError, which names the option, for what cannot be said."""
