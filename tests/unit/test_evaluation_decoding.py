"""Decoding at many budgets: what goes into a call, and that it makes no difference to an image."""

from itertools import chain

import pytest
import torch

from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.evaluation.decoding import PIXELS_AT_ONCE, decode, images_at_once
from flextok_pl.flow.decoding import Decoding
from flextok_pl.models.tokenizer import FlexTok

KEYS = [f"picture{i}" for i in range(5)]
TOKENS = torch.arange(40).view(5, 8)
BUDGETS = [1, 2, 4, 8]


class Recorder:
    """Decodes an image whose pixels state its tokens and its noise; remembers the budgets of each call."""

    num_registers = 8

    def __init__(self):
        self.calls = []

    def detokenize(self, tokens, num_tokens, generator, num_steps, guidance, guidance_scale):
        assert tokens.shape == (len(num_tokens), num_tokens.max()) and len(generator) == len(tokens)
        self.calls.append(num_tokens.tolist())
        sums = torch.stack([row[:kept].sum() / 256 for row, kept in zip(tokens, num_tokens, strict=True)])
        noise = torch.stack([torch.rand(3, 2, 2, generator=g) for g in generator])
        return (sums[:, None, None, None] + noise) - 1


def decoded(tokenizer, at_once):
    images = decode(tokenizer, TOKENS, BUDGETS, Decoding(), KEYS, 0, at_once, lambda: None)
    return dict(images)


@pytest.mark.parametrize("at_once", [1, 3, 5, 7, 10, 12, 100])
def test_calls_are_full_and_images_the_same(at_once):
    alone, grouped = Recorder(), Recorder()
    expected, found = decoded(alone, None), decoded(grouped, at_once)
    assert alone.calls == [[budget] * 5 for budget in BUDGETS]
    assert list(found) == list(expected) == BUDGETS
    for budget in BUDGETS:
        assert found[budget].shape == (5, 3, 2, 2) and found[budget].equal(expected[budget]), budget
    assert [len(call) for call in grouped.calls[:-1]] == [at_once] * (-(-20 // at_once) - 1)
    assert [*chain(*grouped.calls)] == [*chain(*alone.calls)], "in ascending order, so that little is padded"


def test_budgets_come_as_soon_as_they_are_decoded():
    """A signal is heeded between calls, and images are not kept for long."""
    tokenizer, pauses = Recorder(), []
    images = decode(tokenizer, TOKENS, BUDGETS, Decoding(), KEYS, 0, 5, lambda: pauses.append(1))
    assert next(images)[0] == 1 and len(tokenizer.calls) == len(pauses) == 1
    assert next(images)[0] == 2 and len(tokenizer.calls) == len(pauses) == 2


@pytest.mark.parametrize("guidance", [Decoding(3, "none", 1.0), Decoding(3, "cfg", 2.0)])
def test_mixed_budgets_decode_the_images_of_one_each(guidance):
    tok = FlexTok.from_pretrained(DEMO_TOKENIZER)
    tokens = torch.randint(4375, (3, 64), generator=torch.Generator().manual_seed(0))
    options = (tok, tokens, [1, 7, 64], guidance, KEYS[:3], 0)
    alone, together = dict(decode(*options)), dict(decode(*options, at_once=9))
    for budget, images in alone.items():
        difference = (images.int() - together[budget].int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3, budget


def test_how_many_images_at_once():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert images_at_once(96, (64, 64), cpu) == 96, "a batch of one budget"
    assert images_at_once(8, (64, 64), gpu) == images_at_once(96, [64, 64], gpu) == PIXELS_AT_ONCE // 64**2
    assert images_at_once(8, (256, 256), gpu) == 32
    assert images_at_once(64, (256, 256), gpu) == 64, "the user's own batch has its place"
    assert images_at_once(8, [], gpu) == 8, "of generated images the size may be unknown"
