"""Our checkpoint format: the state dict under its own names, and the configuration as JSON in the metadata."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flextok_pl.config import config_from_dict
from flextok_pl.interop.format import ConfigT, Contents, Format, Written
from flextok_pl.interop.tensor_file import TensorFile

VERSION = "1"
_MAX_CONFIG_CHARACTERS = 100_000


class Native(Format[ConfigT]):
    """Our format for one kind of model."""

    max_shard_size = "5GB"

    def __init__(self, kind: str, file_name: str, config_type: type[ConfigT], *other_names: str) -> None:
        self.kind, self.file_name, self.other_names = kind, file_name, other_names
        self.config_type: type[ConfigT] = config_type

    def recognises(self, file: TensorFile) -> bool:
        """Check the metadata for this kind of model."""
        return file.metadata.get("format") == self.kind

    def read(self, file: TensorFile, vae_config: Mapping[str, Any] | str | Path | None = None) -> Contents[ConfigT]:
        """Read the configuration, which includes the autoencoder's."""
        if vae_config is not None:
            raise ValueError("the file describes its own autoencoder; vae_config is for official checkpoints")
        version, text = file.metadata.get("version"), file.metadata.get("config", "")
        if version != VERSION:
            raise ValueError(f"it has format version {version!r}; this flextok_pl reads version {VERSION!r}")
        if len(text) > _MAX_CONFIG_CHARACTERS:
            raise ValueError(f"its configuration of {len(text)} characters is too long")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"its configuration is a {type(values).__name__} instead of a mapping")
        try:
            return Contents(config_from_dict(self.config_type, values))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"its configuration is wrong: {error}") from error

    def write(self, config: ConfigT, weights: Mapping[str, Tensor]) -> Written:
        """Write the configuration and our own names."""
        text = json.dumps(dataclasses.asdict(config))
        return Written({"format": self.kind, "version": VERSION, "config": text}, weights)
