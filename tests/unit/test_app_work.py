"""What the page of `flextok app` computes, without the page."""

import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import encoded
from PIL import Image
from search_helpers import CONDITIONS, small_prior, small_tokenizer

from flextok_pl.app.work import (
    MAX_BYTES,
    decoded,
    drawn,
    example_pictures,
    mixed,
    origins,
    read_upload,
    reported,
    searched,
    tokenized,
)
from flextok_pl.assets import EXAMPLES
from flextok_pl.cli import main
from flextok_pl.config import GenerationConfig
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.flow.decoding import Decoding
from flextok_pl.search.driver import Models
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.prompts import Conditions
from flextok_pl.search.verifiers import FunctionVerifier

QUICK = Decoding(num_steps=2, guidance="none")
RED = Image.new("RGB", (40, 30), (255, 0, 0))


@pytest.fixture(scope="module")
def models() -> Models:
    prior, names = small_prior(), ("a", "b", "c", "d")
    known = Conditions("class", 4, names)
    own = GenerationConfig()
    return Models(prior, small_tokenizer(), known, lambda prompt: torch.tensor([prompt.label]), {}, own)


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that states a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (40, 20), (255, 0, 0)), "JPEG", exif=exif)


HOSTILE = {
    "too large a file": (b"\0" * (MAX_BYTES + 1), "The file has more than 20 MiB"),
    "a bomb": (png_of(50_000, 50_000), "more than 40,000,000 pixels; scale it down"),
    "many pixels": (png_of(8_000, 8_000), "8,000 x 8,000 pixels; scale it down"),
    "no picture": (b"#!/bin/sh\necho hello\n", "cannot be read as a picture"),
    "empty": (b"", "cannot be read as a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot be read as a picture"),
    "postscript": (encoded(RED, "EPS"), "The file is EPS, not a picture made of pixels"),
    "truncated": (encoded(RED.resize((400, 300)), "JPEG")[:900], "cannot be read as a picture"),
}
DEEP = Image.fromarray(np.full((30, 40), 65535, np.uint16))
KINDS = {
    "animated": (encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))] * 2), (255, 0, 0)),
    "cmyk": (encoded(RED.convert("CMYK"), "JPEG"), (255, 0, 0)),
    "of 16 bits": (encoded(DEEP), (255, 255, 255)),
    "transparent": (encoded(Image.new("RGBA", (40, 30), (0, 0, 0, 0))), (255, 255, 255)),
    "a turned photo": (turned(), (255, 0, 0)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_clear_message(name: str) -> None:
    content, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read_upload(content)


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_pictures_that_are_taken(name: str) -> None:
    content, colour = KINDS[name]
    image = read_upload(content)
    assert image.mode == "RGB" and image.size == ((20, 40) if name == "a turned photo" else (40, 30))
    assert np.abs(np.asarray(image).astype(int) - colour).max() < 4


def test_the_examples_ship_with_the_package() -> None:
    pictures = example_pictures(str(EXAMPLES), 32, 8)
    assert [picture.size for picture in pictures] == [(32, 32)] * 8
    assert len({picture.tobytes() for picture in pictures}) == 8


def test_a_picture_is_resampled_from_its_first_tokens(models: Models) -> None:
    tok = models.tokenizer
    picture = tokenized(tok, RED, 32)
    assert picture.image.size == (32, 32) and picture.tokens.shape == (tok.num_registers,)
    for kept in (1, tok.num_registers):
        (image,) = decoded(tok, mixed(picture.tokens, None, 0, kept)[None], QUICK, seed=3)
        given = {"num_steps": 2, "guidance": "none", "generator": torch.Generator().manual_seed(3)}
        direct = tok.detokenize(picture.tokens[None], num_tokens=kept, **given)
        levels = np.asarray(image).astype(float) / 127.5 - 1
        assert np.abs(levels - direct[0].permute(1, 2, 0).clamp(-1, 1).numpy()).max() <= 0.5 / 127.5 + 1e-6
    assert [tuple(map(int, image.size)) for image in decoded(tok, picture.tokens.repeat(3, 1), QUICK, 0)] == [
        (32, 32)
    ] * 3


def test_tokens_are_swapped_and_cut() -> None:
    first, second = torch.arange(4), torch.arange(10, 14)
    assert mixed(first, None, 1, 3).tolist() == [0, 1, 2]
    assert mixed(first, second, 1, 3).tolist() == [0, 11, 12]
    assert mixed(first, second, 0, 4).tolist() == second.tolist() and mixed(first, second, 4, 4).tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert origins(first, second, 1, 3) == [(0, "first"), (11, "second"), (12, "second"), (13, "cut")]
    assert [source for _, source in origins(first, None, 1, 3)] == ["first", "first", "first", "cut"]


def test_pictures_are_drawn_as_the_command_draws_them(models: Models) -> None:
    tokens = drawn(models, "c", 3, seed=5, cfg_scale=2.0, temperature=1.0, top_k=None, top_p=None)
    seeds = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    prior: Any = models.prior
    assert torch.equal(tokens, prior.generate(torch.full((3,), 2), cfg_scale=2.0, generator=seeds))
    alone = drawn(models, "c", 1, seed=6, cfg_scale=2.0, temperature=1.0, top_k=None, top_p=None)
    assert torch.equal(alone[0], tokens[1]), "a picture depends on its own seed only"
    with pytest.raises(ValueError, match="'cat'"):
        drawn(models, "cat", 1, 0, 1.0, 1.0, None, None)


def test_a_prior_of_texts_draws_what_is_written(models: Models) -> None:
    asked: list[str] = []

    def condition(prompt: Prompt) -> Any:
        asked.append(prompt.text)
        return CONDITIONS["text"]

    known = replace(models, prior=small_prior("text"), known=Conditions("text"), condition=condition)
    tokens = drawn(known, "a red apple", 2, 0, cfg_scale=1.0, temperature=1.0, top_k=5, top_p=0.9)
    assert tokens.shape == (2, known.prior.num_tokens) and asked == ["a red apple"]


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FunctionVerifier:
    (tmp_path / "likes_red.py").write_text(
        "def red(images, prompts, context):\n    return images[:, 0].double().mean((1, 2))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return FunctionVerifier("likes_red:red")


def test_a_search_shows_how_far_it_is(models: Models, red: FunctionVerifier) -> None:
    options = SearchOptions(num_candidates=3, beam_width=2, max_tokens=4, decoding=QUICK)
    found = list(searched(models, red, "b", options))
    assert [(each.steps, each.of_steps, each.num_tokens) for each in found] == [
        (1, 3, 1),
        (2, 3, 2),
        (3, 3, 4),
        (3, 3, 4),
    ]
    assert [each.cost.verifier_calls for each in found] == [3, 9, 15, 15]
    heights = [each.tree.height for each in found]
    assert heights == sorted(heights) and heights[2] == heights[3] > heights[0]
    for each in found:
        assert np.asarray(each.image)[..., 0].mean() == pytest.approx(each.score), "the picture that was judged"


def test_a_search_ends_where_nobody_looks(models: Models, red: FunctionVerifier) -> None:
    found = searched(models, red, "b", SearchOptions(num_candidates=3, beam_width=2, decoding=QUICK))
    next(found)
    found.close()
    with pytest.raises(ValueError, match="num_results=9"):
        list(searched(models, red, "b", SearchOptions(num_candidates=3, beam_width=2, num_results=9)))


def test_an_error_comes_after_what_was_reported() -> None:
    def work(report: Callable[[int], None]) -> None:
        report(1)
        raise ValueError("2 is missing")

    reports = reported(work)
    assert next(reports) == 1
    with pytest.raises(ValueError, match="2 is missing"):
        next(reports)


def test_without_its_package_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flextok_pl.app.page", "flextok_pl.cli.app"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"flextok app: error: needs gradio: pip install 'flextok_pl\[app\]'"):
        main(["app"])
