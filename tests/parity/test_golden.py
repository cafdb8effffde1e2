"""The published model's numbers, computed with the official implementation, through the public API.

`golden/flextok_a` was made with apple/ml-flextok at 87d00cc on CPU in float32 with random weights. Tolerances are a few
times the spread between that code's own attention back ends: 1e-5 for features and velocities, 3e-5 for sampled
latents and images, 1e-4 relative for gradient norms; tokens are equal. On a GPU, with TF32 off, they are wider, most of
all for the time embedding, which takes sines and cosines of up to 1000 radians.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flextok_pl.flow.decoding import AdaptiveProjectedGuidance
from flextok_pl.flow.rectified import interpolate, logit_normal_from_uniform, mode_from_uniform, stratify
from flextok_pl.interop import official
from flextok_pl.models.decoder import token_layout
from flextok_pl.models.objective import TrainingDraws, flow_loss
from flextok_pl.models.tokenizer import FlexTok

pytestmark = pytest.mark.usefixtures("no_tf32")

GOLDEN = Path(__file__).parent / "golden" / "flextok_a"
FEATURES = {"cpu": 1e-5, "cuda": 3e-5}
TIME_EMBEDDING = {"cpu": 1e-5, "cuda": 1e-4}
SAMPLES = {"cpu": 3e-5, "cuda": 1e-4}
TIMES = dict.fromkeys(("cpu", "cuda"), 1e-6)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: dict[str, float]) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance[ours.device.type])


def test_images_to_tokens(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        latents = tokenizer.encode_latents(golden["images"])
        assert_near(latents, golden["vae_latents"], SAMPLES)
        codes = tokenizer.encode(golden["vae_latents"])
        assert_near(codes, golden["enc_out"], FEATURES)
        assert_near(tokenizer.encode(golden["vae_latents"][1:]), golden["enc_out_solo_image1"], FEATURES)
        assert_near(tokenizer.quantizer.bound(codes), golden["fsq_bounded"], FEATURES)
        assert torch.equal(tokenizer.quantizer(codes), golden["quants"])
        assert_near(tokenizer.vae.decode(golden["vae_latents"]), golden["vae_decode_of_latents"], SAMPLES)
    assert torch.equal(tokenizer.tokenize(golden["images"]), golden["tokens"])
    assert torch.equal(tokenizer.tokenize(golden["images"], num_tokens=5), golden["tokens"][:, :5])


def test_quantiser(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    quantized = tokenizer.quantizer(golden["fsq_in"])
    assert torch.equal(quantized, golden["fsq_quant"])
    assert torch.equal(tokenizer.quantizer.codes_to_tokens(quantized), golden["fsq_tokens"])
    assert torch.equal(tokenizer.quantizer.tokens_to_codes(golden["fsq_ids"]), golden["fsq_ids_embedding"])


def test_time_embedding(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    embedding = tokenizer.decoder.time_embed
    assert_near(embedding.frequencies(golden["temb_t"]), golden["temb_freq"], TIME_EMBEDDING)
    with torch.no_grad():
        assert_near(embedding(golden["temb_t"]), golden["temb"], TIME_EMBEDDING)


@pytest.mark.parametrize("budget", [1, 4, 16])
@pytest.mark.parametrize("per_sample", [False, True])
def test_velocity_at_a_budget(tokenizer: FlexTok, golden: dict[str, Tensor], budget: int, per_sample: bool) -> None:
    x_t, t, tokens = golden["vel_xt"], golden["vel_t"], golden["tokens"]
    num_tokens = torch.tensor([budget, budget]) if per_sample else budget
    null = torch.tensor([True, True])
    with torch.no_grad():
        assert_near(tokenizer.velocity(x_t, t, tokens, num_tokens), golden[f"vel_cond_k{budget}"], FEATURES)
        unconditional = tokenizer.velocity(x_t, t, tokens, num_tokens, null=null)
        assert_near(unconditional, golden[f"vel_uncond_k{budget}"], FEATURES)


def test_velocity_of_mixed_batches(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    x_t, t, tokens = golden["vel_xt"], golden["vel_t"], golden["tokens"]
    with torch.no_grad():
        assert_near(tokenizer.velocity(x_t, t, tokens), golden["vel_nokey"], FEATURES)
        mixed = tokenizer.velocity(x_t, t, tokens, torch.tensor([1, 16]))
        assert_near(mixed, golden["vel_mixed_k1_kall"], FEATURES)
        half_null = tokenizer.velocity(x_t, t, tokens, torch.tensor([4, 4]), null=torch.tensor([False, True]))
        assert_near(half_null, golden["vel_mixed_drop_FT"], FEATURES)
        solo = tokenizer.velocity(x_t[1:], t[1:], tokens[1:], 4)
        assert_near(solo, golden["vel_solo_image1_k4"], FEATURES)
        from_codes = tokenizer.velocity(x_t, t, golden["quants"], 4)
        assert_near(from_codes, golden["vel_cond_k4"], FEATURES)


def test_hidden_states(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    """The decoder's inputs and outputs beside the published ones: 64 patches and 16 registers of each image."""
    inputs, outputs = [], []
    first = tokenizer.decoder.blocks[0].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    last = tokenizer.decoder.blocks[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        codes = tokenizer.quantizer.tokens_to_codes(golden["tokens"])[:, :4]
        layout = token_layout(tokenizer.config, golden["vel_xt"], torch.tensor([4, 4]))
        result = tokenizer.decoder(golden["vel_xt"], golden["vel_t"], codes.flatten(0, 1), layout)
    first.remove(), last.remove()
    packed_in = golden["dec_packed_in_tokens_k4"][0, : 2 * 80].view(2, 80, -1)
    assert_near(inputs[0].patches, packed_in[:, :64], FEATURES)
    kept, merged = inputs[0].registers.split([8, 2])  # one position stands for the twelve dropped registers
    assert_near(kept.view(2, 4, -1), packed_in[:, 64:68], FEATURES)
    assert_near(merged[:, None].expand(-1, 12, -1), packed_in[:, 68:], FEATURES)
    packed_out = golden["dec_out_patches_hidden_k4"][0, : 2 * 80].view(2, 80, -1)
    assert_near(outputs[0].patches, packed_out[:, :64], FEATURES)
    assert_near(result.patch_features.view(2, 8, 8, -1), golden["repa_patches_k4"], FEATURES)


@pytest.mark.parametrize(
    ("name", "guidance", "scale"),
    [
        ("all_plain", "none", 1.0),
        ("all_plain", "cfg", 1.0),
        ("all_cfg3", "cfg", 3.0),
        ("all_apg7.5", "apg", 7.5),
        ("all_cfg_callable", "cfg", lambda t: 1 + 2 * t),
    ],
)
def test_detokenize(tokenizer: FlexTok, golden: dict[str, Tensor], name: str, guidance: str, scale: object) -> None:
    arguments = {"num_steps": 5, "guidance": guidance, "guidance_scale": scale, "noise": golden["detok_init_noise"]}
    latents = tokenizer.sample_latents(golden["tokens"], **arguments)
    assert_near(latents, golden[f"detok_{name}_latents"], SAMPLES)
    if f"detok_{name}_image" in golden:
        assert_near(
            tokenizer.detokenize(golden["tokens"], **arguments),
            golden[f"detok_{name}_image"],
            SAMPLES,
        )


@pytest.mark.parametrize(("guidance", "scale"), [("cfg", 3.0), ("apg", 7.5)])
def test_detokenize_ragged(tokenizer: FlexTok, golden: dict[str, Tensor], guidance: str, scale: float) -> None:
    tokens = golden["tokens"]
    theirs = golden[f"detok_k3_7_{'cfg3' if guidance == 'cfg' else 'apg7.5'}_latents"]
    arguments = {"num_steps": 5, "guidance": guidance, "guidance_scale": scale, "noise": golden["detok_init_noise"]}
    assert_near(tokenizer.sample_latents([tokens[0, :3], tokens[1, :7]], **arguments), theirs, SAMPLES)
    assert_near(tokenizer.sample_latents(tokens, torch.tensor([3, 7]), **arguments), theirs, SAMPLES)


def test_noise_is_drawn_per_image(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    seed = json.loads((GOLDEN / "meta.json").read_text())["seed"] + 2
    arguments = {"num_steps": 5, "guidance": "none", "latent_size": (16, 16)}
    latents = tokenizer.sample_latents(golden["tokens"], generator=torch.Generator().manual_seed(seed), **arguments)
    assert_near(latents, golden["detok_all_plain_latents"], SAMPLES)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("ln", torch.sigmoid),
        ("ln_strat", lambda draw: logit_normal_from_uniform(stratify(draw))),
        ("uniform", lambda draw: mode_from_uniform(draw, 0.0)),
        ("mode0.25", lambda draw: mode_from_uniform(draw, 0.25)),
        ("mode1.0", lambda draw: mode_from_uniform(draw, 1.0)),
    ],
)
def test_timestep_laws(golden: dict[str, Tensor], name: str, law: object) -> None:
    t = law(golden[f"noise_{name}_draw"])
    assert_near(t, golden[f"noise_{name}_sigma"], TIMES)
    assert_near(interpolate(golden["vae_latents"], golden["vel_noise"], t), golden[f"noise_{name}_xt"], TIMES)


def test_adaptive_projected_guidance(golden: dict[str, Tensor]) -> None:
    guidance = AdaptiveProjectedGuidance()
    pairs = zip(golden["apg_cond"], golden["apg_uncond"], strict=True)
    ours = torch.stack([guidance(conditional, unconditional, 7.5) for conditional, unconditional in pairs])
    assert_near(ours, golden["apg_out"], FEATURES)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(golden: dict[str, Tensor], device: str, checkpointing: bool) -> None:
    tokenizer = FlexTok.from_pretrained(
        GOLDEN / "model.safetensors", vae_config=GOLDEN / "vae_config.json", device=device
    ).train()
    tokenizer.checkpoint_activations(checkpointing)
    with torch.no_grad():
        latents = tokenizer.encode_latents(golden["train_images"])
    draws = TrainingDraws(
        golden["train_noise"],
        golden["train_sigmas"].cpu(),
        golden["train_keep_k"].cpu(),
        golden["train_null_drop"].cpu(),
    )
    loss = flow_loss(tokenizer, latents, draws).loss.mean()
    assert_near(loss[None], golden["train_loss"], FEATURES)
    loss.backward()

    gradients = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None and "vae." not in name}
    theirs = json.loads((GOLDEN / "train_grad_norms.json").read_text())
    ours = {official.official_name(name): gradient for name, gradient in gradients.items()}
    assert set(ours) == {name for name in theirs if not name.startswith("vae.")}
    for name, gradient in ours.items():
        assert gradient.norm().item() == pytest.approx(theirs[name][0], rel=1e-4, abs=1e-9), name
        if f"train_grad:{name}" in golden:
            assert_near(gradient, golden[f"train_grad:{name}"], FEATURES)
