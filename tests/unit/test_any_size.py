"""Pictures of any size through a tokenizer of one size: fitted into its image, or on tiles without seams."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from flextok_pl import reconstruct
from flextok_pl.config import FlexTokConfig
from flextok_pl.models.any_size import Tiling, _starts, tokenize_picture
from flextok_pl.models.tokenizer import FlexTok

SIDE = 32  # pixels of the tiny tokenizer's images
QUICK = {"num_steps": 2, "guidance": "none"}


@pytest.fixture(scope="module")
def tok() -> FlexTok:
    torch.manual_seed(0)
    model = FlexTok(dataclasses.replace(FlexTokConfig.preset("tiny"), encoder_depth=1, decoder_depth=1)).eval()
    torch.nn.init.normal_(model.decoder.head.proj.weight, std=0.02)  # a new decoder's is zero
    return model


def smooth(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """A picture without fine detail, in [-1, 1]."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([torch.sin(3 * y + i * x) for i in range(channels)]) * 0.9


@pytest.mark.parametrize(("length", "tile", "overlap"), [(8, 8, 2), (9, 8, 2), (40, 8, 2), (41, 8, 4), (17, 8, 0)])
def test_tiles_cover_a_length(length: int, tile: int, overlap: int) -> None:
    starts = _starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] == length - tile
    gaps = [after - before for before, after in pairwise(starts)]
    assert all(0 < gap <= tile - overlap for gap in gaps)
    assert len(starts) == 1 + math.ceil((length - tile) / (tile - overlap)), "and no more than it takes"


def test_what_agrees_stays_as_it_is() -> None:
    tiling = Tiling((12, 17), (8, 8), _starts(12, 8, 2), _starts(17, 8, 2), (2, 2)).scaled(2)
    canvas = torch.randn(4, 24, 34)
    tiles = tiling.cut(canvas)
    assert tiles.shape == (len(tiling.places), 4, 16, 16)
    assert torch.allclose(tiling.blend(tiles), canvas, atol=1e-6)
    apart = tiles + torch.tensor([1.0, -1.0] * 3)[:, None, None, None]  # as on a chessboard of 2 x 3
    agreeing = tiling.agreeing(apart)
    assert torch.allclose(tiling.agreeing(agreeing), agreeing, atol=1e-5)
    jumps = (tiling.blend(apart) - canvas).diff(dim=2).abs().amax()
    assert jumps < 1.0, "tiles that differ by 2 pass into each other"


def test_an_image_of_its_own_size_is_tokenized_as_ever(tok: FlexTok) -> None:
    picture = smooth(SIDE, SIDE)
    tokens = tok.tokenize(picture[None])
    made = tokenize_picture(tok, picture)
    assert torch.equal(made.tokens, tokens) and torch.equal(made.picture, picture)
    expected = tok.detokenize(tokens, 4, 2, "none", generator=torch.Generator().manual_seed(3))[0]
    assert torch.equal(made.decode(tok, 4, 3, **QUICK), expected)
    assert torch.equal(reconstruct(tok, picture, 4, seed=3, **QUICK), expected)
    assert reconstruct(tok, smooth(2 * SIDE, 2 * SIDE), **QUICK).abs().amax() > 2, "resized, and not clamped"
    tokenize_picture(tok, 2 * smooth(40, 40).sign())  # overshoots when it is resized


@pytest.mark.parametrize(
    ("size", "fitted"), [((100, 50), (32, 16)), ((21, 64), (10, 32)), ((16, 12), (32, 24)), ((1, 300), (1, 32))]
)
def test_a_picture_keeps_its_aspect_and_its_edges(tok: FlexTok, size: tuple[int, int], fitted: tuple[int, int]) -> None:
    picture = smooth(*size)
    made = tokenize_picture(tok, picture)
    assert made.picture.shape[1:] == fitted and made.tokens.shape == (1, 16)
    for corner in ((0, 0), (-1, -1), (0, -1)):
        assert (made.picture[:, *corner] - picture[:, *corner]).abs().amax() < 0.25, "nothing is cut off"
    assert reconstruct(tok, picture, **QUICK).shape == picture.shape


def test_tiles_keep_the_size(tok: FlexTok) -> None:
    picture = smooth(50, 75)
    made = tokenize_picture(tok, picture, tiled=True)
    assert torch.equal(made.picture, picture) and len(made.tokens) == 2 * 3
    whole = reconstruct(tok, picture, tiled=True, **QUICK)
    assert whole.shape == picture.shape
    assert torch.equal(whole, reconstruct(tok, picture, tiled=True, **QUICK)), "the seed decides"
    assert len(tokenize_picture(tok, smooth(20, 75), tiled=True).tokens) == 3
    small = tokenize_picture(tok, smooth(20, 30), tiled=True)
    assert small.picture.shape[1:] == (21, 32) and len(small.tokens) == 1


def test_tiles_are_decoded_together(tok: FlexTok) -> None:
    """A decoder that is the same function of position under each tile gives one picture: no seam anywhere."""
    picture = smooth(32, 80)
    made = tokenize_picture(tok, picture, tiled=True)
    together = made.decode(tok, 16, **QUICK)
    tiling = made.tiling.scaled(2)
    alone = torch.stack(
        [
            tok.detokenize(tokens[None], 16, 2, "none", generator=torch.Generator().manual_seed(i))[0]
            for i, tokens in enumerate(made.tokens)
        ]
    )
    middle = tiling.columns[1] + 2  # inside the overlap
    left, right = (alone[i][:, :, middle - tiling.columns[i]] for i in (0, 1))
    cut = tiling.cut(together)
    same = [cut[i][:, :, middle - tiling.columns[i]] for i in (0, 1)]
    assert torch.equal(*same) and (left - right).abs().mean() > 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tok: reconstruct(tok, smooth(40, 40), tiled=True, overlap=0.7), "overlap=0.7 must be a share"),
        (lambda tok: reconstruct(tok, smooth(40, 40)[0]), "images have shape"),
        (lambda tok: reconstruct(tok, torch.zeros(3, 0, 5)), "at least one pixel"),
        (lambda tok: reconstruct(tok, 255 * smooth(40, 40).abs()), "turn pixels in 0..255 into pixels / 127.5 - 1"),
        (lambda tok: reconstruct(tok, smooth(32, 32, 4)), r"\(1, 4, 32, 32\); they must be \(B, 3, H, W\)"),
        (lambda tok: reconstruct(tok, smooth(32, 32), 17, **QUICK), "num_tokens=17"),
    ],
)
def test_bad_input(tok: FlexTok, call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tok)  # type: ignore[operator]


def test_a_model_of_several_shapes_takes_the_nearest() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(FlexTokConfig.preset("tiny"), encoder_depth=1, trained_grids=((6, 6), (4, 8), (8, 4)))
    tok = FlexTok(config).eval()
    assert tok.latent_size == (12, 12)
    for size, fitted, canvas in (
        ((60, 130), (15, 32), (8, 16)),
        ((90, 40), (32, 14), (16, 8)),
        ((50, 40), (24, 19), (12, 12)),
    ):
        made = tokenize_picture(tok, smooth(*size))
        assert (made.picture.shape[1:], made.tiling.canvas) == (fitted, canvas)
    with pytest.raises(ValueError, match=r"trained_grids=\(\(9, 8\),\) has more patches than grid_size=\(8, 8\)"):
        dataclasses.replace(config, trained_grids=((9, 8),))
