"""What a checkpoint format is: a file's metadata and tensor names <-> a configuration and names of ours.

Everything here is plain data; `flextok_pl.models.pretrained` opens the file and builds the model. A further format is
one more file with a `Format` in it, listed in `flextok_pl.interop`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.interop.tensor_file import TensorFile

ConfigT = TypeVar("ConfigT", FlexTokConfig, PriorConfig)


@dataclass(frozen=True)
class Contents(Generic[ConfigT]):
    """What a file holds."""

    config: ConfigT
    name_in_file: Callable[[str], str] = lambda name: name  # from the name in our state dict
    ignorable: Callable[[str], bool] = lambda name: False  # which tensors of the file may be left over
    doubt: str = ""  # what may be wrong where the tensors do not fit the configuration


class Format(ABC, Generic[ConfigT]):
    """One way to keep a model in a safetensors file.

    Attributes:
        file_name: of the file in a folder.
        companion: name of a file beside it that may describe the model.
    """

    file_name: str = "model.safetensors"
    companion: str | None = None

    @abstractmethod
    def recognises(self, file: TensorFile) -> bool:
        """Whether an open file is one of this format."""

    @abstractmethod
    def read(self, file: TensorFile, vae_config: Mapping[str, Any] | str | Path | None = None) -> Contents[ConfigT]:
        """What an open file holds.

        Args:
            file: one that it recognises.
            vae_config: what the user says of an autoencoder that the file does not describe: diffusers' configuration
                or a JSON file of it.

        Raises:
            ValueError: the description is wrong, or not of a model of ours.
        """

    @abstractmethod
    def write(self, config: ConfigT) -> tuple[dict[str, str], Callable[[str], str]]:
        """Metadata that describe a model, and the names of its tensors in the file, by their name in our state dict.

        Raises:
            ValueError: the format cannot express the model.
        """
