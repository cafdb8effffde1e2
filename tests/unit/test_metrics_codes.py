"""Token statistics on counts made by hand."""

import math

import pytest
import torch

from flextok_pl.metrics.codes import class_information, codebook_use, distinct_tokens, perplexity, position_entropy

TOKENS = torch.tensor([[0, 7, 3], [0, 7, 4], [0, 5, 5], [0, 6, 6]])


def test_use():
    assert distinct_tokens(TOKENS) == 6
    assert codebook_use(TOKENS, 8) == 6 / 8
    with pytest.raises(ValueError, match=r"0\.\.7, outside vocab_size=7"):
        codebook_use(TOKENS, 7)


def test_entropy_of_each_position():
    assert position_entropy(TOKENS).tolist() == pytest.approx([0.0, 1.5, 2.0])


def test_entropy_agrees_with_a_count_per_position():
    tokens = torch.randint(0, 9, (200, 13), generator=torch.Generator().manual_seed(0))
    for position, entropy in enumerate(position_entropy(tokens).tolist()):
        share = torch.bincount(tokens[:, position]).double() / 200
        assert entropy == pytest.approx(float(-(share[share > 0] * share[share > 0].log2()).sum()))


def test_information_about_the_class():
    """One position states one of two bits of the class, one states nothing in few ids, one nothing in many."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(500)
    said = labels // 2 * 7
    few, many = (torch.randint(0, count, (2000,), generator=generator) for count in (3, 5000))
    information = class_information(torch.stack([said, few, many], 1), labels)
    assert information[0] == pytest.approx(1, abs=0.01)
    assert information[1:].abs().max() < 0.02, "although the plug-in estimate of the last is about 1.6 bits"
    assert class_information(labels[:, None], labels)[0] == pytest.approx(2, abs=0.01), "the entropy of the class"
    some = labels.clone()
    some[::2] = -1
    assert class_information(said[:, None], some)[0] == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="no sample has a class"):
        class_information(said[:, None], torch.full_like(labels, -1))


def test_perplexity_of_uniform_tokens_is_their_number():
    assert perplexity(torch.arange(12).reshape(3, 4)) == pytest.approx(12)
    assert perplexity(torch.zeros(5, 2, dtype=torch.int64)) == pytest.approx(1)
    assert math.log2(perplexity(TOKENS)) > position_entropy(TOKENS).mean()
