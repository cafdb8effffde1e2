"""The CLIP score with a tiny model of random weights."""

import json

import pytest
import torch

from flextok_pl.backbones.clip_score import CLIPScore

transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
CAPTIONS = ["a cat", "dog", "a caption that is longer than the model has places for text"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP whose text is single letters, of at most 12 places, and whose images have 16 px."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 54, "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("model", ["openai/clip-vit-base-patch32", "/nowhere/clip"])
def test_a_model_that_cannot_be_had(model):
    with pytest.raises(ValueError, match=rf"(?s)clip='{model}' cannot be loaded .*give its folder"):
        CLIPScore(model)
