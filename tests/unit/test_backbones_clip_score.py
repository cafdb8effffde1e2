"""CLIP score and PickScore with a tiny model of random weights."""

import pytest
import torch
from verifier_helpers import transformers, write_clip

from flextok_pl.backbones.clip_score import CLIPScore, PickScore

CAPTIONS = ["a cat", "dog", "a caption that is longer than the model has places for text"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def _images(count):
    return torch.randint(0, 256, (count, 3, 20, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_scores_are_cosines_of_separate_embeddings(clip_folder):
    clip, images = CLIPScore(clip_folder), _images(3)
    scores = clip(images, CAPTIONS)
    assert scores.shape == (3,) and scores.dtype == torch.float64
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    processor = transformers.CLIPProcessor.from_pretrained(clip_folder)
    for image, caption, score in zip(images, CAPTIONS, scores.tolist(), strict=True):
        inputs = processor(text=[caption], images=[image], return_tensors="pt")
        inputs["input_ids"][:, 11:12] = 53  # the last place is the end of a text that is cut
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
            read = model.text_projection(model.text_model(inputs["input_ids"][:, :12]).pooler_output)
        assert score == pytest.approx(100 * torch.cosine_similarity(seen, read).item(), abs=1e-3)
    assert (scores - clip(images, CAPTIONS[::-1]))[[0, 2]].abs().min() > 0.1


def test_precision_does_not_follow_autocast(clip_folder):
    clip, images = CLIPScore(clip_folder), _images(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = clip(images, CAPTIONS)
    assert torch.equal(inside, clip(images, CAPTIONS))


def test_weights_in_half_precision_compute_in_float32(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    model = transformers.CLIPModel.from_pretrained(clip_folder).half()
    model.save_pretrained(tmp_path)
    transformers.CLIPProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    clip = CLIPScore(f"~/{tmp_path.name}")
    assert {p.dtype for p in clip.network.parameters()} == {torch.float32}
    images = _images(3)
    torch.testing.assert_close(clip(images, CAPTIONS), CLIPScore(clip_folder)(images, CAPTIONS), atol=1, rtol=0)


def test_a_text_is_read_once_for_all_its_images(clip_folder):
    clip, images, read = CLIPScore(clip_folder), _images(4), []
    clip.network.text_model.register_forward_pre_hook(
        lambda module, args, words: read.append(len(words["input_ids"])), with_kwargs=True
    )
    together = clip(images, ["cat", "dog", "cat", "cat"])
    assert read == [2]
    for i, text in enumerate(["cat", "dog", "cat", "cat"]):
        assert together[i].item() == pytest.approx(clip(images[i : i + 1], [text]).item(), abs=1e-4)


def test_pickscore_is_the_cosine_times_the_learned_temperature(clip_folder, tmp_path):
    images = _images(3)
    cosines = CLIPScore(clip_folder)(images, CAPTIONS) / 100
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pickscore='.*' cannot be loaded .*laion/CLIP-ViT-H-14.*give its folder"):
        PickScore(tmp_path)  # a folder without a processor takes that of the model that it was tuned from
    transformers.CLIPProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    scores = PickScore(tmp_path)(images, CAPTIONS)
    torch.testing.assert_close(scores, cosines * torch.tensor(3.0).double().exp(), atol=1e-6, rtol=0)


def test_a_folder_without_some_weights_is_refused(clip_folder, tmp_path):
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    state = {name: value for name, value in model.state_dict().items() if name != "text_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    transformers.CLIPProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"clip='.*' cannot be loaded .*lacks text_projection.weight"):
        CLIPScore(tmp_path)


@pytest.mark.parametrize("model", ["openai/clip-vit-base-patch32", "/nowhere/clip"])
def test_a_model_that_cannot_be_had(model):
    with pytest.raises(ValueError, match=rf"(?s)clip='{model}' cannot be loaded .*give its folder"):
        CLIPScore(model)
