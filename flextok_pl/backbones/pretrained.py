"""Find, load and use a pretrained network.

Its weights come from a local file, from a package that carries them, or from a download (torch.hub or the Hugging Face
Hub). A local file is read as tensors, so it cannot run code. Anything missing raises one `ValueError` with the option,
its value and a remedy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from flextok_pl.contracts import weights_hash
from flextok_pl.downloads import HubRepository
from flextok_pl.precision import full_precision


@dataclass(frozen=True)
class Pretrained:
    """A pretrained network that a user's options name."""

    option: str  # the option's name, such as `teacher`
    name: str  # the option's value, such as `effnet-lite2`
    weights: Path | str | None = None  # a local file; None uses a package's weights or downloads them
    weights_option: str = "weights"  # the option for this file, such as `teacher_weights`

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        object.__setattr__(self, "weights", Path(self.weights).expanduser())
        if not Path(self.weights).is_file():
            raise ValueError(
                f"{self.weights_option}={str(self.weights)!r} is not a file; give the weights of {self.name}, or leave "
                "it out"
            )

    @contextmanager
    def loading(self, remedy: str, install: str = "pip install 'flextok_pl[demo]'") -> Iterator[None]:
        """Turn all errors of a library that loads the network into one ValueError.

        Its remedy is `remedy` for missing or wrong weights, or the command that installs a missing package.
        """
        given = "" if self.weights is None else f", {self.weights_option}={str(self.weights)!r}"
        try:
            yield
        except ImportError as error:
            raise ValueError(f"{self.option}={self.name!r} needs the package {error.name}: {install}") from error
        except Exception as error:  # torch, timm, the Hub and the network each have their own kinds
            reason = " ".join(str(error).split())[:400]
            raise ValueError(
                f"{self.option}={self.name!r}{given} cannot be loaded ({type(error).__name__}: {reason}); {remedy}"
            ) from error

    def state_dict(self, packaged: Path | str) -> dict[str, Tensor]:
        """The tensors of the local file, or of one that a package carries."""
        state: Any = torch.load(self.weights or packaged, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"the file holds a {type(state).__name__}, not a state dict")
        return state


def transformers_files(repository: str) -> HubRepository:
    """The files that a `transformers` model and its tokenizer or processor download."""
    weights = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
    return HubRepository(repository, (weights, ("*.json",), ("*.model",), ("*.txt",), ("*.jinja",)))


class MeasuringNetwork:
    """A pretrained network that measures images: frozen in place, on the CPU at first, always in full precision."""

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name = name
        self.network: Any = network.eval().requires_grad_(False)
        self.weights_hash = weights_hash(network)  # for records
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self.network.to(device)
        self.device = torch.device(device)
        return self

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Run the network without gradients, autocast and TF32."""
        with torch.no_grad(), full_precision(self.device):
            yield
