"""Computes for the page of `flextok app`: pictures to tokens, tokens to pictures, generation and search.

Nothing here uses Gradio. Shapes: B pictures, K tokens, k kept ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import Queue
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from flextok_pl.channels import visible
from flextok_pl.contracts import ImageSize
from flextok_pl.data.image_files import extension_of
from flextok_pl.data.pictures import open_pictures
from flextok_pl.data.transforms import MODES, PictureError, center_crop, decode_image, inspect_image, to_tensor
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.flow.decoding import Decoding
from flextok_pl.metrics.images import to_uint8
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.search.driver import Models, Searcher
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.pictures import TreeRow, search_tree
from flextok_pl.search.prompts import prompts_from_options
from flextok_pl.search.results import Cost, Step
from flextok_pl.search.run import repeated
from flextok_pl.search.verifiers import BaseVerifier

T = TypeVar("T")

MAX_BYTES = 20 * 2**20
"""Size in bytes of the largest file that is read."""

MAX_PIXELS = 40_000_000
"""Pixels of the largest picture that is decoded."""


class Picture(NamedTuple):
    """A picture as the tokenizer takes it, and its tokens."""

    image: Image.Image
    tokens: Tensor  # (K,) int64 on the CPU


def read_upload(data: bytes) -> Image.Image:
    """Read an uploaded picture as RGB; of an animation, the first picture.

    Raises:
        ValueError: the file is too large, not a picture, or of more than `MAX_PIXELS`.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"The file has more than {MAX_BYTES // 2**20} MiB; choose a smaller one.")
    try:
        kind, (width, height) = inspect_image(data)
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"The picture has {width:,} x {height:,} pixels; scale it down to at most {MAX_PIXELS:,} pixels."
            )
        if extension_of(kind) is None:  # a program, such as PostScript, in place of pixels
            raise ValueError(f"The file is {kind.upper()}, not a picture made of pixels; save it as PNG or JPEG.")
        return decode_image(data)
    except PictureError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise ValueError(f"The picture has more than {MAX_PIXELS:,} pixels; scale it down.") from error
        raise ValueError(f"The file cannot be read as a picture ({error}); save it as PNG or JPEG.") from error


def example_pictures(source: str, size: ImageSize, count: int, channels: int = 3) -> list[Image.Image]:
    """Read the first pictures of a folder or shard set, cropped to this size, with a tokenizer's channels."""
    loader, _ = open_pictures(source, size, batch_size=count, channels=channels)
    return as_pictures(next(iter(loader))["image"])


def tokenized(tokenizer: FlexTok, image: Image.Image, size: ImageSize) -> Picture:
    """Tokenize the middle of a picture, scaled to this size."""
    square = center_crop(image.convert(MODES[tokenizer.image_channels]), size)
    return Picture(square, tokenizer.tokenize(to_tensor([square]))[0].cpu())


def mixed(first: Tensor, second: Tensor | None, position: int, kept: int) -> Tensor:
    """The first `position` tokens of one picture and the following ones of another, cut to `kept`: (K,) -> (k,)."""
    return (first if second is None else torch.cat([first[:position], second[position:]]))[:kept]


def decoded(tokenizer: FlexTok, tokens: Tensor, decoding: Decoding, seed: int) -> list[Image.Image]:
    """Decode (B, k) tokens to pictures; the noise of picture i has the seed `seed + i`, as in `flextok generate`."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(tokens))]
    return as_pictures(tokenizer.detokenize(tokens, generator=noise, **decoding.arguments))


def as_pictures(images: Tensor) -> list[Image.Image]:
    """Convert (B, C, H, W), floating point in [-1, 1] or uint8, to Pillow's pictures, as RGB."""
    pixels = visible(images if images.dtype == torch.uint8 else to_uint8(images))
    return [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def prompt_of(models: Models, asked: str | None) -> Prompt:
    """The prompt for the prior: a class, a text, or nothing, depending on its condition."""
    kind, given = models.known.kind, [asked or ""]
    classes, texts = (given if kind == each else None for each in ("class", "text"))
    return prompts_from_options(models.known, classes, texts)[0]


def drawn(
    models: Models,
    asked: str | None,
    samples: int,
    seed: int,
    cfg_scale: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """Generate tokens of several samples, (B, K) on the CPU; sample i has seed `seed + i`, as in `flextok generate`."""
    assert isinstance(models.prior, Prior)
    condition = repeated(models.condition(prompt_of(models, asked)), samples)
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(samples)]
    count = models.prior.num_tokens
    return models.prior.generate(condition, count, cfg_scale, temperature, top_k, top_p, generator=seeds).cpu()


class Found(NamedTuple):
    """A search under way, or finished."""

    image: Image.Image  # the best so far
    tree: Image.Image
    num_tokens: int
    score: float
    steps: int
    of_steps: int
    cost: Cost


def searched(models: Models, verifier: BaseVerifier, asked: str | None, options: SearchOptions) -> Generator[Found]:
    """Search, and yield what was found after each step and at the end.

    Closing the iterator ends the search after its current step.

    Raises:
        ValueError: options, prior and verifier do not fit each other, or the verifier cannot judge the prompt.
    """
    prompt = prompt_of(models, asked)
    verifier.check([prompt])
    searcher = Searcher(models.prior, models.tokenizer, verifier, models.condition, options)
    rows: list[TreeRow] = []

    def found(images: Tensor, score: float, num_tokens: int, cost: Cost) -> Found:
        best, tree = as_pictures(images[:1])[0], as_pictures(search_tree(rows)[None])[0]
        return Found(best, tree, num_tokens, score, len(rows), searcher.num_steps, cost)

    def work(report: Callable[[Found], None]) -> None:
        def progress(step: Step, best: Tensor | None, cost: Cost) -> None:
            rows.append(searcher.tree_row(prompt, step))
            report(found(rows[-1].images, float(step.scores[0]), step.num_tokens, cost))

        result = searcher.search(prompt, progress=progress)
        images = searcher.images(prompt, result.tokens[:1], result.candidates[:1])
        report(found(images, float(result.scores[0]), result.tokens.shape[1], result.cost))

    with closing(reported(work)) as reports:
        yield from reports


class _Closed(Exception):
    """Raised when nobody waits for further reports."""


def reported(work: Callable[[Callable[[T], None]], None]) -> Generator[T]:
    """Run `work` in a thread and yield its reports; closing the iterator ends it at its next report."""
    reports: Queue[T | None] = Queue()
    closed = threading.Event()

    def report(what: T) -> None:
        if closed.is_set():
            raise _Closed
        reports.put(what)

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(work, report)
        done.add_done_callback(lambda _: reports.put(None))
        try:
            while (what := reports.get()) is not None:
                yield what
        finally:
            closed.set()
    done.result()


def origins(first: Tensor, second: Tensor | None, position: int, kept: int) -> list[tuple[int, str]]:
    """Each of K tokens of `mixed` before the cut, and its source: `first`, `second`, or `cut`."""
    tokens = mixed(first, second, position, len(first)).tolist()
    source = ["first" if second is None or i < position else "second" for i in range(len(tokens))]
    return [(token, source[i] if i < kept else "cut") for i, token in enumerate(tokens)]
