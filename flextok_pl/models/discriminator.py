"""The adversarial term of autoencoder training: a patch discriminator, hinge losses and the adaptive weight.

Shapes: B batch, H x W image, p x q grid of overlapping patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: PatchGAN of pix2pix (https://arxiv.org/abs/1611.07004, section 3.2.2).

    The first `num_layers` of its 4x4 convolutions have stride 2; widths double up to 8 times the first. Group norm
    replaces pix2pix's batch norm, so that real and reconstructed images do not share statistics and no running averages
    need synchronising. With 3 layers of stride 2, a patch is 70 x 70 pixels.
    """

    def __init__(self, width: int = 64, num_layers: int = 3, image_channels: int = 3) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"discriminator_width={width} must be a positive multiple of 4")
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(32 if widths[i] >= 128 and widths[i] % 32 == 0 else widths[i] // 4, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(B, image_channels, H, W) in [-1, 1] -> (B, 1, p, q) logits, high for real."""
        logits: Tensor = self.layers(images)
        return logits


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss from its logits (https://arxiv.org/abs/1705.02894, eq. 3, halved as in VQGAN)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The weight that gives the adversarial loss the gradient norm of the reconstruction loss.

    A scalar without gradient, as in VQGAN (https://arxiv.org/abs/2012.09841, eq. 7), with the 1e-4 and the bound of its
    published code. Both gradients are measured at the decoder's last weight.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    weight: Tensor = (of_reconstruction.norm() / (of_generator.norm() + 1e-4)).clamp(0.0, 1e4).detach()
    return weight
