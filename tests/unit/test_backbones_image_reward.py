"""ImageReward at a small size, beside values of the code of its authors."""

import pytest
import torch
from verifier_helpers import image_reward_state, pictures, write_vocabulary

from flextok_pl.backbones.image_reward import ImageReward

TEXTS = ["a red apple", "the blue trees on a tree", "apple " * 50]
PUBLISHED = [26.88764190673828, 14.19570255279541, 22.59297752380371]
"""Rewards of these texts and `pictures(3)` by ImageReward's own code (THUDM/ImageReward, blip_pretrain.py and
ImageReward.py at its main branch) with the same tensors, one image at a time."""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("bert"))


def written(folder, state):
    torch.save(state, folder / "ImageReward.pt")
    return folder / "ImageReward.pt"


def test_rewards_are_those_of_the_published_code(tmp_path, vocabulary):
    reward = ImageReward(written(tmp_path, image_reward_state()), vocabulary)
    rewards = reward(pictures(3), TEXTS)
    assert rewards.shape == (3,) and rewards.dtype == torch.float64
    assert rewards.tolist() == pytest.approx(PUBLISHED, abs=2e-4)
    alone = [reward(pictures(3)[i : i + 1], TEXTS[i : i + 1]).item() for i in range(3)]
    assert rewards.tolist() == pytest.approx(alone, abs=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(pictures(3), TEXTS), rewards)


def test_other_sizes_are_read_off_the_tensors(tmp_path, vocabulary):
    reward = ImageReward(written(tmp_path, image_reward_state(width=64, depth=1, side=48)), vocabulary)
    assert reward(pictures(2, size=20), TEXTS[:2]).isfinite().all()


def test_what_is_wrong_with_a_file(tmp_path, vocabulary):
    state = image_reward_state()
    for change, complaint in (
        (lambda: state.pop("mlp.layers.4.bias"), r"Missing key.*layers\.4\.bias"),
        (lambda: state.update({"mlp.layers.4.bias": torch.zeros(64), "extra": torch.zeros(1)}), "holds extra"),
    ):
        change()
        with pytest.raises(
            ValueError, match=f"(?s)verifier='image_reward', image_reward_weights='.*' cannot .*{complaint}.*give Image"
        ):
            ImageReward(written(tmp_path, state), vocabulary)
    with pytest.raises(ValueError, match=r"image_reward_weights='/nowhere' is not a file; give the weights"):
        ImageReward("/nowhere", vocabulary)
    with pytest.raises(
        ValueError, match=r"verifier='image_reward' cannot be loaded .*huggingface.co/THUDM/ImageReward"
    ):
        ImageReward(None, vocabulary)
    state.pop("extra")
    with pytest.raises(ValueError, match=r"(?s)image_reward_tokenizer='/nowhere' cannot be loaded.*give its folder"):
        ImageReward(written(tmp_path, state), "/nowhere")
