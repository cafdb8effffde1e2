"""The interface of a checkpoint format: a file's metadata, tensor names and shapes <-> our configuration and names.

No tensor is read here; `flextok_pl.models.pretrained` opens the file and builds the model. To add a format, write a
file with a `Format`, and list it in `flextok_pl.interop`.
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
    """A tensor of ours that is made from others: merged, split, transposed, reshaped or constant."""

    names: tuple[str, ...]  # of the file's tensors; empty for a constant
    make: Callable[..., Tensor]  # makes our tensor from them; first called on the `meta` device, to get the shape


@dataclass(frozen=True)
class Contents(Generic[ConfigT]):
    """The contents of a file."""

    config: ConfigT
    source: Callable[[str], str | Made] = lambda name: name  # our tensor's name -> the file's tensor
    ignorable: Callable[[str], bool] = lambda name: False  # accepts tensors of the file that are not used
    doubt: str = ""  # possible cause if the tensors do not fit the configuration


@dataclass(frozen=True)
class Written:
    """The files to write for a model."""

    metadata: dict[str, str]
    tensors: Mapping[str, Tensor]  # by name in the file
    beside: Mapping[str, str] = field(default_factory=dict)  # texts of further files, by name


class Format(ABC, Generic[ConfigT]):
    """A way to store a model in a safetensors file."""

    file_name: str = "model.safetensors"  # name of the file in a folder
    other_names: tuple[str, ...] = ()  # alternative names in a folder, such as that of a run
    companion: str | None = None  # a file beside it that may describe the model
    max_shard_size: str | None = None  # largest file in a folder, if several are read; None for one file

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names that the file may have in a folder, in order of preference."""
        return (self.file_name, *self.other_names)

    @abstractmethod
    def recognises(self, file: TensorFile) -> bool:
        """Check that an open file has this format."""

    @abstractmethod
    def read(self, file: TensorFile, vae_config: Mapping[str, Any] | str | Path | None = None) -> Contents[ConfigT]:
        """Read the contents of an open file of this format; ValueError if it does not describe a model of ours.

        `vae_config` describes an autoencoder that the file does not: diffusers' configuration, or a JSON file with it.
        """

    @abstractmethod
    def write(self, config: ConfigT, weights: Mapping[str, Tensor]) -> Written:
        """Translate configuration and state dict; a ValueError names an option that the format cannot express."""
