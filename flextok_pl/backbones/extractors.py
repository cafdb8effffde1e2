"""Networks whose features a distance compares.

`inception-v3-compat`, `dinov2-*` and `clip-*` are torch-fidelity's (https://github.com/toshas/torch-fidelity), with its
TensorFlow-compatible resize. `effnet-lite0` and `effnet-lite2` need no download: packages carry their ImageNet weights.
A distance on these ranks models, but is not an FID.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.backbones.networks import efficientnet_lite
from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained
from flextok_pl.channels import as_rgb
from flextok_pl.downloads import Download, Places, TorchHubCode, UrlFile
from flextok_pl.parts import in_parts

OFFLINE_EXTRACTOR = "effnet-lite0"
INCEPTION = "inception-v3-compat"
EXTRACTORS = (
    OFFLINE_EXTRACTOR,
    "effnet-lite2",
    INCEPTION,
    *(f"dinov2-vit-{size}-14" for size in "sblg"),
    *(f"clip-{net}" for net in ("rn50", "rn101", "vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336px")),
)

OPTIONS = ("extractor", "weights")
"""The options that name the network and its weights file, for errors."""

DINOV2_CODE, DINOV2_URL = "facebookresearch/dinov2", "https://dl.fbaipublicfiles.com/dinov2"
"""The repository that torch-fidelity runs, and the place where it looks for weights."""

EFFNET_SIZE = 128  # its fixed "same" padding needs a multiple of 32; 224 costs three times as much


class FeatureExtractor(MeasuringNetwork):
    """One of `EXTRACTORS`, made by `build_extractor`.

    `features` takes the network and (B, 3, H, W) uint8 images on its device, and returns (B, D). `resize` describes the
    resize to the network's size, for records. `metric_name` and `kernel_metric_name` are the names of the Frechet and
    the kernel distance on these features.
    """

    def __init__(self, name: str, network: Any, features: Callable[[Any, Tensor], Tensor], resize: str) -> None:
        super().__init__(name, network)
        self.network.to(memory_format=torch.channels_last)  # 1.4x as fast on a CPU
        self.resize, self._features = resize, features
        self.metric_name, self.kernel_metric_name = f"fd_{name.replace('-', '_')}", f"kd_{name.replace('-', '_')}"
        if name == INCEPTION:
            self.metric_name, self.kernel_metric_name = "frechet_inception_distance", "kernel_inception_distance"
        self.dim: int = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]  # D

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or grey (B, 1, H, W) -> (B, D) float32 on the network's device."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; give uint8 (B, 3, H, W)")
        images = as_rgb(images, f"extractor={self.name!r}")
        with self.measuring():
            return in_parts(partial(self._features, self.network), images.to(self.device))

    def class_logits(self, features: Tensor) -> Tensor | None:
        """Inception's (B, D) -> (B, C) without the bias, for TensorFlow's inception score; None for other networks."""
        if self.name != INCEPTION:
            return None
        with self.measuring():
            logits: Tensor = features.to(self.device) @ self.network.get_parameter("fc.weight").T
        return logits


def build_extractor(
    name: str, weights: Path | str | None = None, options: tuple[str, str] = OPTIONS
) -> FeatureExtractor:
    """Build an extractor on the CPU; without a local file, with the weights of its package or torch-fidelity."""
    source = check_extractor(name, weights, options)
    if name.startswith("effnet-"):
        network, resize = efficientnet_lite(source), f"bilinear antialiased {EFFNET_SIZE}"
        return FeatureExtractor(name, network, _pooled_features, resize)
    network = _torch_fidelity_network(source)
    return FeatureExtractor(name, network, lambda net, images: net(images)[0], "torch-fidelity, TensorFlow-1 bilinear")


def check_extractor(name: str, weights: Path | str | None = None, options: tuple[str, str] = OPTIONS) -> Pretrained:
    """Raise ValueError for an unknown extractor or a missing weights file, without loading anything."""
    option, weights_option = options
    if name not in EXTRACTORS:
        raise ValueError(f"{option}={name!r} is unknown; use one of {', '.join(EXTRACTORS)}")
    return Pretrained(option, name, weights, weights_option)


def extractor_downloads(name: str) -> list[Download]:
    """The downloads of `build_extractor` without a weights file: those that torch-fidelity looks for."""
    check_extractor(name)
    if name == INCEPTION:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        return [UrlFile(URL_INCEPTION_V3)]
    if name.startswith("clip-"):
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

        return [UrlFile(MODEL_URLS[name], f"{name}-{MODEL_METADATA[name]['hash']}.pt")]
    if name.startswith("dinov2-"):
        from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA as DINOV2

        return [TorchHubCode(DINOV2_CODE), UrlFile(f"{DINOV2_URL}/{DINOV2[name]}/{DINOV2[name]}_pretrain.pth")]
    return []


def _pooled_features(network: Any, images: Tensor) -> Tensor:
    """EfficientNet-Lite's pooled features: (B, 3, H, W) uint8 -> (B, 1280)."""
    x = F.interpolate(images.float(), size=(EFFNET_SIZE, EFFNET_SIZE), mode="bilinear", antialias=True)
    maps: Tensor = network.extract_features((x - 127) / 128)  # (B, 1280, 4, 4)
    return maps.mean((2, 3))


def _torch_fidelity_network(source: Pretrained) -> Any:
    """A torch-fidelity network, at the layer that torch-fidelity uses for FID."""
    name, path = source.name, source.weights
    if name.startswith("dinov2") and path is not None:
        raise ValueError(
            f"{source.weights_option}={str(path)!r}: torch-fidelity reads {name} from torch.hub's folder only; set "
            "TORCH_HOME to a folder that holds hub/facebookresearch_dinov2_main and hub/checkpoints, and leave "
            f"{source.weights_option} out"
        )
    with source.loading(
        f"download its weights on a machine with a network and give the file as {source.weights_option}=PATH, or use "
        f"{source.option}={OFFLINE_EXTRACTOR!r}"
    ):
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        if path is None:
            for download in extractor_downloads(name):
                download.fetch(Places.usual())
        elif name.startswith("clip"):
            _check_is_published(name, path)
        else:
            source.state_dict(path)  # refuses code; torch-fidelity's own loader would run it
        network_class = FEATURE_EXTRACTORS_REGISTRY[name]
        layer = network_class.get_default_feature_layer_for_metric("fid")
        return network_class(name, [layer], feature_extractor_weights_path=None if path is None else str(path))


def _check_is_published(name: str, path: Path | str) -> None:
    """Refuse all files except OpenAI's own for a CLIP network: they are TorchScript, programs that run when loaded."""
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MODEL_METADATA[name]["hash"]:
        raise ValueError(
            f"it is not the file that OpenAI published for {name}: its SHA-256 begins with {found[:16]}, not "
            f"{MODEL_METADATA[name]['hash'][:16]}. Such a file is a program and not only tensors, so no other is "
            f"loaded; fetch {MODEL_URLS[name]}"
        )
