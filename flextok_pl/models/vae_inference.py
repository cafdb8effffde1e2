"""Run diffusers' `AutoencoderKL` faster on a CPU, with the same function.

Without gradients a wide network takes about half the time of diffusers' pass, because

- 3x3 convolutions of many channels use Winograd's method, also after an upsampling; see `layers/winograd.py`;
- channels are last in memory, and a norm, its activation and the padding of the next convolution are one step;
- activations, residuals and sums work in place, in memory that is allocated once for all layers.

The weights are diffusers' own at the time of the call; they are not copied or kept.

Shapes: B images, H x W positions of a level, C channels, which are last between layers.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.layers.winograd import UPSAMPLED, Workspace, add_convolution, serves

PIXELS_AT_A_TIME = 4 * 256 * 256
"""Pixels of a group of images. More images run in several groups, which bounds memory; a group shares weight work."""


FEWEST_PIXELS = 128 * 128
"""Fewest pixels of an image: below this, diffusers' pass is faster (AMD EPYC with AVX-512)."""

WIDE = 128
"""Channels of the widest level from which a network uses the convolutions of `layers/winograd.py`."""


def encode(network: diffusers.AutoencoderKL, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 2C, h, w), mean and log-variance, as diffusers' `encode` before it clamps the latter."""
    pixels = images.shape[2] * images.shape[3]
    if not _serves(network, images, pixels):
        return network._encode(_ordered(network, images))  # type: ignore[no-any-return]
    at_a_time = max(1, PIXELS_AT_A_TIME // pixels)
    with torch.no_grad():
        return torch.cat([_Pass(images).encode(network, some) for some in torch.split(images, at_a_time)])


def decode(network: diffusers.AutoencoderKL, latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 3, H, W), as diffusers' `decode`."""
    pixels = latents.shape[2] * latents.shape[3] * 4 ** (len(network.config.block_out_channels) - 1)
    if not _serves(network, latents, pixels):
        return network.decode(_ordered(network, latents), return_dict=False)[0]  # type: ignore[no-any-return]
    at_a_time = max(1, PIXELS_AT_A_TIME // pixels)
    with torch.no_grad():
        return torch.cat([_Pass(latents).decode(network, some) for some in torch.split(latents, at_a_time)])


def _ordered(network: diffusers.AutoencoderKL, x: Tensor) -> Tensor:
    """Put x in the memory order that is faster for diffusers' pass.

    Channels go last for a narrow network on a CPU, and in half precision; otherwise the order stays.
    """
    kind = x.device.type
    narrow = kind == "cpu" and max(network.config.block_out_channels) < WIDE
    faster = narrow or (kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind))
    return _channels_last(x) if faster else x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _serves(network: diffusers.AutoencoderKL, inputs: Tensor, pixels: int) -> bool:
    """Check that the pass of this file supports this network, and is faster for images of this many pixels."""
    config = network.config
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (inputs, *network.parameters()))
    as_known = (
        config.act_fn in ("silu", "swish")
        and set(config.down_block_types) == {"DownEncoderBlock2D"}
        and set(config.up_block_types) == {"UpDecoderBlock2D"}
        and not (network.use_slicing or network.use_tiling)
    )
    return (
        as_known
        and inputs.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and max(config.block_out_channels) >= WIDE
        and pixels >= FEWEST_PIXELS
        and len(inputs) > 0
        and not (learning or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
    )


class _Pass:
    """The network's layers, on contiguous (B, H, W, C)."""

    def __init__(self, like: Tensor) -> None:
        self.workspace = Workspace(like)

    def encode(self, network: Any, images: Tensor) -> Tensor:
        """See the function of this name."""
        encoder = network.encoder
        x = _direct(encoder.conv_in, _channels_last(images))
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x)
            for downsampler in block.downsamplers or ():
                padded = self.framed(x.shape, before=0)
                padded[:, :-1, :-1] = x
                x = _direct(downsampler.conv, padded.permute(0, 3, 1, 2))
        x = self.output(encoder, self.middle(encoder.mid_block, x))
        moments = x.permute(0, 3, 1, 2)
        return moments if network.quant_conv is None else network.quant_conv(moments)

    def decode(self, network: Any, latents: Tensor) -> Tensor:
        """See the function of this name."""
        if network.post_quant_conv is not None:
            latents = network.post_quant_conv(latents)
        decoder = network.decoder
        x = self.middle(decoder.mid_block, _direct(decoder.conv_in, _channels_last(latents)))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self.resnet(resnet, x)
            for upsampler in block.upsamplers or ():
                x = self.upsampled(upsampler.conv, x)
        return self.output(decoder, x).permute(0, 3, 1, 2)

    def middle(self, block: Any, x: Tensor) -> Tensor:
        """The middle block, with its attention if it has any."""
        x = self.resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                x.copy_(attention(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            x = self.resnet(resnet, x)
        return x

    def resnet(self, block: Any, x: Tensor) -> Tensor:
        """A residual block, in the memory of x if the number of channels stays."""
        hidden = self.workspace.take("hidden", *x.shape[:3], block.conv1.out_channels).copy_(block.conv1.bias)
        self.convolve(self.activated(block.norm1, x), block.conv1, hidden)
        padded = self.activated(block.norm2, hidden)
        x = x if block.conv_shortcut is None else _direct(block.conv_shortcut, x.permute(0, 3, 1, 2))
        return self.convolve(padded, block.conv2, x.add_(block.conv2.bias))

    def convolve(self, padded: Tensor, conv: nn.Conv2d, onto: Tensor) -> Tensor:
        """Add a 3x3 convolution without its bias."""
        if serves(conv.weight, *onto.shape[1:3]):
            add_convolution(padded, conv.weight, onto, self.workspace)
            return onto
        return onto.add_(F.conv2d(padded.permute(0, 3, 1, 2), conv.weight).permute(0, 2, 3, 1))

    def upsampled(self, conv: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, 2H, 2W, C): nearest-neighbour upsampling, then a convolution."""
        batch, height, width, channels = x.shape
        if serves(conv.weight, 2 * height, 2 * width):
            doubled = x.new_empty(batch, 2 * height, 2 * width, channels).copy_(conv.bias)
            padded = self.framed(x.shape)
            padded[:, 1:-1, 1:-1] = x
            add_convolution(padded, conv.weight, doubled, self.workspace, UPSAMPLED)
            return doubled
        return _direct(conv, F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest"))

    def output(self, part: Any, x: Tensor) -> Tensor:
        """Norm, activation and convolution at the end of the encoder or decoder."""
        padded = self.activated(part.conv_norm_out, x).permute(0, 3, 1, 2)
        return F.conv2d(padded, part.conv_out.weight, part.conv_out.bias).permute(0, 2, 3, 1)

    def activated(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """The group norm and SiLU, (B, H + 2, W + 2, C) with a frame of zeros."""
        batch, channels, groups = len(x), x.shape[3], norm.num_groups
        of_images = [
            torch.batch_norm_update_stats(image.permute(0, 3, 1, 2), None, None, 0.0) for image in torch.split(x, 1)
        ]
        means, variances = (torch.stack(each).view(batch, groups, -1) for each in zip(*of_images, strict=True))
        mean = means.mean(2, keepdim=True)
        variance = (variances + (means - mean).square()).mean(2, keepdim=True)  # (B, G, 1)
        scale = (variance + norm.eps).rsqrt() * norm.weight.view(groups, -1)  # (B, G, C / G)
        shift = norm.bias.view(groups, -1) - mean * scale
        padded = self.framed(x.shape)
        inner = padded[:, 1:-1, 1:-1]
        torch.addcmul(shift.view(batch, 1, 1, channels), x, scale.view(batch, 1, 1, channels), out=inner)
        F.silu(inner, inplace=True)
        return padded

    def framed(self, shape: torch.Size, before: int = 1) -> Tensor:
        """Memory for (B, H, W, C) in a frame of zeros: one row and column at the end, `before` at the start."""
        batch, height, width, channels = shape
        frame = self.workspace.take("padded", batch, height + before + 1, width + before + 1, channels)
        for edge in (*range(before), -1):
            frame[:, edge] = 0
            frame[:, :, edge] = 0
        return frame


def _direct(conv: Any, x: Tensor) -> Tensor:
    """A convolution (B, C, H, W) -> (B, H', W', D), contiguous if the channels of x are last in memory."""
    return conv(x).permute(0, 2, 3, 1).contiguous()  # type: ignore[no-any-return]
