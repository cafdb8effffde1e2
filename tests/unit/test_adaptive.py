"""As few tokens as a quality takes: the search, alone and through `FlexTok.tokenize`."""

import math

import pytest
import torch

from flextok_pl import FlexTok, FlexTokConfig, Quality
from flextok_pl.flow.decoding import UNGUIDED
from flextok_pl.models.adaptive import smallest_budgets, squared_error
from flextok_pl.models.perceptual import PerceptualDistance


def search(count, most, distance_at, target):
    """The budgets of `count` images whose distances are known, and how many were decoded each time."""
    asked = []

    def detokenize(tokens, num_tokens, **options):
        asked.append(len(tokens))
        return num_tokens

    tokens = torch.zeros(count, most, dtype=torch.int64)
    return smallest_budgets(
        torch.arange(count), tokens, (4, 4), Quality(target, distance_at), UNGUIDED, detokenize
    ), asked


@pytest.mark.parametrize("most", [1, 2, 7, 16])
def test_the_search_finds_the_smallest_budget(most):
    """Image i reaches the target from budget i + 1 on; those beyond K never do."""
    found, asked = search(most + 2, most, lambda which, budgets: torch.where(budgets > which, 0.5, 0.6), 0.5)
    assert found.tolist() == [*range(1, most + 1), most, most]
    assert len(asked) <= math.ceil(math.log2(most)) if most > 1 else not asked
    assert asked == sorted(asked, reverse=True), "images that are done are not decoded again"


def test_the_search_is_sound_where_quality_does_not_rise_with_the_budget():
    distances = torch.rand(200, 33, generator=torch.Generator().manual_seed(0))
    found, _ = search(200, 32, lambda which, k: distances[which, k], 0.3)
    reached = distances[torch.arange(200), found] <= 0.3
    assert (reached | (found == 32)).all() and reached.float().mean() > 0.5


@pytest.fixture(scope="module")
def tok():
    torch.manual_seed(0)
    tok = FlexTok(FlexTokConfig.preset("tiny")).eval()
    # A fresh decoder ignores its tokens: adaLN-zero. Give it something to say.
    generator = torch.Generator().manual_seed(1)
    for parameter in tok.decoder.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return tok


def images(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1


def error_at(tok, batch, tokens):
    """Each image alone, from the noise of seed 0."""
    errors = []
    for image, row in zip(batch, tokens, strict=True):
        generator = torch.Generator().manual_seed(0)
        made = tok.detokenize(row[None], num_steps=2, guidance="none", guidance_scale=1.0, generator=generator)
        errors.append(squared_error(image[None], made))
    return torch.cat(errors)


def test_a_target_is_a_number():
    with pytest.raises(ValueError, match="target=nan"):
        Quality(math.nan)


def test_tokens_of_a_quality(tok):
    batch = images(6)
    whole = tok.tokenize(batch)
    at_all = torch.stack([error_at(tok, batch, whole[:, :k]) for k in range(1, 17)], 1)  # (6, 16)
    target = float(at_all.quantile(0.4))
    tokens = tok.tokenize(batch, quality=Quality(target, num_steps=2))
    assert len({len(row) for row in tokens}) > 1, "budgets differ"
    assert all(torch.equal(row, every[: len(row)]) for row, every in zip(tokens, whole, strict=True))
    reached = error_at(tok, batch, tokens) <= target * (1 + 1e-4)
    assert (reached | torch.tensor([len(row) == 16 for row in tokens])).all() and reached.any()
    assert tok.detokenize(tokens, num_steps=1, guidance="none", guidance_scale=1.0).shape == batch.shape
    alone = tok.tokenize(batch[3:4], quality=Quality(target, num_steps=2))
    assert torch.equal(alone[0], tokens[3]), "an image's budget does not depend on its batch"
    assert [len(row) for row in tok.tokenize(batch, quality=Quality(1e9))] == [1] * 6
    assert [len(row) for row in tok.tokenize(batch, 5, quality=Quality(-1.0, num_steps=1))] == [5] * 6


def test_other_distances(tok):
    batch = images(2)
    distance = PerceptualDistance("effnet-lite0").eval().requires_grad_(False)
    each = distance.each(batch, batch.flip(0))
    assert each.shape == (2,) and distance(batch, batch.flip(0)) == pytest.approx(float(each.mean()), rel=1e-6)
    assert len(tok.tokenize(batch, quality=Quality(1e9, distance.each, num_steps=1))[0]) == 1
