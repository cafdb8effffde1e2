"""HPSv2 at a small size, and what is said where its package or weights are missing."""

import json
import sys

import pytest
import torch
from torchvision.transforms.functional import to_pil_image
from verifier_helpers import pictures

from flextok_pl.backbones import hpsv2
from flextok_pl.backbones.hpsv2 import HPSv2

TEXTS = ["a red house", "two cats", "a red house"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Random weights as published, of a small model that takes the place of ViT-H-14."""
    open_clip = pytest.importorskip("open_clip", reason="the extra `verifiers` is not installed")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small-for-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    monkeypatch.setattr(hpsv2, "NETWORK", "small-for-hps")
    torch.manual_seed(0)
    network = open_clip.create_model("small-for-hps").eval()
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    return network, tmp_path / "HPS_v2.1_compressed.pt"


def test_scores_are_cosines(small):
    import open_clip

    network, file = small
    score, images = HPSv2(file), pictures(3, 40)
    scores = score(images, TEXTS)
    assert scores.shape == (3,) and scores.dtype == torch.float64
    prepare, words = open_clip.image_transform(32, is_train=False), open_clip.get_tokenizer("small-for-hps")
    with torch.no_grad():
        for image, text, value in zip(images, TEXTS, scores, strict=True):
            seen = network.encode_image(prepare(to_pil_image(image))[None])
            read = network.encode_text(words([text]))
            assert value.item() == pytest.approx(torch.cosine_similarity(seen, read).item(), abs=1e-5)
    assert (scores[0] - scores[2]).abs() > 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(images, TEXTS), scores)


def test_wide_images_are_padded_with_black(small):
    score = HPSv2(small[1])
    wide = pictures(1)[:, :, :16]  # 32 x 16
    black = torch.zeros(1, 3, 8, 32, dtype=torch.uint8)
    torch.testing.assert_close(score(wide, TEXTS[:1]), score(torch.cat([black, wide, black], 2), TEXTS[:1]))


def test_what_is_missing(small, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"hpsv2_weights='/nowhere' is not a file; give the weights of hpsv2"):
        HPSv2("/nowhere")
    with pytest.raises(ValueError, match=r"verifier='hpsv2' cannot be loaded .*give hpsv2_weights, the file HPS_v2.1"):
        HPSv2()
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"(?s)hpsv2_weights='.*other.pt' cannot .*Missing key.*give hpsv2_weights"):
        HPSv2(tmp_path / "other.pt")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"verifier='hpsv2' needs the package open_clip: .*flextok_pl\[verifiers\]"):
        HPSv2(small[1])
