"""DreamSim: what its package is given and what becomes of its values, by a stand-in; the package itself where it is."""

import inspect
import json
import sys
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from flextok_pl.backbones.dreamsim import DreamSim
from flextok_pl.callbacks import ReconstructionFID
from flextok_pl.evaluation.reconstruction_statistics import ReconstructionStatistics


class Recorder(nn.Module):
    """Remembers what it is called with; the distance is the mean of the first image less that of the second."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, img_a, img_b):
        self.calls.append((img_a, img_b))
        return (img_a - img_b).mean((1, 2, 3)) * self.scale


def reference_preprocess(picture):
    """The published one: bicubic to 224 px, without regard to the aspect, and [0, 1]."""
    size = transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.ToTensor()(size(picture.convert("RGB"))).unsqueeze(0)


@pytest.fixture
def stand_in(monkeypatch):
    """A module `dreamsim` with the package's function of that name; `given` holds the arguments of its last call."""

    def dreamsim(
        pretrained=True,
        device="cuda",
        cache_dir="./models",
        normalize_embeds=True,
        dreamsim_type="ensemble",
        use_patch_model=False,
    ):
        module.given = {"pretrained": pretrained, "device": device, "cache_dir": cache_dir, "type": dreamsim_type}
        torch.hub.set_dir(cache_dir)  # as the package does for DINO
        if module.fails:
            raise URLError("no network")
        return Recorder(), reference_preprocess

    module = ModuleType("dreamsim")
    module.dreamsim, module.fails = dreamsim, False
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    return module


def pictures(count, size=48):
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    coarse[:, :, 0] = 1  # a bright top edge
    return (nn.functional.interpolate(coarse, size=(size, size)) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", [48, 300])
def test_images_are_given_as_the_reference_prepares_them(stand_in, size):
    distance = DreamSim()
    originals = pictures(3, size)
    values = distance(originals, originals // 2)
    ((first, second),) = distance.network.calls
    assert first.shape == second.shape == (3, 3, 224, 224) and first.dtype == torch.float32
    for given, images in ((first, originals), (second, originals // 2)):
        assert given.min() >= 0 and given.max() <= 1
        theirs = [reference_preprocess(Image.fromarray(np.asarray(image.permute(1, 2, 0)))) for image in images]
        assert given.equal(torch.cat(theirs))
    assert values.shape == (3,) and values.dtype == torch.float64
    torch.testing.assert_close(values, (first - second).mean((1, 2, 3)).double())
    torch.testing.assert_close(distance(originals[1:2], originals[1:2] // 2), values[1:2])


def test_means_by_budget(stand_in):
    class Colours:
        metric_name, kernel_metric_name, dim = "fd_colours", "kd_colours", 3
        device = torch.device("cpu")

        def __call__(self, images):
            return images.float().mean((2, 3))

    originals, keys = pictures(5), [str(i) for i in range(5)]
    distance = DreamSim()
    perceptual = {"dreamsim": distance, "largest": lambda a, b: (a - b).flatten(1).amax(1).double()}
    statistics = ReconstructionStatistics([1, 4], Colours(), perceptual=perceptual)
    for part in (slice(0, 2), slice(2, 5)):
        statistics.update_real(originals[part], keys[part])
        for budget, divisor in ((1, 4), (4, 2)):
            found = statistics.update_reconstructions(budget, originals[part], originals[part] // divisor, keys[part])
            assert found["dreamsim"].shape == (part.stop - part.start,)
    values = statistics.values()
    for budget, divisor in ((1, 4), (4, 2)):
        assert values[budget]["dreamsim"] == pytest.approx(distance(originals, originals // divisor).mean().item())
        assert values[budget]["largest"] == (originals - originals // divisor).flatten(1).amax(1).double().mean()
    assert "lpips" not in values[1]
    assert "dreamsim" in statistics.how and "largest" not in statistics.how  # a function has no weights to state


def test_where_weights_are(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    hub = torch.hub.get_dir()
    DreamSim()
    assert stand_in.given == {
        "pretrained": True,
        "device": "cpu",
        "cache_dir": str(tmp_path / "hub/dreamsim"),
        "type": "ensemble",
    }
    assert torch.hub.get_dir() == hub, "other networks still find their weights"
    own = tmp_path / "own"
    (own / "clip_vitb32_single_lora").mkdir(parents=True)
    assert len(DreamSim("clip_vitb32", own).weights_hash) == 16
    assert stand_in.given["cache_dir"] == str(own) and stand_in.given["type"] == "clip_vitb32"
    with pytest.raises(ValueError, match=r"dreamsim_weights='.*own' holds no folder ensemble_lora: give the folder"):
        DreamSim("ensemble", own)
    stand_in.fails = True
    with pytest.raises(ValueError, match=r"dreamsim='ensemble' cannot .*no network.* run it .* as dreamsim_weights"):
        DreamSim()
    assert torch.hub.get_dir() == hub


def test_what_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ValueError, match=r"dreamsim='ensemble' needs the package dreamsim: .*flextok_pl\[dreamsim\]"):
        DreamSim()
    with pytest.raises(ValueError, match=r"dreamsim='dino' is unknown; use one of \('ensemble'"):
        ReconstructionFID(dreamsim="dino")
    with pytest.raises(ValueError, match=r"dreamsim_weights='x' need a network: set dreamsim"):
        ReconstructionFID(dreamsim_weights="x")


def test_the_package_with_random_weights(tmp_path):
    """CLIP's variant, whose files are of the published layout; the others differ in their networks only."""
    package = pytest.importorskip("dreamsim")
    from dreamsim.feature_extraction.vision_transformer import vit_base
    from peft import LoraConfig, get_peft_model

    assert list(inspect.signature(package.dreamsim).parameters)[2:5] == [
        "cache_dir",
        "normalize_embeds",
        "dreamsim_type",
    ]
    vit = vit_base(patch_size=32)
    vit.pos_drop = nn.LayerNorm(768)
    weights = {"state_dict": {**vit.state_dict(), "proj": torch.randn(768, 512) / 28}}
    torch.save(weights, tmp_path / "open_clip_vitb32_pretrain.pth.tar")
    tuned = get_peft_model(
        package.PerceptualModel("open_clip_vitb32", "embedding", "32", lora=True, load_dir=str(tmp_path), device="cpu"),
        LoraConfig(r=16, lora_alpha=8, target_modules=["qkv"]),
    )
    tuned.save_pretrained(tmp_path / "open_clip_vitb32_single_lora")
    distance = DreamSim("open_clip_vitb32", tmp_path)
    images = pictures(3)
    assert distance(images, images).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    values = distance(images, images.flip(3))
    assert (values > 1e-4).all()
    torch.testing.assert_close(distance(images[2:], images[2:].flip(3)), values[2:], rtol=1e-3, atol=1e-5)
    embedded = [distance.embeddings(each) for each in (images, images.flip(3))]
    torch.testing.assert_close(1 - torch.cosine_similarity(*embedded).double(), values, rtol=0, atol=1e-6)


def test_the_callback_reports_it(stand_in, image_shards, tmp_path):
    from flextok_pl import FlexTok, FlexTokConfig
    from flextok_pl.cli import main

    file = FlexTok(FlexTokConfig.preset("tiny")).save_pretrained(tmp_path / "tiny.safetensors")
    main(
        [
            *("test", "--config", "experiments/tokenizer/tiny.yaml", "--tokenizer", str(file)),
            *("--data.val", str(image_shards / "val"), "--rfid.budgets", "[2,16]", "--rfid.num_steps", "1"),
            *("--rfid.dreamsim", "ensemble", "--rfid.output_dir", str(tmp_path), "--rfid.cache_dir", "null"),
            *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--codebook", "null"),
            *("--trainer.default_root_dir", str(tmp_path)),
        ]
    )
    records = [r for r in json.loads((tmp_path / "rfid.json").read_text()) if r["metric"] == "dreamsim"]
    assert [r["num_tokens"] for r in records] == [2, 16]
    assert {r["dreamsim_network"] for r in records} == {"ensemble"} and len(records[0]["dreamsim_weights_hash"]) == 16
