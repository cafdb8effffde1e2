"""Images of other sizes than a model was made for, rectangles and several shapes, and pictures of other channels."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.config.checks import nearest_multiples
from flextok_pl.contracts import weights_hash
from flextok_pl.evaluation.budget_evaluation import Context
from flextok_pl.evaluation.options import ReconstructionOptions
from flextok_pl.evaluation.pictures import image_grid, same_size
from flextok_pl.evaluation.reconstruction import ReconstructionEvaluation
from flextok_pl.evaluation.reconstruction_statistics import ImageMoments
from flextok_pl.keys import sample_generators
from flextok_pl.layers.embeddings import resample_positions, sincos_position_table
from flextok_pl.metrics.images import image_errors, to_uint8
from flextok_pl.models.objective import draws_of_each, flow_loss
from flextok_pl.models.starting import start_from
from flextok_pl.models.teacher import Teacher
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.modules import TokenizerModule, VAEModule

TINY = dataclasses.replace(FlexTokConfig.preset("tiny"), encoder_depth=1, decoder_depth=1)  # patches of 4 x 4 pixels
GREY = VAEConfig(kind="pixel", latent_channels=4, scaling_factor=1.0, image_channels=1)
NARROW = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)


def test_resampled_positions() -> None:
    """Of a table that is linear in the place, those of the new patches' middles; a table of this size is the same."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    table = torch.stack([y, x])[None]
    assert resample_positions(table, (8, 6)) is table
    finer = resample_positions(table, (12, 12))[0]
    middle = [(torch.arange(12) + 0.5) * old / 12 - 0.5 for old in (8, 6)]
    inside = slice(3, -3)
    assert torch.allclose(finer[0, inside, inside], middle[0][inside, None].expand(-1, 6), atol=1e-4)
    assert torch.allclose(finer[1, inside, inside], middle[1][None, inside].expand(6, -1), atol=1e-4)
    waves = resample_positions(sincos_position_table(64, (16, 16)), (24, 24))
    assert waves.abs().amax() < 1.1 and resample_positions(table, (4, 3)).shape == (1, 2, 4, 3)


def test_start_at_another_size(tmp_path: Path) -> None:
    torch.manual_seed(1)
    file = str(FlexTok(TINY).save_pretrained(tmp_path / "given.safetensors"))
    given = FlexTok.from_pretrained(file)
    same, larger = FlexTok(TINY), FlexTok(dataclasses.replace(TINY, grid_size=(12, 10)))
    assert start_from(same, file).notes["started_from"] == f"{file} ({weights_hash(given)})"
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in same.state_dict().items())
    start = start_from(larger, file)
    assert start.notes["started_from"].endswith(f"({weights_hash(given)}, positions resampled from [8, 8] to [12, 10])")
    tables = {"encoder.patch_posemb", "decoder.patch_posemb"}
    for name, value in larger.state_dict().items():
        table = given.state_dict()[name]
        assert torch.equal(value, resample_positions(table, (12, 10)) if name in tables else table), name
    part = start_from(FlexTok(dataclasses.replace(TINY, grid_size=(12, 10))), file, ["decoder.blocks"])
    assert "resampled" not in part.notes["started_from"]
    again = FlexTok.from_pretrained(larger.save_pretrained(tmp_path / "larger.safetensors"))
    assert torch.equal(again.decoder.patch_posemb, larger.decoder.patch_posemb)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30, 30), "image_size=30 must be a multiple of the patch of 4 x 4 pixels; the nearest: 28 or 32"),
        ((30, 17), r"image_size=\[30, 17\] .*28 or 32 by 16 or 20"),
        ((2, 8), r"image_size=\[2, 8\] .*: 4 by 8"),
        ((36, 8), r"gives more patches, 9 x 2, than net.grid_size=\[8, 8\] has; give at most \[32, 32\].*\[9, 2\]"),
    ],
)
def test_sizes_that_do_not_fit(size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TINY.grid_of(size)
    with pytest.raises(ValueError, match=message):
        FlexTok(TINY).tokenize(torch.zeros(1, 3, *size))


def test_sizes_that_fit() -> None:
    assert TINY.grid_of((32, 8)) == (8, 2) and TINY.latent_size_of((32, 8)) == (16, 4)
    assert [nearest_multiples(n, 16) for n in (16, 3, 100)] == ["16", "16", "96 or 112"]
    with pytest.raises(ValueError, match="without an autoencoder"):
        dataclasses.replace(TINY, vae=None).grid_of((32, 32))


def test_a_training_takes_a_shape_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the values and the gradients that it has alone, whatever came before."""
    module = TokenizerModule(dataclasses.replace(TINY, repa_layer=0), teacher="effnet-lite2")
    module.teacher = torch.nn.Identity()  # type: ignore[assignment]  # its features come with the batch
    monkeypatch.setattr("flextok_pl.modules.tokenizer.log_means", lambda *_: None)
    for shape in ((32, 16), (16, 32), (8, 24)):
        grid = TINY.grid_of(shape)
        batch: Any = {"image": torch.rand(2, 3, *shape) * 2 - 1, "key": ["a", "b"]}
        batch["teacher_features"] = torch.randn(2, 120, *grid)
        latents = module.latents(batch)
        draws = draws_of_each(TINY, latents, [torch.Generator().manual_seed(i) for i in (1, 2)])
        result = flow_loss(module.tokenizer, latents, draws)
        loss = result.loss.mean() + alignment(module, batch, latents, result)
        loss.backward()
        assert result.loss.shape == (2,) and loss.isfinite()


def alignment(module: TokenizerModule, batch: Any, latents: torch.Tensor, result: Any) -> torch.Tensor:
    module._aligned_steps = 1
    return module._alignment(batch, latents, result)  # type: ignore[return-value]


def test_a_teacher_sees_rectangles_in_their_shape() -> None:
    teacher = Teacher("effnet-lite2", image_size=64, pretrained=False)
    assert [teacher.size_for(*size) for size in ((9, 9), (32, 128), (100, 50), (3, 300))] == [
        (64, 64),
        (32, 128),
        (96, 32),
        (32, 640),
    ]
    vit = Teacher("vit_tiny_patch16_224", image_size=64, pretrained=False)
    assert vit(torch.zeros(1, 3, 40, 80)).shape == (1, 192, 3, 6) and vit(torch.zeros(1, 1, 9, 9)).shape[2:] == (4, 4)


class Means:
    """Mean colours: features of images of any size."""

    name, metric_name, kernel_metric_name, resize, weights_hash = "means", "fd_means", "kd_means", "none", "0" * 16
    dim, device = 3, torch.device("cpu")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) / 255

    def to(self, device: Any) -> "Means":
        return self


@pytest.mark.parametrize("in_fit", [False, True])
def test_an_evaluation_of_several_shapes(in_fit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is decoded in its own shape, also where few of a batch wait for others."""
    monkeypatch.setattr("flextok_pl.evaluation.budget_evaluation.build_extractor", lambda *_: Means())
    torch.manual_seed(0)
    tok = FlexTok(TINY).eval()
    batches = [
        {"image": torch.rand(3, 3, *shape) * 2 - 1, "key": [f"{shape} {i} {n}" for n in range(3)]}
        for i, shape in enumerate([(32, 16), (32, 16), (16, 24), (32, 16)])
    ]
    options = ReconstructionOptions(
        budgets=[4, 16], fit_budgets=[4, 16], max_samples=8, num_steps=1, guidance="none", cache_dir=None
    )
    evaluation = ReconstructionEvaluation(options)
    evaluation.start(tok, Context(12, in_fit=in_fit, num_batches=4))
    for batch in batches:
        evaluation.update(batch)
    results = evaluation.finish()
    assert results is not None
    assert results.protocol["image_size"] == [[16, 24], [32, 16]]
    count = results.protocol["num_samples"]
    assert count == 12 if not in_fit else 2 < count < 12
    assert results.pictures["grid.png"].shape[1] > 8 * 32 or in_fit
    if not in_fit:
        errors = []
        for batch in batches:
            size = TINY.latent_size_of(batch["image"].shape[2:])
            made = tok.detokenize(
                tok.tokenize(batch["image"]),
                4,
                1,
                "none",
                generator=sample_generators(batch["key"], 0),
                latent_size=size,
            )
            errors.append(image_errors(to_uint8(batch["image"]), to_uint8(made))["mse"])
        assert results.values[4]["mse"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-9)


def test_variance_around_the_mean_image_of_each_size() -> None:
    moments, parts = ImageMoments(torch.device("cpu")), [ImageMoments(torch.device("cpu")) for _ in range(2)]
    sets = [torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8) for n, size in ((5, (4, 6)), (7, (6, 4)))]
    for images in sets:
        moments.update(images[:2])
        moments.update(images[2:])
    expected = sum(len(s) * ((s / 255).double().var(0, correction=0).mean()) for s in sets) / 12
    assert moments.variance == pytest.approx(float(expected), rel=1e-6)
    parts[0].load_state_dict(moments.state_dict())
    assert parts[0].variance == moments.variance and parts[1].variance == 0


def test_pictures_of_several_sizes_and_channels() -> None:
    small, wide = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.ones(1, 2, 8, dtype=torch.uint8)
    framed = same_size([small, wide])
    assert framed.shape == (2, 1, 4, 8) and torch.equal(framed[0, 0, 0], torch.tensor([255, 255, 0, 0, 0, 0, 255, 255]))
    for channels in (1, 2, 3, 5):
        assert image_grid([("a", torch.zeros(2, channels, 16, 16))]).shape[0] == 3


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(channels: int, tmp_path: Path) -> None:
    """A fold of pixels gives them back; a tokenizer and a KL autoencoder take them, from files, too."""
    pixel = dataclasses.replace(GREY, latent_channels=4 * channels, image_channels=channels)
    images = torch.rand(2, channels, 16, 8) * 2 - 1
    vae = VAE(pixel)
    assert vae.config.downsampling == 2 and torch.equal(vae.decode(vae.encode(images)), images)
    tok = FlexTok(dataclasses.replace(TINY, vae=pixel, latent_channels=4 * channels))
    tok = FlexTok.from_pretrained(tok.save_pretrained(tmp_path / "tok.safetensors"))
    made = tok.detokenize(tok.tokenize(images), num_steps=1, guidance="none", latent_size=(8, 4))
    assert made.shape == images.shape and tok.config.vae == pixel
    with pytest.raises(ValueError, match=rf"they must be \(B, {channels}, H, W\)"):
        tok.tokenize(torch.zeros(1, 3, 16, 16))

    kl = dataclasses.replace(NARROW, image_channels=channels)
    VAE(kl).save_pretrained(tmp_path / "vae")
    again = VAE.from_pretrained(tmp_path / "vae")
    assert again.config == kl and again.decode(again.encode(images)).shape == images.shape
    module = VAEModule(kl, gan_weight=0.5, discriminator_width=4)
    assert module.discriminator is not None
    assert module.discriminator(torch.zeros(1, channels, 32, 32)).shape[1] == 1


def test_networks_of_colours() -> None:
    def means(network: Any, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))

    extractor = FeatureExtractor("means", torch.nn.Identity(), means, "none")
    grey = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="extractor='means' takes RGB or grey .* have 5 channels"):
        extractor(torch.zeros(1, 5, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"perceptual_weight=1.0 needs pictures of 1 or 3 channels.*image_channels=5"):
        VAEModule(dataclasses.replace(NARROW, image_channels=5), perceptual_weight=1.0)
    with pytest.raises(ValueError, match=r"latent_channels=12 is not 5 \* f\*\*2.*use 5, 20, 45"):
        VAEConfig(kind="pixel", latent_channels=12, image_channels=5)
    with pytest.raises(ValueError, match="a teacher takes RGB"):
        Teacher("effnet-lite2", image_size=64, pretrained=False)(torch.zeros(1, 5, 9, 9))
