"""The content of a training, counted on the meta device: parameters, operations, activations.

Nothing is downloaded and no data are read. Frozen networks that are not on this machine are built by their names if
these state the architecture, and otherwise left out with a note.

Shapes: B batch, H x W image, N patches.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.contracts import ImageSize, height_width
from flextok_pl.cost.count import Activations, Flops, Numerics, count_activations, count_flops, image_work
from flextok_pl.cost.models import (
    Trained,
    all_blocks,
    distillation_activations,
    distillation_flops,
    encoder,
    path_flops,
    prior_activations,
    prior_flops,
    projection,
    token_loss_bytes,
    tokenizer_activations,
    tokenizer_flops,
    vae_cost,
)
from flextok_pl.interop.autoencoder import read_vae_config
from flextok_pl.layers.frozen import is_frozen
from flextok_pl.models.discriminator import PatchDiscriminator
from flextok_pl.models.distillation import check_steps, teacher_decoding, training_law
from flextok_pl.models.irepa import build_projection
from flextok_pl.models.prior import Prior
from flextok_pl.models.routing import build_routing
from flextok_pl.models.starting import Network, check_parts, train_only
from flextok_pl.models.teacher import Teacher
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE

Inputs = Literal["images", "latents", "tokens"]
IN_FLOAT32 = (
    "frozen networks compute in float32 and take longer than planned here; a training on latents with features, or on "
    "tokens, does not need them"
)
TEXT_LENGTH = 128  # positions of a padded text, the most that `TextEncoder` makes


@dataclass(frozen=True)
class FrozenNetwork:
    """A network that is used and not trained."""

    parameters: int  # in float32
    flops: float = 0.0  # on one sample of a training batch, as a mean; 0 if it only evaluates
    working_bytes: float = 0.0  # its peak memory while it works on one sample
    resident: bool = True  # on the device throughout the training, else only in validations


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights and buffers of a model."""

    trained: int  # parameters with gradients, which averaging copies
    fixed: int  # other parameters and buffers
    matrices: int  # weights of products
    cast: int  # those that autocast copies in half precision
    in_blocks: int  # parameters of all blocks
    largest_block: int  # those of the largest

    @property
    def total(self) -> int:
        """All numbers of the model that training stores."""
        return self.trained + self.fixed

    @property
    def others(self) -> int:
        """Numbers that are not weights of a product."""
        return self.total - self.matrices


@dataclass(frozen=True)
class Workload:
    """A training step; its functions take B, the samples of a batch on one device."""

    parameters: Parameters
    flops: Callable[[int], Flops]  # per sample
    activations: Callable[[int], Activations]  # of the batch
    loss_bytes: Callable[[int], float] = lambda batch_size: 0.0  # further memory of the loss
    frozen: Mapping[str, FrozenNetwork] = field(default_factory=dict)  # by the name of what it does
    notes: tuple[str, ...] = ()  # what is not counted


def tokenizer_workload(
    options: Mapping[str, Any], net: FlexTokConfig, size: ImageSize, inputs: Inputs, numerics: Numerics
) -> Workload:
    """The training of a `TokenizerModule` with these options, on `images` of this size or on their `latents`."""
    if inputs == "tokens":
        raise ValueError("inputs='tokens': a tokenizer trains on images or latents")
    frozen: dict[str, FrozenNetwork] = {}
    notes: list[str] = []
    with torch.device("meta"):
        autoencoder = _autoencoder(options["vae"], net)
        model = FlexTok(dataclasses.replace(net, vae=None))
        train = _trained(model, options, notes)
        if is_frozen(model.encoder) and numerics.autocast:
            notes.append("the frozen encoder computes in float32 and takes longer than planned here")
        parts: list[nn.Module] = [model]
        grid = _grid(size, autoencoder, net)
        works = inputs == "images"
        notes += [IN_FLOAT32] if works and numerics.autocast else []
        frozen["VAE"] = _frozen_vae(autoencoder, height_width(size) if works else None)
        aligned = options["teacher"] is not None
        routing = build_routing(options["route_share"], options["route_blocks"], net, aligned)
        extra, more = Flops(), Activations()
        if aligned:
            teacher, dim = _frozen_teacher(options["teacher"], height_width(size))
            share, kind = options["repa_until"], options["repa_projection"]
            if works:
                frozen["teacher"] = dataclasses.replace(teacher, flops=share * teacher.flops)
            else:
                notes.append("the teacher's features are read with the latents, which must hold them")
            if share < 1:
                notes.append(f"the work of the alignment is its mean over the training: repa_until={share}")
            parts.append(build_projection(kind, net.decoder_width, dim))
            part = projection(kind, net.decoder_width, dim, grid)
            extra, more = count_flops(part, 1) * share, count_activations(part, 1, numerics)
    return Workload(
        _parameters(parts, [*model.encoder.blocks, *model.decoder.blocks]),
        flops=lambda batch: tokenizer_flops(net, grid, options["activation_checkpointing"], routing, train) + extra,
        activations=lambda batch: (
            tokenizer_activations(net, numerics, batch, grid, options["stratified_budgets"], routing, train)
            + more * batch
        ),
        frozen=frozen,
        notes=tuple(notes),
    )


def distillation_workload(
    options: Mapping[str, Any], net: None, size: ImageSize, inputs: Inputs, numerics: Numerics
) -> Workload:
    """The training of a `DistillationModule` with these options, on `images` of this size or on their `latents`."""
    if inputs == "tokens":
        raise ValueError("inputs='tokens': a decoder is distilled on images or latents")
    name, steps = options["tokenizer"], options["num_steps"]
    with torch.device("meta"):
        model = _tokenizer(name)
        if model is None:
            raise ValueError(f"tokenizer={name!r} is not on this machine, and its name is not a published architecture")
        vae, law = model.require_vae(), training_law(model.config, options["nested_dropout"])
        grid = _grid(size, vae.config, law)
        frozen = {"VAE": _frozen_vae(vae.config, height_width(size) if inputs == "images" else None)}
        model.encoder.requires_grad_(False)
        student = _parameters([model.encoder, model.decoder], list(model.decoder.blocks))
    decoding = teacher_decoding(model.config, options)
    check_steps(steps, decoding.num_steps)
    calls, checkpointing = decoding.calls(), options["activation_checkpointing"]
    frozen["teacher"] = FrozenNetwork(_count(model.decoder), path_flops(law, *calls, grid))
    return Workload(
        student,
        flops=lambda batch: distillation_flops(law, steps, grid, checkpointing),
        activations=lambda batch: distillation_activations(
            law, steps, numerics, batch, grid, options["stratified_budgets"]
        ),
        frozen=frozen,
        notes=(IN_FLOAT32,) if numerics.autocast else (),
    )


def prior_workload(
    options: Mapping[str, Any], net: PriorConfig, size: ImageSize, inputs: Inputs, numerics: Numerics
) -> Workload:
    """The training of a `PriorModule` with these options, on `tokens` or on `images` of this size."""
    if inputs == "latents":
        raise ValueError("inputs='latents': a prior trains on tokens or images")
    frozen: dict[str, FrozenNetwork] = {}
    notes: list[str] = []
    with torch.device("meta"):
        model = Prior(net)
        train = _trained(model, options, notes)
        name = options["tokenizer"]
        tokenizer = None if name is None else _tokenizer(name)
        if tokenizer is not None:
            works, flops, working = inputs == "images", 0.0, 0.0
            if works:
                vae = tokenizer.require_vae()
                flops, working = image_work(vae.moments, height_width(size), vae.config.image_channels)
                with torch.device("cpu"):  # the indices of the packing need values
                    part = encoder(tokenizer.config, net.num_tokens, _grid(size, vae.config, tokenizer.config))
                flops += count_flops(part, tokenizer.config.encoder_depth).forward
            frozen["tokenizer"] = FrozenNetwork(_count(tokenizer), flops, working, resident=works)
            notes += [IN_FLOAT32] if works and numerics.autocast else []
        elif name is not None:
            notes.append(f"the tokenizer {name} is not on this machine and its name is not a known one: not counted")
    if options["text_encoder"] is not None:
        notes.append(f"the text encoder {options['text_encoder']} is not counted: neither its weights nor its work")
    parameters = _parameters([model], list(model.blocks))
    if options["loss_chunk"] is not None:  # the chunked loss has a copy of its own
        parameters = dataclasses.replace(parameters, cast=parameters.cast - model.head.weight.numel())
    return Workload(
        parameters,
        flops=lambda batch: prior_flops(net, TEXT_LENGTH, options["activation_checkpointing"], train),
        activations=lambda batch: prior_activations(net, numerics, TEXT_LENGTH, train) * batch,
        loss_bytes=lambda batch: token_loss_bytes(net, batch, options["loss_chunk"], numerics),
        frozen=frozen,
        notes=tuple(notes),
    )


def vae_workload(
    options: Mapping[str, Any], net: VAEConfig, size: ImageSize, inputs: Inputs, numerics: Numerics
) -> Workload:
    """The training of a `VAEModule` with these options, on `images` of this size."""
    if inputs != "images":
        raise ValueError(f"inputs={inputs!r}: an autoencoder trains on images")
    notes = ["the activations are those of float32"] if numerics.autocast else []
    with torch.device("meta"):
        model = VAE(net)
        _trained(model, options, notes)
        discriminator = None
        if options["gan_weight"]:
            discriminator = PatchDiscriminator(options["discriminator_width"], image_channels=net.image_channels)
        flops, peak = vae_cost(model, discriminator, height_width(size))
    if options["perceptual_weight"]:
        notes.append(f"the perceptual network {options['perceptual_network']} is not counted")
    return Workload(
        _parameters([model] if discriminator is None else [model, discriminator], []),
        flops=lambda batch: flops,
        activations=lambda batch: Activations(peak, peak) * batch,
        notes=tuple(notes),
    )


def _trained(model: Network, options: Mapping[str, Any], notes: list[str]) -> Trained:
    """The trained parts of a model; the rest is frozen."""
    train = None if options.get("train") is None else tuple(options["train"])
    check_parts(model, "train", train)
    train_only(model, train)
    if all_blocks(train) != train:
        notes.append("the activations are those of a training of all blocks")
    return train


def _parameters(parts: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> Parameters:
    trained = sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    products = [m for part in parts for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    matrices = sum(product.weight.numel() for product in products)
    in_blocks = [_count(block) for block in blocks]
    return Parameters(
        trained=trained,
        fixed=sum(map(_count, parts)) - trained,
        matrices=matrices,
        cast=sum(product.weight.numel() for product in products if product.weight.requires_grad),
        in_blocks=sum(in_blocks),
        largest_block=max(in_blocks, default=0),
    )


def _grid(size: ImageSize, vae: VAEConfig, net: FlexTokConfig) -> tuple[int, int]:
    """Rows and columns of patches of images of this size."""
    return dataclasses.replace(net, vae=vae).grid_of(height_width(size), "data.image_size")


def _count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])


def _autoencoder(name: str | None, net: FlexTokConfig) -> VAEConfig:
    """The autoencoder that a tokenizer is trained with: the named one if it is on this machine, else the network's."""
    place = None if name is None else Path(name).expanduser()
    if place is not None and place.is_dir():
        return read_vae_config(place)
    if place is not None and place.is_file():
        return FlexTok.from_pretrained(place, device="meta").require_vae().config
    if net.vae is None:
        raise ValueError(
            f"vae={name!r} is not on this machine, and net.vae=null does not describe it; set model.net.vae"
        )
    return net.vae


@cache
def _frozen_vae(config: VAEConfig, size: tuple[int, int] | None) -> FrozenNetwork:
    """An autoencoder that encodes images of (H, W) pixels, or is only stored; like the others here on `meta`."""
    vae = VAE(config)
    return FrozenNetwork(_count(vae), *(() if size is None else image_work(vae.moments, size, config.image_channels)))


@cache
def _frozen_teacher(name: str, size: tuple[int, int]) -> tuple[FrozenNetwork, int]:
    """A teacher at work on images of (H, W) pixels, and F."""
    teacher = Teacher(name, pretrained=False)
    return FrozenNetwork(_count(teacher), *image_work(teacher.network, teacher.size_for(*size))), teacher.dim


def _tokenizer(name: str) -> FlexTok | None:
    """A tokenizer on this machine, or one of a published architecture by its name."""
    if Path(name).expanduser().exists():
        return FlexTok.from_pretrained(name, device="meta")
    published = re.search(r"d\d+_d\d+", name)
    return None if published is None else FlexTok(FlexTokConfig.preset(published[0]))
