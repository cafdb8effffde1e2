"""Each verifier, made by options from small files of random weights."""

import json
import sys
from types import ModuleType

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from verifier_helpers import image_reward_state, pictures, random_tensors, write_clip, write_vocabulary

from flextok_pl.backbones import hpsv2
from flextok_pl.backbones.aesthetic import aesthetic_head
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.flow.decoding import Decoding
from flextok_pl.search import verifiers
from flextok_pl.search.prompts import Conditions
from flextok_pl.search.verifier import Context
from flextok_pl.search.verifier_options import VerifierOptions, build_verifiers

TIMM = "test_efficientnet"
CONTEXT = Context(torch.zeros(6, 3, dtype=torch.int64))


class Colours(nn.Module):
    """Takes the place of DreamSim's networks: an embedding is the picture at 4 x 4 pixels."""

    def embed(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) - 0.5

    def forward(self, first, second):
        return 1 - nn.functional.cosine_similarity(self.embed(first), self.embed(second))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where the weights are."""
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder / "clip")
    write_vocabulary(folder / "bert")
    shapes = {name: tuple(tensor.shape) for name, tensor in aesthetic_head(8).state_dict().items()}
    torch.save(random_tensors(shapes), folder / "aesthetic.pth")
    torch.save(image_reward_state(), folder / "ImageReward.pt")
    torch.manual_seed(0)
    network = timm.create_model(TIMM, pretrained=False)
    network.classifier.weight.data *= 1000
    torch.save(network.state_dict(), folder / "timm.pth")
    Image.fromarray(pictures(1, 40, seed=5)[0].permute(1, 2, 0).numpy()).save(folder / "reference.png")
    return folder


@pytest.fixture
def packages(files, tmp_path, monkeypatch):
    """A stand-in for DreamSim, and a small model in the place of HPSv2's."""
    module = ModuleType("dreamsim")
    to_tensor = __import__("torchvision").transforms.ToTensor()
    module.dreamsim = lambda **_: (Colours(), lambda picture: to_tensor(picture.resize((224, 224)))[None])
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    open_clip = pytest.importorskip("open_clip", reason="the extra `verifiers` is not installed")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "small-for-search.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path / "small-for-search.json")
    monkeypatch.setattr(hpsv2, "NETWORK", "small-for-search")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("small-for-search").state_dict(), files / "hpsv2.pt")


def options(name, files, **more):
    """Of a verifier that looks at images."""
    own = {
        "class": {"classifier": TIMM, "classifier_weights": files / "timm.pth"},
        "clip": {"clip": str(files / "clip")},
        "dreamsim": {"dreamsim_reference": files / "reference.png"},
        "aesthetic": {"aesthetic_weights": files / "aesthetic.pth", "aesthetic_clip": str(files / "clip")},
        "image_reward": {
            "image_reward_weights": files / "ImageReward.pt",
            "image_reward_tokenizer": str(files / "bert"),
        },
        "pickscore": {"pickscore": str(files / "clip")},
        "hpsv2": {"hpsv2_weights": files / "hpsv2.pt"},
    }
    return VerifierOptions(**{"verifiers": [name], **own[name], **more})


def prompts(count=6):
    return [
        Prompt(f"prompt {i}", label=i % 3, text=["a red apple", "blue trees", "on a tree"][i % 3]) for i in range(count)
    ]


@pytest.mark.parametrize("name", ["class", "clip", "dreamsim", "aesthetic", "image_reward", "pickscore", "hpsv2"])
def test_a_score_does_not_depend_on_its_batch(name, files, packages, monkeypatch):
    verifier = build_verifiers(options(name, files), prompts())
    images = pictures(6, 40)
    scores = verifier.score(images, prompts(), CONTEXT)
    assert verifier.name == name and verifier.needs_images
    assert scores.shape == (6,) and scores.dtype == torch.float64 and scores.device.type == "cpu"
    assert scores.unique().numel() == 6 and not scores.requires_grad
    close = {"atol": 1e-4 * scores.std().item(), "rtol": 0}
    order = torch.tensor([4, 2, 0])
    some = verifier.score(images[order], [prompts()[i] for i in order], CONTEXT)
    torch.testing.assert_close(some, scores[order], **close)
    monkeypatch.setattr(verifiers, "PART", 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(verifier.score(images, prompts(), CONTEXT), scores, **close)
    facts = verifier.facts
    assert facts["verifier"] == name and len(facts["weights_hash"]) == 16 and facts["network"]


def test_likelihood_is_per_token():
    verifier = build_verifiers(VerifierOptions())
    log_probs = torch.tensor([-6.0, -3.0, -1.5], dtype=torch.float64)
    context = Context(torch.zeros(3, 4, dtype=torch.int64), log_probs, torch.zeros(3, dtype=torch.float64))
    assert not verifier.needs_images and verifier.facts == {"verifier": "likelihood"}
    assert verifier.score(None, prompts(3), context).tolist() == [-1.5, -0.75, -0.375]
    with pytest.raises(ValueError, match="verifier='likelihood' needs the log-probabilities of tokens"):
        verifier.score(None, prompts(3), Context(torch.zeros(3, 4)))


def test_the_class_is_the_one_asked_for(files):
    verifier = build_verifiers(options("class", files))
    images = pictures(1, 40).expand(4, -1, -1, -1)
    asked = [Prompt("x", label=label) for label in (0, 7, 999, 7)]
    probabilities = verifier.classifier.probabilities(images[:1], torch.zeros(1, 0))[0]
    found = verifier.score(images, asked, CONTEXT)
    torch.testing.assert_close(found, probabilities[[0, 7, 999, 7]].double(), rtol=1e-4, atol=1e-9)


class Mirror:
    """A tokenizer whose tokens are pictures, and whose pictures are as they were."""

    num_registers = 4

    def tokenize(self, images, num_tokens=None):
        self.images = images
        return torch.zeros(len(images), 4, dtype=torch.int64)

    def detokenize(self, tokens, **options):
        self.options = options
        return self.images


def test_a_probe_is_fitted_to_the_tokenizers_images(image_shards, tmp_path):
    given = {"classifier": "probe", "classifier_data": str(image_shards / "train"), "classifier_cache": tmp_path}
    asked = VerifierOptions(verifiers=["class"], **given)
    known, mirror = Conditions("class", 2, ("left", "right")), Mirror()
    verifier = build_verifiers(asked, (), known, mirror, 32, Decoding(num_steps=3))
    assert mirror.options["num_steps"] == 3 and verifier.classifier.num_classes == 2
    images = pictures(3)
    scores = verifier.score(images, [Prompt("a", label=1)] * 3, CONTEXT)
    expected = verifier.classifier.probabilities(images, build_extractor("effnet-lite0")(images))[:, 1]
    torch.testing.assert_close(scores, expected.double(), rtol=1e-4, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1
    build_verifiers(asked, (), known, Mirror(), 32, Decoding(num_steps=3))  # from there: it decodes nothing
    with pytest.raises(ValueError, match="classifier='probe' learns from images of a tokenizer"):
        build_verifiers(asked, (), known)
    with pytest.raises(ValueError, match="classifier_data=.* and the prior differ in classes"):
        build_verifiers(asked, (), Conditions("class", 2, ("up", "down")), mirror, 32)


def test_each_prompt_may_have_a_reference_of_its_own(files, packages, tmp_path):
    images = pictures(2, 40)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    verifier = build_verifiers(VerifierOptions(verifiers=["dreamsim"]))
    asked = [Prompt(f"{i}", metadata={"reference": str(tmp_path / f"{i}.png")}) for i in range(2)]
    verifier.check(asked)
    assert verifier.score(images, asked, CONTEXT).tolist() == pytest.approx([1, 1])
    others = verifier.score(images.flip(0), asked, CONTEXT)
    assert (others < 0.99).all() and others[0].item() == pytest.approx(others[1].item(), abs=1e-5)


FUNCTIONS = """
import torch

def redness(images, prompts, context):
    return images[:, 0].float().mean((1, 2)) - context.tokens[:, 0] - len(prompts[0].text)

def last(images, prompts, context):
    assert images is None
    return context.tokens[:, -1]

last.needs_images = False

def short(images, prompts, context):
    return torch.zeros(1)

def silent(images, prompts, context):
    pass

def undefined(images, prompts, context):
    return torch.tensor([0.0, float("nan")])

def failing(images, prompts, context):
    raise OSError("the disk is full")

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "functions_of_a_user.py").write_text(FUNCTIONS)
    yield "functions_of_a_user"
    sys.modules.pop("functions_of_a_user", None)


def test_a_python_function(module):
    images, context = pictures(2), Context(torch.tensor([[5, 6], [7, 8]]))
    verifier = build_verifiers(VerifierOptions(verifiers=[f"{module}:redness"]))
    red = images[:, 0].double().mean((1, 2))
    expected = red - torch.tensor([5, 7]) - len("a red apple")
    torch.testing.assert_close(verifier.score(images, prompts(2), context), expected, rtol=1e-5, atol=1e-4)
    last = build_verifiers(VerifierOptions(verifiers=[f"{module}:last"]))
    assert not last.needs_images and last.score(None, prompts(2), context).tolist() == [6, 8]


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("short", ValueError, r"verifier='\w+:short' gives a tensor \(1,\), not a tensor \(2,\) of scores"),
        ("silent", ValueError, r"verifier='\w+:silent' gives NoneType, not"),
        ("undefined", ValueError, r"verifier='\w+:undefined' gives NaN as a score of the prompt 'prompt 1'"),
        ("failing", OSError, "the disk is full"),
    ],
)
@pytest.mark.parametrize("others", [[], ["likelihood"]])
def test_a_failure_stops_the_search(module, name, error, message, others):
    verifier = build_verifiers(VerifierOptions(verifiers=[*others, f"{module}:{name}"]))
    context = Context(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(error, match=message):
        verifier.score(pictures(2), prompts(2), context)


def test_functions_that_are_not_there(module):
    for path, complaint in (
        ("module_of_nowhere:f", "there is no module module_of_nowhere; give MODULE:FUNCTION"),
        (f"{module}:nothing", "has no function nothing; give MODULE:FUNCTION"),
        (f"{module}:number", "has no function number"),
    ):
        with pytest.raises(ValueError, match=f"verifier='{path}': .*{complaint}"):
            build_verifiers(VerifierOptions(verifiers=[path]))


@pytest.mark.parametrize(
    "name, prompt, lack",
    [
        ("class", Prompt("a cat", text="a cat"), "no class"),
        ("class", Prompt("a", label=1000), "class 1000, which is not among its 1000 classes"),
        ("clip", Prompt("class 3 sample 0", label=3), "no text"),
        ("pickscore", Prompt("x", text=" "), "no text"),
        ("hpsv2", Prompt("x"), "no text"),
        ("image_reward", Prompt("x"), "no text"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused_at_the_start(name, prompt, lack, files, packages):
    good = Prompt("y", label=1, text="a tree")
    for given in ([name], [name, "likelihood"]):
        with pytest.raises(
            ValueError, match=f"verifier='{name}' cannot judge the prompt '{prompt.key}', which has {lack}:"
        ):
            build_verifiers(options(name, files, verifiers=given), [good, prompt])
        build_verifiers(options(name, files, verifiers=given), [good])


def test_prompts_without_a_reference_are_refused_at_the_start(packages, files):
    asked = VerifierOptions(verifiers=["dreamsim"])
    with pytest.raises(ValueError, match="'a', which has no reference picture in its metadata: give it one"):
        build_verifiers(asked, [Prompt("a")])
    with pytest.raises(ValueError, match="'a', which has no reference picture at /nowhere.png"):
        build_verifiers(asked, [Prompt("a", metadata={"reference": "/nowhere.png"})])
    with pytest.raises(ValueError, match=r"/nowhere.png: .*No such file"):
        build_verifiers(VerifierOptions(verifiers=["dreamsim"], dreamsim_reference="/nowhere.png"), [Prompt("a")])


def test_a_classifier_of_other_classes(files):
    with pytest.raises(ValueError, match="has 1000 classes, but the prior has 5"):
        build_verifiers(options("class", files), (), Conditions("class", 5))
