"""Fit a linear classifier to a data set's own labels, to judge which class a generated image shows.

B images, N samples, D features, C classes.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.precision import as_float64, summing_device


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Multinomial logistic regression on standardised features, with the class means of the features; float64."""

    name: str  # `probe_` and the extractor's name; part of the metrics' names
    mean: Tensor  # (D,) of all real features
    scale: Tensor  # (D,) their standard deviation
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    class_means: Tensor  # (C, D) less `mean`

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.bias)

    @classmethod
    @torch.inference_mode(False)
    def fit(cls, features: Tensor, labels: Tensor, num_classes: int, extractor: str, l2: float = 0.1) -> Self:
        """Minimise mean cross-entropy + l2 / 2 |weight|^2, which has one minimum, by L-BFGS in float64.

        Takes (N, D) real images and (N,) labels. All classes have the same weight, whatever their number of samples.
        Samples of class -1 count only for the mean and the scale. The penalty is needed because more features than
        samples can be separated perfectly.
        """
        if l2 <= 0:
            raise ValueError(f"l2={l2} must be positive")
        if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"labels span {int(labels.min())}..{int(labels.max())}, outside num_classes={num_classes}")
        labels, rows = labels.cpu().clone(), features.detach().cpu().double()  # clone leaves inference mode
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
        class_weights = 1 / counts.to(rows.dtype)
        weight = torch.zeros_like(class_means, requires_grad=True)
        bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

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
        """The extractor's (B, D) -> (B, C) float32 on the probe's device; images are not used."""
        logits = F.linear(self._centred(features) / self.scale, self.weight, self.bias)
        return logits.softmax(1).float()

    def nearest_class(self, features: Tensor) -> Tensor:
        """The class whose mean has the largest cosine, both minus the real mean: (B, D) -> (B,) int64 on its device."""
        means = F.normalize(self.class_means)
        return F.linear(self._centred(features), means).argmax(1)  # a row's length does not change the decision

    def to(self, device: torch.device | str) -> Self:
        """The same probe on the `summing_device` of a device; `fit` makes it on the CPU."""
        place = summing_device(device)
        return type(self)(self.name, *(value.to(place) for value in vars(self).values() if isinstance(value, Tensor)))

    def state_dict(self) -> dict[str, Any]:
        """The name and tensors that restore this probe: `LinearProbe(**state)`."""
        return dict(vars(self))

    def _centred(self, features: Tensor) -> Tensor:
        return as_float64(features.detach()).to(self.mean.device) - self.mean
