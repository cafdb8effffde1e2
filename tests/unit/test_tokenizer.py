"""FlexTok's own contracts: the merged dropped registers, prefixes, budgets, sizes and errors.

Shapes: B batch, C channels, h x w latent, N patches, K registers, D width.
"""

import dataclasses

import pytest
import torch
from model_helpers import randomized
from torch import Tensor

from flextok_pl.config import FlexTokConfig, VAEConfig, config_from_dict
from flextok_pl.flow.decoding import Decoding
from flextok_pl.flow.nested_dropout import BUDGET_LAWS, budget_probabilities
from flextok_pl.models.adaptive import Quality
from flextok_pl.models.objective import TrainingDraws, sample_draws
from flextok_pl.models.tokenizer import FlexTok

CONFIG = FlexTokConfig(
    vae=VAEConfig(kind="pixel", latent_channels=12, scaling_factor=2.0),
    latent_channels=12,
    encoder_width=32,
    encoder_depth=2,
    encoder_head_dim=16,
    decoder_width=48,
    decoder_depth=3,
    decoder_head_dim=24,
    num_registers=12,
    fsq_levels=(7, 4, 3),
    grid_size=(4, 6),
    max_timestep=1000.0,
    repa_layer=0,
)


@pytest.fixture(scope="module")
def tokenizer() -> FlexTok:
    return randomized(CONFIG)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_dropped_tokens_do_not_matter(tokenizer: FlexTok) -> None:
    x_t = torch.randn(2, 12, 8, 12, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(24).view(2, 12)
    changed = tokens.clone()
    changed[:, 5:] += 30
    with torch.no_grad():
        assert torch.equal(tokenizer.velocity(x_t, 0.5, tokens, 5), tokenizer.velocity(x_t, 0.5, changed, 5))
        assert not torch.allclose(tokenizer.velocity(x_t, 0.5, tokens, 6), tokenizer.velocity(x_t, 0.5, changed, 6))


def test_first_codes_do_not_need_later_registers(tokenizer: FlexTok, images: Tensor) -> None:
    whole, part = tokenizer.tokenize(images), tokenizer.tokenize(images, num_tokens=4)
    assert torch.equal(whole[:, :4], part)
    each = tokenizer.tokenize(images, torch.tensor([3, 12, 1]))
    assert all(torch.equal(row, whole[i, : len(row)]) for i, row in enumerate(each))
    assert [len(row) for row in each] == [3, 12, 1]
    latents = tokenizer.encode_latents(images)
    codes, padded = tokenizer.encode(latents), tokenizer.encode(latents, torch.tensor([3, 5, 1]))
    assert padded.shape == (3, 5, 3) and not padded[0, 3:].any() and not padded[2, 1:].any()
    torch.testing.assert_close(padded[1], codes[1, :5])


def test_no_patch_sees_a_register(tokenizer: FlexTok, images: Tensor) -> None:
    latents = tokenizer.encode_latents(images).requires_grad_()
    outputs = []
    hook = tokenizer.encoder.blocks[0].register_forward_hook(lambda _, __, output: outputs.append(output.patches))
    tokenizer.encode(latents)
    hook.remove()
    (gradient,) = torch.autograd.grad(outputs[0].sum(), tokenizer.encoder.registers, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_samples_do_not_depend_on_their_batch(tokenizer: FlexTok, images: Tensor) -> None:
    tokens = tokenizer.tokenize(images)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    options = {"num_tokens": torch.tensor([2, 12, 5]), "num_steps": 3}
    together = tokenizer.detokenize(tokens, generator=generators, **options)
    alone = tokenizer.detokenize(tokens[2:], 5, 3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-4)
    assert together.shape == images.shape


@pytest.mark.parametrize("num_tokens", [None, 5])
def test_batches_without_an_image(tokenizer: FlexTok, images: Tensor, num_tokens: int | None) -> None:
    length, latents = num_tokens or 12, tokenizer.encode_latents(images)[:0]
    assert tokenizer.encode(latents, num_tokens).shape == (0, length, 3)
    for tokens in (tokenizer.tokenize(images[:0], num_tokens), tokenizer.tokenize_latents(latents, num_tokens)):
        assert tokens.shape == (0, length) and tokens.dtype == torch.int64
        assert tokenizer.detokenize(tokens).shape == (0, *images.shape[1:])


def test_smaller_images_use_the_top_left_positions(tokenizer: FlexTok) -> None:
    small = torch.zeros(1, 3, 8, 16)
    tokens = tokenizer.tokenize(small)
    assert tokens.shape == (1, 12)
    assert tokenizer.detokenize(tokens, num_steps=1, latent_size=(4, 8)).shape == small.shape


def test_draws_are_a_function_of_the_generator(tokenizer: FlexTok) -> None:
    latents = torch.zeros(64, 12, 8, 12)
    first, second = (sample_draws(CONFIG, latents, torch.Generator().manual_seed(9)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first.null.float().mean() == pytest.approx(CONFIG.null_dropout, abs=0.15)
    assert isinstance(first, TrainingDraws) and first.noise.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("law", BUDGET_LAWS)
def test_stratified_budgets_follow_the_law(law: str) -> None:
    """Over many steps each image keeps what the law says; in one step their sum is almost the expected one."""
    config = dataclasses.replace(CONFIG, nested_dropout=law, null_dropout=0.25)
    latents, kept, totals = torch.zeros(32, 1, 1, 1), [], []
    generator, expected = torch.Generator().manual_seed(0), 0.75 * budget_probabilities(law, 12)
    for _ in range(400):
        draws = sample_draws(config, latents, generator, stratified_budgets=True)
        kept.append(draws.num_tokens.masked_fill(draws.null, 0))
        totals.append(kept[-1].sum().item())
    expected[0] += 0.25
    for image in (0, 13):
        found = torch.stack(kept)[:, image].bincount(minlength=13) / len(kept)
        assert (found - expected).abs().max() < 0.09, "4 standard deviations"
    found = torch.cat(kept).bincount(minlength=13) / (32 * len(kept))
    assert (found - expected).abs().max() < 0.005
    assert max(totals) - min(totals) <= 13, "one image's"
    independent = sample_draws(config, torch.zeros(4000, 1, 1, 1), generator, stratified_budgets=True)
    pairs = torch.stack([independent.t.double(), independent.num_tokens.double()])
    if law != "none":
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 0.05, "budgets do not tell times"
        with_null = torch.stack([independent.null.double(), independent.num_tokens.double()])
        assert abs(torch.corrcoef(with_null)[0, 1].item()) < 0.05


@pytest.mark.parametrize(
    ("name", "total"), [("d12_d12", 341_651_737), ("d18_d18", 949_734_553), ("d18_d28", 2_540_882_841)]
)
def test_published_parameter_counts(name: str, total: int) -> None:
    with torch.device("meta"):
        tokenizer = FlexTok(FlexTokConfig.preset(name))
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == total


def test_configs_survive_json() -> None:
    for config in (CONFIG, FlexTokConfig.preset("d18_d28"), dataclasses.replace(CONFIG, vae=None)):
        assert config_from_dict(FlexTokConfig, dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_width": 40}, "encoder_width=40.*encoder_head_dim=16"),
        ({"repa_layer": 3}, "repa_layer=3.*0..2"),
        ({"fsq_levels": (8, 1)}, "fsq_levels"),
        ({"fsq_levels": (1001,)}, r"fsq_levels=\(1001,\) must have at least one entry, each in 2..1000"),
        ({"time_frequencies": 7}, "time_frequencies=7 must be a positive multiple of 2"),
        ({"latent_channels": 16}, "latent_channels=16.*12"),
        ({"null_dropout": 1.5}, "null_dropout=1.5"),
        ({"mode_scale": -2.0}, r"mode_scale=-2.0 must be in \[-1, 1.7519\]"),
        ({"nested_dropout": "uniforme"}, "nested_dropout='uniforme'"),
        ({"timestep_law": "cosine"}, "timestep_law='cosine'"),
        ({"num_registers": 0}, "num_registers=0"),
    ],
)
def test_wrong_configs(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_wrong_arguments(tokenizer: FlexTok, images: Tensor) -> None:
    tokens = tokenizer.tokenize(images)
    calls = {
        "num_tokens=0 is not in 1..12": lambda: tokenizer.detokenize(tokens, 0),
        "num_tokens=13 is not in 1..12": lambda: tokenizer.tokenize(images, num_tokens=13),
        "number of tokens given=14": lambda: tokenizer.detokenize(tokens.repeat(1, 2)[:, :14]),
        "vocabulary is 0..83": lambda: tokenizer.detokenize(tokens + 84),
        "num_tokens has 2 entries for 3": lambda: tokenizer.detokenize(tokens, torch.tensor([1, 2])),
        "guidance='ag'": lambda: tokenizer.detokenize(tokens, guidance="ag"),
        "noise has 1 entries for 3": lambda: tokenizer.detokenize(tokens, noise=torch.zeros(1, 12, 8, 12)),
        "noise has shape": lambda: tokenizer.detokenize(tokens, noise=torch.zeros(3, 4, 8, 12)),
        "generator has 1 entries for 3": lambda: tokenizer.detokenize(tokens, generator=[torch.Generator()]),
        "cannot be cut into patches": lambda: tokenizer.encode(torch.zeros(1, 12, 7, 12)),
        "gives more patches, 8 x 8, than net.grid_size": lambda: tokenizer.tokenize(torch.zeros(1, 3, 32, 32)),
        "such as int64, not torch.float32": lambda: tokenizer.detokenize(tokens.float()),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            call()


def test_a_tokenizer_without_vae_says_so() -> None:
    tokenizer = FlexTok(dataclasses.replace(CONFIG, vae=None))
    with pytest.raises(ValueError, match="no VAE"):
        tokenizer.tokenize(torch.zeros(1, 3, 16, 24))
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    assert tokenizer.sample_latents(tokens, num_steps=1).shape == (1, 12, 8, 12)


def test_pure_noise_replaces_its_share_of_the_times_and_nothing_else() -> None:
    latents = torch.zeros(4000, 12, 1, 1)
    plain = sample_draws(CONFIG, latents, torch.Generator().manual_seed(0))
    mixed = sample_draws(CONFIG, latents, torch.Generator().manual_seed(0), pure_noise=0.7)
    pure = mixed.t == 1
    assert pure.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert torch.equal(mixed.t[~pure], plain.t[~pure]) and (plain.t < 1).all()
    assert torch.equal(mixed.num_tokens, plain.num_tokens) and torch.equal(mixed.null, plain.null)


def test_position_base_must_leave_frequencies_apart() -> None:
    with pytest.raises(ValueError, match="position_base=1"):
        dataclasses.replace(CONFIG, position_base=1.0)


def test_a_model_decodes_as_it_was_made_for(images: Tensor) -> None:
    """`detokenize`, the search for a quality and what evaluations do, unless something else is asked for."""
    student = randomized(dataclasses.replace(CONFIG, num_steps=2, guidance="none", guidance_scale=1.0))
    plain = randomized(CONFIG)
    tokens, noise = student.tokenize(images), torch.randn(3, 12, 8, 12, generator=torch.Generator().manual_seed(0))
    own = student.sample_latents(tokens, noise=noise)
    assert torch.equal(own, plain.sample_latents(tokens, None, 2, "none", noise=noise))
    published = plain.sample_latents(tokens, noise=noise)
    assert torch.equal(published, plain.sample_latents(tokens, None, 25, "apg", 7.5, noise=noise))
    asked = {"num_steps": 3, "guidance": "cfg", "guidance_scale": 2.0, "guidance_interval": (0.4, 1.0)}
    assert torch.equal(*(tok.sample_latents(tokens, noise=noise, **asked) for tok in (student, plain)))
    assert Quality(1.0).decoding(student.config) == Decoding(2, "none", 1.0)
    assert Quality(1.0).decoding(CONFIG) == Decoding(25, "none", 1.0)
    with pytest.raises(ValueError, match="guidance_scale=2.0 has no effect"):
        student.sample_latents(tokens, noise=noise, guidance_scale=2.0)


def test_guidance_outside_of_its_interval_costs_nothing(tokenizer: FlexTok, images: Tensor) -> None:
    tokens, sizes = tokenizer.tokenize(images), []
    hook = tokenizer.decoder.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    interval = {"guidance_interval": (0.25, 0.5), "generator": torch.Generator().manual_seed(0), "latent_size": (8, 12)}
    tokenizer.sample_latents(tokens, None, 4, "cfg", 2.0, **interval)
    hook.remove()
    assert sizes == [3, 3, 6, 3]
