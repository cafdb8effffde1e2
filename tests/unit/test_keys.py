"""Choices and noise that depend on sample keys only."""

import torch

from flextok_pl.keys import choose_fraction, images_hash, key_hash, sample_generators

KEYS = [f"n{i:05d}" for i in range(4000)]


def test_hashes_are_fixed_for_all_time():
    """Golden values: a change would move every published number's noise."""
    assert key_hash("n00001") == 6603998432876992609
    assert key_hash("n00001", "noise 0") == 6103556225278418262


def test_noise_is_the_samples_own():
    def draw(keys, seed):
        return [torch.randn(3, generator=generator) for generator in sample_generators(keys, seed)]

    alone, together = draw(["b"], 0), draw(["a", "b", "c"], 0)
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(draw(["b"], 1)[0], alone[0])


def test_a_fraction_is_about_that_and_choices_are_independent():
    half = choose_fraction(KEYS, 0.5, "one")
    other = choose_fraction(KEYS, 0.5, "two")
    assert abs(half.float().mean() - 0.5) < 0.04
    assert abs((half & other).float().mean() - 0.25) < 0.04
    assert choose_fraction(KEYS, 1.0, "one").all()
    assert (choose_fraction(KEYS, 0.1, "one") <= half).all(), "a smaller choice lies within a larger one"


def test_images_hash_sees_keys_and_pixels_but_no_order():
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[0, 0, 0, 0] ^= 1
    whole = images_hash(images, ["a", "b", "c"])
    assert whole not in {images_hash(images, ["a", "b", "d"]), images_hash(changed, ["a", "b", "c"])}
    in_parts = images_hash(images[:1], ["a"], images_hash(images[[2, 1]], ["c", "b"]))
    assert in_parts == whole and -(2**63) <= whole < 2**63
