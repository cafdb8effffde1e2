"""The tools of the `flextok` command: plain functions whose signatures are their options."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.contracts import ImageSize, checked_size, default_budgets, weights_hash
from flextok_pl.data import ShardIndex, write_latents, write_tokens
from flextok_pl.data.pictures import read_picture
from flextok_pl.data.transforms import picture_tensor
from flextok_pl.evaluation.pictures import image_grid, same_size, save_png
from flextok_pl.metrics.images import to_uint8
from flextok_pl.models.any_size import tokenize_picture
from flextok_pl.models.identity import latents_identity
from flextok_pl.models.starting import load_autoencoder
from flextok_pl.models.teacher import Teacher, resized_map
from flextok_pl.models.text import TextEncoder
from flextok_pl.models.tokenizer import FlexTok


def encode_shards(
    src: str,
    dst: str,
    *,
    vae: str,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    teacher_grid: int | None = None,
    device: str | None = None,
    **options: Any,
) -> ShardIndex:
    """Encode the images of a shard set with a VAE, once, and write the posteriors' moments as a shard set.

    With a teacher its features are stored beside them, so that trainings with REPA need neither images nor the teacher.

    Args:
        src: shard set of images.
        dst: folder of the new set.
        vae: folder or Hub id of a diffusers autoencoder, or a FlexTok `.safetensors` file with an autoencoder.
        teacher: `effnet-lite2`, or a timm vision transformer such as `vit_large_patch14_dinov2.lvd142m`.
        teacher_weights: local weights file of the teacher.
        teacher_grid: side of the stored map of features; default the teacher's own. The side of the decoder's grid of
            patches takes the least space and does not change the training.
        device: where to run the VAE; default a GPU if available.
        **options: options of `write_latents`.
    """
    place = default_device(device)
    encoder = load_autoencoder(vae)
    source_id = {"vae": vae, **latents_identity(encoder)}
    encoder = encoder.to(place).eval().requires_grad_(False)
    extract, teacher_id = _extractor(teacher, teacher_weights, teacher_grid, place)
    return write_latents(
        src,
        dst,
        lambda images: encoder.moments(images.to(place)).cpu(),
        source_id=source_id,
        extract=extract,
        teacher_id=teacher_id,
        channels=encoder.config.image_channels,
        **options,
    )


def _extractor(
    teacher: str | None, weights: str | None, grid: int | None, place: torch.device
) -> tuple[Callable[[Tensor], Tensor] | None, dict[str, Any] | None]:
    """Make the function that extracts a teacher's features, and the teacher's identity; None without a teacher."""
    if teacher is None:
        if weights is not None or grid is not None:
            raise ValueError(f"teacher_weights={weights!r} and teacher_grid={grid} need a teacher")
        return None, None
    if grid is not None and grid < 1:
        raise ValueError(f"teacher_grid={grid} must be at least 1")
    network = Teacher(teacher, weights)
    identity = {"name": teacher, "sha256": weights_hash(network), "grid": grid}
    network = network.to(place).eval().requires_grad_(False)

    def extract(images: Tensor) -> Tensor:
        features = network(images.to(place))
        return features if grid is None else resized_map(features, (grid, grid))

    return extract, identity


def tokenize_shards(
    src: str,
    dst: str,
    *,
    tokenizer: str,
    image_size: ImageSize | None = None,
    text_encoder: str | None = None,
    device: str | None = None,
    **options: Any,
) -> ShardIndex:
    """Tokenize the images of a shard set, once, and write their tokens as a shard set to train priors on.

    Ten views with random crops and flips are usual on ImageNet: `--num_views 10`. Run the same command again to
    continue an interrupted run.

    Args:
        src: shard set of images.
        dst: folder of the new set.
        tokenizer: a `.safetensors` file, a folder or a Hub id.
        image_size: side in pixels of the images to tokenize, or [height, width]; default the tokenizer's own.
        text_encoder: also store the captions' states from this encoder: `minilm`, or a folder or Hub id of a T5.
        device: where to run the tokenizer; default a GPU if available.
        **options: options of `write_tokens`.
    """
    place = default_device(device)
    tok = FlexTok.from_pretrained(tokenizer)
    encoder = None if text_encoder is None else TextEncoder(text_encoder).to(place)
    tokenizer_id = tok.identity()
    tok = tok.to(place)
    return write_tokens(
        src,
        dst,
        lambda images: tok.tokenize(images.to(place)),
        tokenizer_id=tokenizer_id,
        image_size=image_size or picture_size(tok),
        encode_text=None if encoder is None else lambda texts: encoder(texts, truncate=True),
        text_encoder_id=None if encoder is None else {"name": encoder.name, "max_length": encoder.max_length},
        channels=tok.image_channels,
        **options,
    )


def reconstruct_images(
    images: list[str],
    tokenizer: str | None = None,
    budgets: str | None = None,
    out: str = "grid.png",
    guidance: Literal["none", "cfg", "apg"] | None = None,
    guidance_scale: float | None = None,
    num_steps: int | None = None,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    vae_config: str | None = None,
    tiled: bool = False,
    overlap: float = 0.25,
    device: str | None = None,
) -> None:
    """Tokenize pictures of any size, decode them from several numbers of tokens, and draw all in one picture.

    A picture is resized as little as possible, to the nearest shape that the tokenizer takes; nothing is cut off, and
    the aspect ratio stays. A large picture can be cut into tiles instead, which keeps its size.

    Args:
        images: picture files.
        tokenizer: a `.safetensors` file, a folder or a Hub id; default the packaged demo tokenizer.
        budgets: numbers of tokens, such as 1,4,16,64; default 1, 2, 4, ... up to all.
        out: PNG file to write: originals in the first column, one column per budget.
        guidance: `none`, `cfg` or `apg`; default the tokenizer's own, or else `apg`.
        guidance_scale: guidance scale, 1 for none; default the tokenizer's own, or else 7.5.
        num_steps: steps of the flow; default the tokenizer's own, or else 25.
        guidance_interval: flow times (low, high] at which to guide, such as [0.2,0.8], with 1 for noise; default all.
        seed: seed of the noise, which is the same at every budget.
        vae_config: diffusers configuration (JSON) of an official checkpoint's autoencoder, unless it is the published
            one.
        tiled: cut pictures that are larger than the tokenizer's images into overlapping tiles; these are decoded
            together and blended, and each has the number of tokens.
        overlap: overlap of neighbouring tiles, as a share of their side.
        device: default a GPU if available.
    """
    place = default_device(device)
    tok = FlexTok.from_pretrained(tokenizer or DEMO_TOKENIZER, vae_config=vae_config, device=place)
    wanted = checked_budgets(budgets, tok.num_registers)
    columns: dict[str | int, list[Tensor]] = {"original": [], **{budget: [] for budget in wanted}}
    tiles = 0
    for number, file in enumerate(images):
        picture = picture_tensor(read_picture(Path(file).expanduser(), tok.image_channels))  # (C, H, W)
        made = tokenize_picture(tok, picture.to(place), tiled, overlap)
        tiles += len(made.tokens)
        columns["original"].append(to_uint8(made.picture).cpu())
        for budget in wanted:
            decoded = made.decode(
                tok,
                budget,
                seed + number,
                num_steps=num_steps,
                guidance=guidance,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
            )
            columns[budget].append(to_uint8(decoded).cpu())
    target = Path(out)
    save_png(image_grid([(heading, same_size(drawn)) for heading, drawn in columns.items()]), target)
    of = f" in {tiles} tiles" if tiles > len(images) else ""
    print(f"{target}: pictures: {len(images)}{of}, at {wanted} tokens")


def default_device(device: str | None) -> torch.device:
    """The device of this name, or a GPU if available; each process of torchrun or srun gets its own."""
    if device is None and torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        return torch.device("cuda", number % torch.cuda.device_count())
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each kind of device has its own
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def picture_size(tok: FlexTok) -> ImageSize:
    """Size in pixels of the images that a tokenizer was made for."""
    tok.require_vae()
    rows, columns = tok.config.grids[0]
    return checked_size((rows * tok.config.patch_pixels, columns * tok.config.patch_pixels))


def checked_budgets(text: str | None, num_registers: int) -> list[int]:
    """`1,4,16` or `[1,4,16]` -> [1, 4, 16]; None -> 1, 2, 4, ... K."""
    if text is None:
        return default_budgets(num_registers)
    try:
        wanted = sorted({int(number) for number in text.strip("[]").split(",")})
    except ValueError:
        raise ValueError(f"budgets={text!r} must be whole numbers separated by commas, such as 1,4,16,64") from None
    if not 1 <= wanted[0] <= wanted[-1] <= num_registers:
        raise ValueError(f"budgets={text} must be in 1..{num_registers}, the budgets of this tokenizer")
    return wanted
