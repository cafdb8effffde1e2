"""The aesthetic predictor on a tiny CLIP of random weights."""

import sys

import pytest
import torch
from verifier_helpers import pictures, random_tensors, transformers, write_clip

from flextok_pl.backbones.aesthetic import AestheticScore, aesthetic_head


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def file(tmp_path):
    shapes = {name: tuple(tensor.shape) for name, tensor in aesthetic_head(8).state_dict().items()}
    torch.save(random_tensors(shapes), tmp_path / "head.pth")
    return tmp_path / "head.pth"


def test_the_published_file_has_these_tensors():
    found = {name: tuple(tensor.shape) for name, tensor in aesthetic_head(768).state_dict().items()}
    widths, layers = [768, 1024, 128, 64, 16, 1], [0, 2, 4, 6, 7]
    weights = {f"layers.{i}.weight": (b, a) for i, a, b in zip(layers, widths[:-1], widths[1:], strict=True)}
    assert found == weights | {f"layers.{i}.bias": (b,) for i, b in zip(layers, widths[1:], strict=True)}


def test_a_rating_is_a_linear_map_of_the_normalised_embedding(clip_folder, file):
    score, images = AestheticScore(file, clip_folder), pictures(3, 20)
    ratings = score(images)
    assert ratings.shape == (3,) and ratings.dtype == torch.float64 and score.name == "aesthetic"
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip_folder)(list(images), return_tensors="pt")
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(**pixels).pooler_output)
    x, state = seen / seen.norm(dim=1, keepdim=True), torch.load(file)
    for layer in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    torch.testing.assert_close(ratings, x[:, 0].double(), atol=1e-4, rtol=1e-4)
    assert (ratings[0] - ratings[1]).abs() > 1e-3
    torch.testing.assert_close(score(images[1:2]), ratings[1:2], atol=1e-5, rtol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(images), ratings)


def test_what_is_missing(clip_folder, file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"aesthetic_weights=null: .* fetch https://github.com/christophschuhmann/"):
        AestheticScore(None, clip_folder)
    with pytest.raises(ValueError, match=r"aesthetic_weights='/nowhere' is not a file"):
        AestheticScore("/nowhere", clip_folder)
    with pytest.raises(ValueError, match=r"(?s)aesthetic_clip='/nowhere' cannot be loaded .*give its folder"):
        AestheticScore(file, "/nowhere")
    torch.save(aesthetic_head(768).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        ValueError, match=r"(?s)verifier='aesthetic', aesthetic_weights='.*wide.pth' .*size mismatch.*that it"
    ):
        AestheticScore(tmp_path / "wide.pth", clip_folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"aesthetic_clip='.*' needs the package transformers: .*flextok_pl\[text\]"):
        AestheticScore(file, clip_folder)
