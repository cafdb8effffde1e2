"""The VAE wrapper: scaling, the pixel autoencoder, reading configs, and errors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.interop.autoencoder import vae_config_from_diffusers
from flextok_pl.models.vae import VAE

SMALL = VAEConfig(
    latent_channels=3,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=0.5,
    shift_factor=0.1,
)
PIXEL = VAEConfig(kind="pixel", latent_channels=12, scaling_factor=2.0, shift_factor=0.25)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_scale_by_hand() -> None:
    moments = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, -200.0]).view(1, 6, 1, 1)
    model = VAE(SMALL)
    expected = torch.tensor([0.45, 0.95, 1.45]).view(1, 3, 1, 1)  # (mean - 0.1) * 0.5
    torch.testing.assert_close(model.scale(moments), expected)
    noise = torch.randn(1, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.5, 0.5, 0]).view(
        1, 3, 1, 1
    )
    sample = model.scale(moments, sample_posterior=True, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample, expected + noise)


@torch.no_grad()
def test_decode_undoes_the_scaling(images: torch.Tensor) -> None:
    model = VAE(SMALL).eval()
    mean = model.moments(images).chunk(2, dim=1)[0]
    assert model.encode(images).shape == (2, 3, 4, 6)
    torch.testing.assert_close(model.decode(model.encode(images)), model.network.decode(mean).sample)
    latents = model.encode(images)
    torch.testing.assert_close(model.rescaled(3.0, -1.0).encode(images), (latents / 0.5 + 0.1 + 1.0) * 3.0)


def test_pixel_autoencoder_is_exact(images: torch.Tensor, tmp_path: Path) -> None:
    model = VAE(PIXEL)
    latents = model.encode(images)
    assert latents.shape == (2, 12, 4, 6)
    # Channel 4c + 2i + j holds colour c at row i and column j of each 2 x 2 block.
    assert latents[1, 4 * 2 + 2 * 1 + 0, 3, 5] == (images[1, 2, 7, 10] - 0.25) * 2.0
    torch.testing.assert_close(model.decode(latents), images, atol=1e-6, rtol=0)
    sample = model.encode(images, sample_posterior=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample, latents, atol=1e-5, rtol=0)
    assert not model.state_dict()
    model.save_pretrained(tmp_path)
    assert VAE.from_pretrained(tmp_path).config == PIXEL


def test_diffusers_configs() -> None:
    """Stable Diffusion 1's file leaves keys out; FlexTok's own has null scales."""
    old = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.4.0.dev0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    assert vae_config_from_diffusers(old) == VAEConfig(latent_channels=4, scaling_factor=0.18215)
    new = old | {"latent_channels": 16, "scaling_factor": None, "shift_factor": None, "force_upcast": True}
    assert vae_config_from_diffusers(new) == VAEConfig(scaling_factor=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "'num_layers'=3"),
        ({"in_channels": 4}, "in_channels=4"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"_class_name": "AutoencoderDC"}, "AutoencoderDC"),
        ({"act_fn": 3}, "act_fn=3"),
    ],
)
def test_diffusers_configs_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae_config_from_diffusers({"latent_channels": 4, **change})


def test_every_preset_builds_on_meta() -> None:
    for name in ("demo", "d12_d12"):
        config = FlexTokConfig.preset(name).vae
        assert config is not None
        with torch.device("meta"):
            assert VAE(config).encode(torch.empty(1, 3, 64, 64)).shape == (1, config.latent_channels, 8, 8)


def test_shapes_are_checked(images: torch.Tensor) -> None:
    model = VAE(SMALL)
    with pytest.raises(ValueError, match="8 x 11 pixels.*multiples of 2"):
        model.encode(images[..., :11])
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 12\).*\(B, 3, H, W\)"):
        model.encode(images[:, :1])
    with pytest.raises(ValueError, match=r"\(B, 3, h, w\)"):
        model.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, 6, h, w\)"):
        model.scale(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"block_out_channels": ()},
        {"block_out_channels": (8, 18)},
        {"down_block_types": ("DownEncoderBlock2D",), "block_out_channels": (8, 8)},
    ],
)
def test_configs_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VAE(VAEConfig(norm_num_groups=4, **options))  # type: ignore[arg-type]


def test_a_failed_write_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VAE(SMALL).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = VAE(SMALL)

    def cut(folder: str, **_: object) -> None:
        Path(folder, "diffusion_pytorch_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.vae, "save_pretrained", cut)
    with pytest.raises(OSError, match="Free some space"):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no autoencoder folder"):
        VAE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no autoencoder folder"):
        VAE.from_pretrained("nowhere")
    with pytest.raises(ValueError, match="config.json"):
        VAE.from_pretrained(tmp_path)
    VAE(SMALL).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "encoder.conv_in.bias"}, file)
    with pytest.raises(ValueError, match="encoder.conv_in.bias"):
        VAE.from_pretrained(tmp_path)
    save_file(weights | {"surprise": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="surprise"):
        VAE.from_pretrained(tmp_path)
    save_file(weights | {"encoder.conv_in.bias": torch.zeros(9)}, file)
    with pytest.raises(ValueError, match="encoder.conv_in.bias"):
        VAE.from_pretrained(tmp_path)
    file.write_bytes(b"\x80\x04no safetensors")
    with pytest.raises(ValueError, match="cannot load"):
        VAE.from_pretrained(tmp_path)
