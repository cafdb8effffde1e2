"""Classify generated images with a timm model."""

from pathlib import Path

from torch import Tensor

from flextok_pl.backbones.networks import timm_network
from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained


class TimmClassifier(MeasuringNetwork):
    """A timm model with its own preprocessing, on the images' device.

    Its classes are in ImageNet's order if it was trained on that. `name` is one of `timm.list_models()`, with or
    without a tag.
    """

    def __init__(self, name: str, weights: Path | str | None = None) -> None:
        source = Pretrained("classifier", name, weights, "classifier_weights")
        remedy = "use one of timm.list_models(pretrained=True); set classifier_weights on a machine without a network"
        with source.loading(remedy):
            import timm

            network, data = timm_network(source)
        super().__init__(name.replace(".", "_"), network)  # the name is part of the metrics' names
        self.num_classes: int = network.num_classes
        self._preprocess = timm.data.create_transform(**data, is_training=False)

    def probabilities(self, images: Tensor, features: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, C) float32 on their device; does not use the features."""
        with self.to(images.device).measuring():
            logits: Tensor = self.network(self._preprocess(images.float() / 255))
        return logits.softmax(1)
