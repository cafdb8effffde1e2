"""The controlled baselines: 2-D tokens, registers without a causal order, a decoder that regresses, a fixed length.

Shapes: B batch, C channels, h x w latent, N patches, K tokens, k kept, D width.
"""

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from model_helpers import randomized
from torch import Tensor
from torch.utils.data import DataLoader

from flextok_pl.callbacks import ReconstructionFID
from flextok_pl.cli.decoding import compare_decodings
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig, config_from_dict
from flextok_pl.cost.count import Numerics
from flextok_pl.cost.workload import tokenizer_workload
from flextok_pl.data import ShardDataModule, write_tokens
from flextok_pl.evaluation.protocol import decoding_facts
from flextok_pl.flow.decoding import Decoding
from flextok_pl.layers.embeddings import patchify, unpatchify
from flextok_pl.layers.packing import Positions
from flextok_pl.models.adaptive import Quality
from flextok_pl.models.attention_maps import register_attention
from flextok_pl.models.objective import TrainingDraws, flow_loss, sample_draws
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import PriorModule, TokenizerModule

PUBLISHED = FlexTokConfig(
    vae=VAEConfig(kind="pixel", latent_channels=12, scaling_factor=2.0),
    latent_channels=12,
    encoder_width=32,
    encoder_depth=2,
    encoder_head_dim=16,
    decoder_width=48,
    decoder_depth=3,
    decoder_head_dim=24,
    num_registers=16,
    fsq_levels=(7, 4, 3),
    grid_size=(4, 4),
    position_base=10.0,
    repa_layer=0,
    nested_dropout="pow2",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "grid": {"layout": "grid"},
    "grid of a fixed length": {"layout": "grid", "nested_dropout": "none"},
    "grid of zeros": {"layout": "grid", "nested_dropout": "none", "missing_tokens": "zero"},
    "full attention": {"causal_registers": False},
    "regression": {"objective": "mse", "null_dropout": 0.0},
    "fixed length": {"nested_dropout": "none"},
    "grid and regression": {"layout": "grid", "objective": "mse"},
}
BASELINES = {name: dataclasses.replace(PUBLISHED, **options) for name, options in OPTIONS.items()}
LATENTS = (12, 8, 8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=BASELINES)
def baseline(request: pytest.FixtureRequest) -> FlexTok:
    return randomized(BASELINES[request.param])


def tokens_of(tok: FlexTok, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(tok.config.vocab_size, (batch, tok.num_registers), generator=generator)


# What holds for all of them


def test_a_prefix_is_the_start_of_the_whole(baseline: FlexTok) -> None:
    latents = drawn(3, *LATENTS)
    with torch.no_grad():
        whole, part = baseline.encode(latents), baseline.encode(latents, 5)
    assert whole.shape == (3, 16, 3) and part.shape == (3, 5, 3)
    torch.testing.assert_close(part, whole[:, :5], rtol=1e-5, atol=1e-5)


def test_tokens_beyond_a_budget_change_nothing(baseline: FlexTok) -> None:
    tokens = tokens_of(baseline)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 30) % 84
    x_t = drawn(2, *LATENTS)
    mixed = torch.tensor([5, 2])
    with torch.no_grad():
        for budget in (5, mixed):
            assert torch.equal(
                baseline.velocity(x_t, 0.5, tokens, budget), baseline.velocity(x_t, 0.5, changed, budget)
            )
        assert not torch.allclose(baseline.velocity(x_t, 0.5, tokens, 6), baseline.velocity(x_t, 0.5, changed, 6))
        null = torch.tensor([True, True])
        one, other = (baseline.velocity(x_t, 0.5, t, null=null) for t in (tokens, changed.flip(1)))
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, baseline.velocity(x_t, 0.5, tokens))


def test_a_mixed_batch_is_its_samples(baseline: FlexTok) -> None:
    tokens, x_t = tokens_of(baseline, 3), drawn(3, *LATENTS)
    budgets, null = torch.tensor([1, 7, 16]), torch.tensor([False, False, True])
    with torch.no_grad():
        mixed = baseline.velocity(x_t, 0.5, tokens, budgets, null)
        alone = [baseline.velocity(x_t[i : i + 1], 0.5, tokens[i : i + 1], int(budgets[i])) for i in range(2)]
        alone.append(baseline.velocity(x_t[2:], 0.5, tokens[2:, :1], null=null[2:]))
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_files_keep_the_baseline(baseline: FlexTok, tmp_path: Path) -> None:
    loaded = FlexTok.from_pretrained(baseline.save_pretrained(tmp_path))
    assert loaded.config == baseline.config and loaded.identity() == baseline.identity()
    images = drawn(2, 3, 16, 16).clamp(-1, 1)
    tokens = baseline.tokenize(images)
    assert torch.equal(loaded.tokenize(images), tokens)
    options: dict[str, Any] = {"num_tokens": torch.tensor([3, 16]), "num_steps": 2, "noise": drawn(2, *LATENTS)}
    for guidance in ("none", "cfg", "apg"):
        options |= {"guidance": guidance, "guidance_scale": 1.0 if guidance == "none" else 3.0}
        assert torch.equal(loaded.detokenize(tokens, **options), baseline.detokenize(tokens, **options))


def test_as_few_tokens_as_a_quality_takes(baseline: FlexTok) -> None:
    images = drawn(2, 3, 16, 16).clamp(-1, 1)
    assert [len(row) for row in baseline.tokenize(images, quality=Quality(1e9, num_steps=1))] == [1, 1]
    assert [len(row) for row in baseline.tokenize(images, quality=Quality(0.0, num_steps=1))] == [16, 16]


# Configurations


def test_older_configurations_are_those_of_the_published_model() -> None:
    values = dataclasses.asdict(PUBLISHED)
    for name in ("layout", "missing_tokens", "causal_registers", "objective"):
        del values[name]
    assert config_from_dict(FlexTokConfig, values) == PUBLISHED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "grid", "num_registers": 12}, r"num_registers=12.*grid_size=\(4, 4\).*num_registers=16"),
        ({"layout": "grid", "causal_registers": False}, "causal_registers=False.*leave it out"),
        ({"layout": "ring"}, "layout='ring' is unknown"),
        ({"missing_tokens": "noise"}, "missing_tokens='noise' is unknown"),
        ({"missing_tokens": "zero", "nested_dropout": "none"}, "layout='registers' .* must be 'mask'"),
        ({"missing_tokens": "zero", "layout": "grid"}, "nested_dropout='pow2' must be 'mask'"),
        ({"objective": "l1"}, "objective='l1' is unknown"),
    ],
)
def test_wrong_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PUBLISHED, **options)


@pytest.mark.parametrize("name", ["full attention", "regression"])
def test_the_official_format_has_no_baselines(name: str, tmp_path: Path) -> None:
    vae = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    config = dataclasses.replace(BASELINES[name], vae=vae, latent_channels=4)
    option, value = next(iter(OPTIONS[name].items()))
    with pytest.raises(ValueError, match=f"{option}={value!r} does not exist in the official format"):
        FlexTok(config).save_pretrained(tmp_path / "x.safetensors", format="official")
    assert not list(tmp_path.iterdir())


# Registers without a causal order


@pytest.mark.parametrize("causal", [True, False])
def test_whether_a_code_depends_on_later_registers(causal: bool) -> None:
    tok = randomized(dataclasses.replace(PUBLISHED, causal_registers=causal))
    latents, blocks = drawn(1, *LATENTS), []
    hook = tok.encoder.blocks[0].register_forward_hook(lambda _, __, output: blocks.append(output.patches))
    with torch.no_grad():
        before = tok.encode(latents)
        tok.encoder.registers[9] *= -1
        after = tok.encode(latents)
    hook.remove()
    torch.testing.assert_close(blocks[0], blocks[1])  # no patch sees a register
    assert torch.equal(before[:, :9], after[:, :9]) == causal
    assert not torch.allclose(before[:, 9:], after[:, 9:])


# 2-D tokens


def test_a_grid_has_no_parameters_of_registers() -> None:
    tok, published = FlexTok(BASELINES["grid"]), FlexTok(PUBLISHED)
    left_out = set(published.state_dict()) - set(tok.state_dict())
    assert left_out == {"encoder.registers", "decoder.register_posemb"}
    assert tok.decoder.blocks[0].adaLN_modulation[1].weight.shape == (6 * 48, 48)
    assert tok.device == torch.device("cpu")


def test_code_i_is_read_at_patch_i() -> None:
    """With attention turned off, a patch's code depends on that patch of the image only, and so does its velocity."""
    tok = randomized(BASELINES["grid"])
    for block in [*tok.encoder.blocks, *tok.decoder.blocks]:
        block.attn.proj.weight.data.zero_()
    latents, tokens = drawn(1, *LATENTS), tokens_of(tok, 1)
    changed, other = latents.clone(), tokens.clone()
    changed[:, :, 2:4, 6:8] += 1.0  # the patch in row 1 and column 3 of the 4 x 4
    other[:, 7] = (other[:, 7] + 30) % 84
    with torch.no_grad():
        codes = (tok.encode(latents) - tok.encode(changed)).abs().sum(-1)[0]  # (K,)
        moved = tok.velocity(latents, 0.5, tokens) - tok.velocity(latents, 0.5, other)
    assert codes.nonzero().flatten().tolist() == [7]
    assert patchify(moved, 2).abs().sum(-1).flatten().nonzero().flatten().tolist() == [7]


def test_a_grid_adds_tokens_to_the_patches() -> None:
    tok = randomized(BASELINES["grid"])
    decoder, x_t, tokens = tok.decoder, drawn(3, *LATENTS), tokens_of(tok, 3)
    kept, null = torch.tensor([16, 5, 9]), torch.tensor([False, False, True])
    with torch.no_grad():
        added = decoder.code_embed(tok.quantizer.tokens_to_codes(tokens))  # (B, K, D)
        added[1, 5:], added[2] = decoder.mask_token, decoder.null_token
        positions = decoder.patch_posemb[0].flatten(1).T  # (N, D)
        x = decoder.patch_embed(patchify(x_t, 2)).flatten(1, 2) + positions + added
        time = decoder.time_embed(torch.full((3,), 0.5))
        for block in decoder.blocks:
            x = block(Positions(x, None), time).patches
        expected = unpatchify(decoder.head(x, time).unflatten(1, (4, 4)), 2)
        torch.testing.assert_close(tok.velocity(x_t, 0.5, tokens, kept, null), expected, rtol=1e-5, atol=1e-5)


def test_a_grid_of_zeros_takes_the_first_token_for_missing_ones() -> None:
    tok = randomized(BASELINES["grid of zeros"])
    assert not hasattr(tok.decoder, "mask_token")
    tokens, noise = tokens_of(tok), drawn(2, *LATENTS)
    filled = tokens.clone()
    filled[0, 3:], filled[1, 7:] = 0, 0
    options: dict[str, Any] = {"num_steps": 2, "guidance_scale": 3.0, "noise": noise}
    short = tok.detokenize([tokens[0, :3], tokens[1, :7]], **options)
    torch.testing.assert_close(short, tok.detokenize(filled, **options), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(short, tok.detokenize(tokens, **options), atol=1e-2)


def test_a_grid_has_one_size() -> None:
    tok = randomized(BASELINES["grid"])
    calls = [
        lambda: tok.tokenize(torch.zeros(1, 3, 8, 16)),
        lambda: tok.tokenize(torch.zeros(1, 3, 32, 32)),
        lambda: tok.detokenize(tokens_of(tok), latent_size=(4, 8)),
        lambda: tok.velocity(torch.zeros(2, 12, 4, 8), 0.5, tokens_of(tok)),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match="layout='grid' has one token for each patch, so they must be (4 x 4|8 x 8)"
        ):
            call()
    options = {
        "stratified_budgets": False,
        "vae": None,
        "teacher": None,
        "route_share": 0.0,
        "route_blocks": None,
        "activation_checkpointing": False,
    }
    with pytest.raises(ValueError, match=r"data.image_size=8 gives fewer patches.*layout='grid'"):
        tokenizer_workload(options, tok.config, 8, "images", Numerics())
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="no attention goes to a token"):
        register_attention(tok, images)


# A decoder that regresses


@pytest.mark.parametrize("name", ["regression", "grid and regression"])
def test_the_loss_of_a_regression(name: str) -> None:
    tok, latents = randomized(BASELINES[name]), drawn(4, *LATENTS)
    config = dataclasses.replace(tok.config, null_dropout=0.5)
    draws = sample_draws(config, latents, torch.Generator().manual_seed(2), timestep_shift=2.0, pure_noise=0.3)
    flow = sample_draws(dataclasses.replace(config, objective="flow"), latents, torch.Generator().manual_seed(2))
    assert torch.equal(draws.num_tokens, flow.num_tokens) and torch.equal(draws.null, flow.null)
    draws = draws._replace(null=torch.zeros(4, dtype=torch.bool))
    loss = flow_loss(tok, latents, draws).loss
    with torch.no_grad():
        tokens = tok.quantizer.codes_to_tokens(tok.quantizer(tok.encode(latents)))
        decoded = tok.sample_latents(tokens, draws.num_tokens)
    torch.testing.assert_close(loss.detach(), (decoded - latents).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_regression_decodes_in_one_step_without_noise() -> None:
    tok = randomized(BASELINES["regression"])
    tokens, calls = tokens_of(tok), []
    hook = tok.decoder.register_forward_hook(lambda _, arguments, __: calls.append(arguments))
    images = tok.detokenize(tokens)  # the defaults ask for 25 guided steps
    ((x_t, t, *_),) = calls
    assert not x_t.any() and (t == 1).all()
    hook.remove()
    for options in ({"num_steps": 3, "solver": "heun"}, {"noise": drawn(2, *LATENTS)}, {"guidance": "none"}):
        assert torch.equal(tok.detokenize(tokens, **options), images)
    with torch.no_grad():
        assert torch.equal(-tok.velocity(torch.zeros(2, *LATENTS), 1.0, tokens), tok.sample_latents(tokens))
    with pytest.raises(ValueError, match="guidance='ag'"):
        tok.detokenize(tokens, guidance="ag")


def test_what_reports_say_of_a_regression(tmp_path: Path) -> None:
    tok, published = randomized(BASELINES["regression"]), randomized(PUBLISHED)
    asked = {"num_steps": 12, "solver": "euler", "guidance": "cfg", "guidance_scale": 2.0}
    assert decoding_facts(published, Decoding(12, "cfg", 2.0)) == asked
    one_step = {"num_steps": 1, "guidance": "none", "guidance_scale": 1.0}
    assert decoding_facts(tok, Decoding(12, "cfg", 2.0)) == asked | one_step
    with pytest.raises(ValueError, match="objective='mse'.*there is nothing to choose"):
        compare_decodings("unread", tokenizer=str(tok.save_pretrained(tmp_path)))
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"times=\[0.9, 0.5, 0.1\].*times=\[1.0\]"):
        register_attention(tok, images)
    shares = register_attention(tok, images, (1.0,))
    assert shares.shape == (1, 3, 16) and torch.equal(shares, register_attention(tok, images, (1.0,)))


def test_options_of_time_are_of_no_use_to_a_regression() -> None:
    with pytest.warns(UserWarning, match=r"pure_noise=0.7 have no effect with net.objective='mse'"):
        TokenizerModule(BASELINES["regression"], pure_noise=0.7)


# Training, tokens, priors and evaluation


class Pictures(pl.LightningDataModule):
    """Batches of 8 pictures of 16 px, one of four colours on each half, the same in every epoch."""

    def __init__(self, images: int = 40) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        palette = torch.tensor([[-1.0, -1, 1], [1, -1, -1], [-1, 1, -1], [1, 1, 1]])
        colours = palette[torch.randint(4, (images, 2), generator=generator)]  # (images, half, channel)
        self.images = colours.mT[..., None, :].repeat_interleave(8, -1).expand(-1, -1, 16, -1)  # (images, 3, 16, 16)

    def num_samples(self, split: str) -> int:
        return 16 if split == "val" else len(self.images)

    def _batches(self, images: Tensor) -> DataLoader:
        parts = [
            {"image": part, "key": [f"{i}_{j}" for j in range(8)], "label": torch.arange(8) % 2}
            for i, part in enumerate(images.split(8))
        ]
        return DataLoader(parts, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        return self._batches(self.images)

    def val_dataloader(self) -> DataLoader:
        return self._batches(self.images[:16])


class MeanColours:
    """Features that cost nothing: mean colours of the two halves."""

    name, metric_name, kernel_metric_name = "halves", "fd_halves", "kd_halves"
    dim, weights_hash, resize = 6, "0" * 16, "none"
    device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().unflatten(3, (2, -1)).mean((2, 4)).flatten(1) / 255

    def to(self, device: torch.device) -> "MeanColours":
        return self


def trainer(path: Path, steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=path,
        callbacks=list(callbacks),
        logger=False,
        limit_val_batches=0 if not callbacks else None,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def error_of(tok: FlexTok, images: Tensor) -> float:
    latents = tok.encode_latents(images)
    draws = sample_draws(tok.config, latents, torch.Generator().manual_seed(0))
    draws = TrainingDraws(draws.noise, draws.t, torch.full((len(latents),), 16), torch.zeros(len(latents)).bool())
    with torch.no_grad():
        return flow_loss(tok, latents, draws).loss.mean().item()


@pytest.mark.parametrize("name", ["grid", "grid of zeros", "full attention", "regression", "fixed length"])
def test_from_pictures_to_a_prior(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, evaluation at every budget, the exported file, and a prior of its tokens."""
    monkeypatch.setattr("flextok_pl.evaluation.budget_evaluation.build_extractor", lambda *_: MeanColours())
    torch.manual_seed(0)
    data = Pictures()
    module = TokenizerModule(BASELINES[name], lr=1e-3, warmup_steps=2)
    before = error_of(module.tokenizer, data.images)
    rfid = ReconstructionFID(guidance="cfg", guidance_scale=2.0, num_steps=2, every_n_validations=0, cache_dir=None)
    trainer(tmp_path, 120).fit(module, data)
    assert error_of(module.tokenizer, data.images) < 0.8 * before  # what ignores the tokens stays where it was

    trainer(tmp_path, 1, rfid).validate(module, data)
    assert list(rfid.values) == [1, 2, 4, 8, 16]
    assert rfid.values[16]["mse"] < rfid.values[1]["mse"]

    tok = FlexTok.from_pretrained(tmp_path / "tokenizer.safetensors")
    tokens = tok.tokenize(data.images)
    assert torch.equal(tokens, module.tokenizer.tokenize(data.images))
    net = PriorConfig(num_classes=2, vocab_size=84, num_tokens=16, depth=1, width=32, head_dim=16)
    torch.manual_seed(0)
    prior = PriorModule(net, tokenizer=str(tmp_path / "tokenizer.safetensors"), lr=3e-3, warmup_steps=0)
    labels = torch.arange(len(tokens)) % 2
    before = prior.prior(tokens, labels).flatten(0, 1)
    trainer(tmp_path, 40).fit(prior, data)
    after = prior.prior(tokens, labels).flatten(0, 1)
    losses = [torch.nn.functional.cross_entropy(logits, tokens.flatten()).item() for logits in (before, after)]
    assert losses[1] < 0.7 * losses[0]
    generated = prior.generate_tokens(labels[:2], generator=torch.Generator().manual_seed(0))
    assert prior.reconstructor.detokenize(generated, num_tokens=4, num_steps=1).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("name", ["grid", "full attention"])
def test_token_shards(name: str, image_shards: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(BASELINES[name], grid_size=(8, 8), num_registers=64)
    tok = randomized(config)
    write_tokens(
        str(image_shards / "val"), tmp_path, tok.tokenize, tokenizer_id=tok.identity(), image_size=32, num_workers=0
    )
    images, shards = (
        ShardDataModule(val=str(folder), image_size=32, num_workers=0, eval_batch_size=64, val_limit=None)
        for folder in (image_shards / "val", tmp_path)
    )
    (pictures,), (written,) = list(images.val_dataloader()), list(shards.val_dataloader())
    order = [written["key"].index(f"{key}_v0") for key in pictures["key"]]
    assert torch.equal(written["tokens"][order], tok.tokenize(pictures["image"]))
    assert written["tokens"].shape == (len(order), 64)
