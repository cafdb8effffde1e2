"""Classifiers that judge generated images: a probe fitted to the data's own labels, or an ImageNet model.

B images, N samples, D features, C classes.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Protocol
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.contracts import weights_hash
from flextok_pl.precision import full_precision


class Classifier(Protocol):
    """What class scores need.

    Attributes:
        name: part of the metrics' names.
        num_classes: C.
    """

    name: str
    num_classes: int

    def probabilities(self, images: Tensor, features: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 and the extractor's (B, D) of the same images -> (B, C) float32."""


class LinearProbe:
    """Multinomial logistic regression on standardised features, and the class means of the same features.

    Args:
        name: `probe_` and the extractor's name.
        mean: (D,) float64, of all real features.
        scale: (D,) float64, their standard deviation.
        weight: (C, D) float64.
        bias: (C,) float64.
        class_means: (C, D) float64, less `mean`.
    """

    def __init__(
        self, name: str, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, class_means: Tensor
    ) -> None:
        self.name = name
        self.num_classes = len(bias)
        self._state = {"mean": mean, "scale": scale, "weight": weight, "bias": bias, "class_means": class_means}

    @classmethod
    @torch.inference_mode(False)
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        extractor: str,
        l2: float = 0.1,
        balanced: bool = True,
        max_iterations: int = 200,
    ) -> LinearProbe:
        """The minimum of mean cross-entropy + l2 / 2 |weight|^2, which is unique, by L-BFGS in float64.

        Args:
            features: (N, D) of real images.
            labels: (N,) int64 in 0..C-1; samples with -1 count for the mean and the scale only.
            num_classes: C.
            extractor: the name of the features' extractor.
            l2: strength of the penalty; needed, since more features than samples can be separated perfectly.
            balanced: let all classes weigh the same, however many samples they have.
            max_iterations: of L-BFGS.

        Raises:
            ValueError: a label out of range, a class without samples, or `l2` not positive.
        """
        if l2 <= 0:
            raise ValueError(f"l2={l2} must be positive")
        if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"labels span {int(labels.min())}..{int(labels.max())}, outside num_classes={num_classes}")
        labels, rows = labels.cpu().clone(), features.detach().cpu().double()  # clone: not of inference mode
        counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
        if (counts == 0).any():
            raise ValueError(
                f"classes {(counts == 0).nonzero().flatten().tolist()} of num_classes={num_classes} have no samples; "
                "fit on more samples, or merge the classes"
            )
        mean = rows.mean(0)
        centred = rows - mean
        scale = centred.square().mean(0).sqrt()
        scale[scale == 0] = 1
        centred, labels = centred[labels >= 0], labels[labels >= 0]
        class_means = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64).index_add_(0, labels, centred)
        class_means /= counts[:, None]
        inputs = centred / scale
        class_weights = 1 / counts.to(rows.dtype) if balanced else None
        weight = torch.zeros_like(class_means, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=max_iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            entropy = F.cross_entropy(F.linear(inputs, weight, bias), labels, class_weights)
            value = entropy + l2 / 2 * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        name = f"probe_{extractor.replace('-', '_')}"
        return cls(name, mean, scale, weight.detach(), bias.detach(), class_means)

    def probabilities(self, images: Tensor, features: Tensor) -> Tensor:
        """(B, C) float32 on the CPU; the images are not looked at."""
        state = self._state
        logits = F.linear(self._centred(features) / state["scale"], state["weight"], state["bias"])
        return logits.softmax(1).float()

    def nearest_class(self, features: Tensor) -> Tensor:
        """The class whose mean has the largest cosine with each feature vector, both less the mean of all real ones.

        Args:
            features: (B, D).

        Returns:
            (B,) int64 on the CPU.
        """
        means = F.normalize(self._state["class_means"])
        return F.linear(self._centred(features), means).argmax(1)  # a row's own length changes no decision

    def state_dict(self) -> dict[str, Any]:
        """The name and tensors that `from_state_dict` takes."""
        return {"name": self.name, **self._state}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> LinearProbe:
        """The probe that `state_dict` described."""
        return cls(**state)

    def _centred(self, features: Tensor) -> Tensor:
        return features.detach().cpu().double() - self._state["mean"]


class TimmClassifier:
    """A model of timm with its own preprocessing; its classes are in ImageNet's order if it was trained on that.

    The model moves to where the images are, and runs in full precision whatever the caller has set.

    Args:
        name: as `timm.list_models()` has it, with or without a tag.
        weights: a local file for it (`.safetensors` or PyTorch's); None lets timm find or download its own.

    Raises:
        ValueError: unknown model, or weights that cannot be had or do not fit.
    """

    def __init__(self, name: str, weights: Path | str | None = None) -> None:
        import timm

        if not timm.is_model(name):
            raise ValueError(
                f"classifier={name!r} is no model of timm; choose one of timm.list_models(pretrained=True)"
            )
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"weights={str(weights)!r} is not a file; give the classifier's weights, or leave it out")
        # A state dict, even where timm's own file is NumPy's; timm before 1.0.31 has to be told.
        source = None if weights is None else {"file": str(weights), "custom_load": False}
        try:
            network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)
        except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"classifier={name!r}, weights={weights and str(weights)!r}: the weights could not be read "
                f"({str(error)[:200]}); download this model's weights where there is a network and give the file"
            ) from error
        self.name = name.replace(".", "_")
        self.network = network.eval().requires_grad_(False)
        self.weights_hash = weights_hash(network)
        self.num_classes: int = network.num_classes
        config = timm.data.resolve_model_data_config(network)
        self._preprocess = timm.data.create_transform(**config, is_training=False)

    def probabilities(self, images: Tensor, features: Tensor) -> Tensor:
        """(B, C) float32 on the images' device; the features are not looked at."""
        with torch.no_grad(), full_precision(images.device):
            logits: Tensor = self.network.to(images.device)(self._preprocess(images.float() / 255))
        return logits.softmax(1)
