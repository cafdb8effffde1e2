"""A 2-D model of the published code, whose tokens are a raster of patches, through the public API.

`golden/flextok_grid_a` was made with the classes of apple/ml-flextok at 87d00cc, as its README says. Tolerances are
those of `test_golden.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flextok_pl.interop.official import official_name
from flextok_pl.interop.tensor_file import write_tensors
from flextok_pl.layers.packing import Positions
from flextok_pl.models.objective import TrainingDraws, flow_loss
from flextok_pl.models.tokenizer import FlexTok

pytestmark = pytest.mark.usefixtures("no_tf32")

GOLDEN = Path(__file__).parent / "golden" / "flextok_grid_a"
VAE = GOLDEN / "vae_config.json"
FEATURES = {"cpu": 1e-5, "cuda": 3e-5}
SAMPLES = {"cpu": 3e-5, "cuda": 1e-4}


@pytest.fixture(scope="module")
def nested(
    tokenizer: FlexTok, golden: dict[str, Tensor], device: str, tmp_path_factory: pytest.TempPathFactory
) -> FlexTok:
    """The same model with nested dropout in its decoder."""
    tree = json.loads((GOLDEN / "config.json").read_text())
    added = json.loads((GOLDEN / "nested_dropout.json").read_text())
    first, *others = tree["decoder"]["module_dict"].items()
    tree["decoder"]["module_dict"] = dict([first, *added.items(), *others])
    tensors = {official_name(name): tensor for name, tensor in tokenizer.state_dict().items()}
    tensors["decoder.module_dict.dec_nested_dropout.dropout_mask_token"] = golden["nested_mask_token"]
    file = tmp_path_factory.mktemp("nested") / "model.safetensors"
    write_tensors(tensors, file, {key: str(value) for key, value in tree.items()})
    return FlexTok.from_pretrained(file, vae_config=VAE, device=device)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: dict[str, float]) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance[ours.device.type])


def test_configuration(tokenizer: FlexTok, nested: FlexTok) -> None:
    config = tokenizer.config
    assert (config.layout, config.num_registers, config.grid_size) == ("grid", 16, (4, 4))
    assert (config.nested_dropout, config.missing_tokens) == ("none", "zero")
    assert not hasattr(tokenizer.decoder, "mask_token")
    assert (nested.config.nested_dropout, nested.config.missing_tokens) == ("uniform", "mask")


def test_images_to_tokens(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        assert_near(tokenizer.encode_latents(golden["images"]), golden["vae_latents"], SAMPLES)
        codes = tokenizer.encode(golden["vae_latents"])
        assert_near(codes, golden["enc_out"].flatten(1, 2), FEATURES)
        alone = tokenizer.encode(golden["vae_latents"][1:])
        assert_near(alone, golden["enc_out_solo_image1"].flatten(1, 2), FEATURES)
        assert_near(tokenizer.quantizer.bound(codes), golden["fsq_bounded"].flatten(1, 2), FEATURES)
        assert torch.equal(tokenizer.quantizer(codes), golden["quants"].flatten(1, 2))
        assert_near(tokenizer.require_vae().decode(golden["vae_latents"]), golden["vae_decode_of_latents"], SAMPLES)
    assert torch.equal(tokenizer.tokenize(golden["images"]), golden["tokens"])
    assert torch.equal(tokenizer.tokenize(golden["images"], num_tokens=5), golden["tokens"][:, :5])


def test_velocity(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    x_t, t, tokens = golden["vel_xt"], golden["vel_t"], golden["tokens"]
    with torch.no_grad():
        assert_near(tokenizer.velocity(x_t, t, tokens), golden["vel"], FEATURES)
        null = torch.tensor([True, True])
        assert_near(tokenizer.velocity(x_t, t, tokens, null=null), golden["vel_uncond"], FEATURES)
        assert_near(tokenizer.velocity(x_t, t, tokens, 3, null=null), golden["vel_uncond"], FEATURES)
        half = tokenizer.velocity(x_t, t, tokens, null=torch.tensor([False, True]))
        assert_near(half, golden["vel_drop_FT"], FEATURES)
        alone = tokenizer.velocity(x_t[1:], t[1:], tokens[1:])
        assert_near(alone, golden["vel_solo_image1"], FEATURES)
        short = tokenizer.velocity(x_t, t, tokens, torch.tensor([1, 6]))
        assert_near(short, golden["vel_fill_k1_k6"], FEATURES)
        filled = tokens.clone()
        filled[0, 1:], filled[1, 6:] = 0, 0
        assert_near(tokenizer.velocity(x_t, t, filled), golden["vel_fill_k1_k6"], FEATURES)


def test_hidden_states(tokenizer: FlexTok, golden: dict[str, Tensor]) -> None:
    """The decoder's blocks get the patches with tokens added, and nothing else: 16 positions of each image."""
    inputs: list[Positions] = []
    outputs: list[Positions] = []
    first = tokenizer.decoder.blocks[0].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    last = tokenizer.decoder.blocks[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        tokenizer.velocity(golden["vel_xt"], golden["vel_t"], golden["tokens"])
    first.remove(), last.remove()
    for ours, name in ((inputs[0], "dec_packed_in"), (outputs[0], "dec_packed_out")):
        assert ours.patches is not None and ours.registers is None
        assert_near(ours.patches, golden[name][0, :32].view(2, 16, -1), FEATURES)


@pytest.mark.parametrize(
    ("name", "guidance", "scale"),
    [
        ("all_plain", "none", 1.0),
        ("all_cfg3", "cfg", 3.0),
        ("all_apg5", "apg", 5.0),
        ("all_cfg_callable", "cfg", lambda t: 1 + 2 * t),
        ("k3_k7_cfg3", "cfg", 3.0),
        ("k3_k7_apg5", "apg", 5.0),
    ],
)
def test_detokenize(tokenizer: FlexTok, golden: dict[str, Tensor], name: str, guidance: str, scale: object) -> None:
    """Short sequences, too: what they lack is token 0."""
    tokens = golden["tokens"]
    given = [tokens[0, :3], tokens[1, :7]] if name.startswith("k3") else tokens
    arguments = {"num_steps": 5, "guidance": guidance, "guidance_scale": scale, "noise": golden["detok_init_noise"]}
    assert_near(tokenizer.sample_latents(given, **arguments), golden[f"detok_{name}_latents"], SAMPLES)
    if f"detok_{name}_image" in golden:
        assert_near(tokenizer.detokenize(given, **arguments), golden[f"detok_{name}_image"], SAMPLES)


def test_nested_dropout_of_rows(nested: FlexTok, golden: dict[str, Tensor]) -> None:
    """The published module drops whole rows of a raster: r rows are the first 4 r tokens."""
    x_t, t, tokens, rows = golden["vel_xt"], golden["vel_t"], golden["tokens"], torch.tensor([4, 12])
    with torch.no_grad():
        assert_near(nested.velocity(x_t, t, tokens), golden["nested_vel"], FEATURES)
        unconditional = nested.velocity(x_t, t, tokens, rows, null=torch.tensor([True, True]))
        assert_near(unconditional, golden["nested_vel_uncond"], FEATURES)
        assert_near(nested.velocity(x_t, t, tokens, rows), golden["nested_vel_rows1_rows3"], FEATURES)
    latents = nested.sample_latents(tokens, rows, 5, "apg", 5.0, noise=golden["detok_init_noise"])
    assert_near(latents, golden["nested_detok_rows1_rows3_apg5_latents"], SAMPLES)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(golden: dict[str, Tensor], device: str, checkpointing: bool) -> None:
    tokenizer = FlexTok.from_pretrained(GOLDEN / "model.safetensors", vae_config=VAE, device=device).train()
    tokenizer.checkpoint_activations(checkpointing)
    with torch.no_grad():
        latents = tokenizer.encode_latents(golden["train_images"])
    null = golden["train_null_drop"].cpu()
    draws = TrainingDraws(golden["train_noise"], golden["train_sigmas"].cpu(), torch.full((4,), 16), null)
    loss = flow_loss(tokenizer, latents, draws).loss.mean()
    assert_near(loss[None], golden["train_loss"], FEATURES)
    loss.backward()

    gradients = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None and "vae." not in name}
    theirs = json.loads((GOLDEN / "train_grad_norms.json").read_text())
    ours = {official_name(name): gradient for name, gradient in gradients.items()}
    assert set(ours) == {name for name in theirs if not name.startswith("vae.")}
    for name, gradient in ours.items():
        assert gradient.norm().item() == pytest.approx(theirs[name][0], rel=1e-4, abs=1e-9), name
        if f"train_grad:{name}" in golden:
            assert_near(gradient, golden[f"train_grad:{name}"], FEATURES)
