"""Packed budgets against a model that computes everything: same loss, same gradients, fewer positions.

The reference has K registers for every image in both networks, plain softmax attention and explicit masks.

Shapes: B images, N patches, K registers, L positions, D width.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from model_helpers import randomized
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flextok_pl.config import FlexTokConfig
from flextok_pl.flow.nested_dropout import BUDGET_LAWS
from flextok_pl.flow.rectified import interpolate
from flextok_pl.layers import attention as attention_file
from flextok_pl.layers import packing as packing_file
from flextok_pl.layers.blocks import AdaLNBlock
from flextok_pl.layers.embeddings import grid_positions, patchify, unpatchify
from flextok_pl.layers.packing import pack, padded_size, places
from flextok_pl.models.objective import TrainingDraws, flow_loss, sample_draws
from flextok_pl.models.routing import Route, Routing, sample_route
from flextok_pl.models.tokenizer import FlexTok

CONFIG = FlexTokConfig(
    vae=None,
    latent_channels=5,
    encoder_width=32,
    encoder_depth=2,
    encoder_head_dim=16,
    decoder_width=48,
    decoder_depth=3,
    decoder_head_dim=24,
    num_registers=16,
    fsq_levels=(7, 4, 3),
    grid_size=(2, 8),
    max_timestep=1000.0,
    repa_layer=0,
)
VARIANTS = {
    "registers": CONFIG,
    "one_register": replace(CONFIG, num_registers=1),
    "without_order": replace(CONFIG, causal_registers=False),
    "grid": replace(CONFIG, layout="grid"),
    "grid_of_zeros": replace(CONFIG, layout="grid", nested_dropout="none", missing_tokens="zero"),
    "mse": replace(CONFIG, objective="mse"),
}
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


# The reference


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attend(module: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (linear(x).unflatten(-1, (-1, module.head_dim)) for linear in (module.wq, module.wk, module.wv))
    logits = torch.einsum("bqhd,bkhd->bhqk", norm(q), norm(k)) * (8 / module.head_dim)
    weights = logits.masked_fill(~visible, -math.inf).softmax(-1)
    return module.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))


def reference_codes(tokenizer: FlexTok, latents: Tensor) -> Tensor:
    """All K codes, (B, K, FSQ levels)."""
    encoder, config = tokenizer.encoder, tokenizer.config
    patches = encoder.patch_embed(patchify(latents, 2))
    x = (patches + grid_positions(encoder.patch_posemb, *patches.shape[1:3])).flatten(1, 2)
    n = x.shape[1]
    visible = torch.ones(n, n, dtype=torch.bool)
    if config.layout == "registers":
        k = config.num_registers
        x = torch.cat([x, encoder.registers.expand(len(x), -1, -1)], 1)
        visible = torch.zeros(n + k, n + k, dtype=torch.bool)
        visible[:, :n] = True
        visible[n:, n:] = torch.ones(k, k).tril() if config.causal_registers else True
    for block in encoder.blocks:
        x = x + attend(block.attn, norm(x), visible)
        x = x + block.mlp(norm(x))
    return encoder.head(norm(x[:, -config.num_registers :]))


def reference_block(block: AdaLNBlock, x: Tensor, time: Tensor, n: int) -> Tensor:
    m = block.adaLN_modulation(time).unflatten(-1, (block.kinds, 6, -1))
    kind = (torch.arange(x.shape[1]) >= n).long()
    gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = m[:, kind].unbind(2)
    everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    x = x + gate_attn * attend(block.attn, norm(x) * (1 + scale_attn) + shift_attn, everything)
    return x + gate_mlp * block.mlp(norm(x) * (1 + scale_mlp) + shift_mlp)


def reference_loss(
    tokenizer: FlexTok, latents: Tensor, draws: TrainingDraws, route: Route | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of each image, and patch features."""
    decoder, config = tokenizer.decoder, tokenizer.config
    tokens = decoder.code_embed(tokenizer.quantizer(reference_codes(tokenizer, latents)))
    if config.layout == "registers":
        tokens = tokens + decoder.register_posemb[0, 0].T
    dropped = torch.arange(config.num_registers) >= draws.num_tokens[:, None]
    missing = tokenizer.quantizer.tokens_to_codes(torch.tensor(0)).to(tokens.dtype)
    missing = decoder.code_embed(missing) if config.missing_tokens == "zero" else decoder.mask_token
    tokens = torch.where(dropped[..., None], missing, tokens)
    tokens = torch.where(draws.null[:, None, None], decoder.null_token, tokens)
    x_t = interpolate(latents, draws.noise, draws.t)
    patches = decoder.patch_embed(patchify(x_t, 2))
    grid = patches.shape[1:3]
    x = (patches + grid_positions(decoder.patch_posemb, *grid)).flatten(1, 2)
    n = x.shape[1]
    x = x + tokens if config.layout == "grid" else torch.cat([x, tokens], 1)
    time = decoder.time_embed(draws.t)
    features = x
    for i, block in enumerate(decoder.blocks):
        if route is not None and route.covers(i):
            taken = [(route.rows[route.rows // n == image] % n).tolist() for image in range(len(x))]
            rows = [[*patches, *range(n, x.shape[1])] for patches in taken]
            part = torch.stack([sequence[kept] for sequence, kept in zip(x, rows, strict=True)])
            part, x = reference_block(block, part, time, len(taken[0])), x.clone()
            for image, kept in enumerate(rows):
                x[image, kept] = part[image]
        else:
            x = reference_block(block, x, time, n)
        features = x[:, :n] if i == config.repa_layer else features
    velocity = unpatchify(decoder.head(x[:, :n], time).unflatten(1, grid), 2)
    return (velocity - (draws.noise - latents)).square().flatten(1).mean(1), features


def draw(config: FlexTokConfig, latents: Tensor, seed: int = 0) -> TrainingDraws:
    draws = sample_draws(config, latents, torch.Generator().manual_seed(seed))
    return draws._replace(noise=draws.noise.to(latents), t=draws.t.to(latents.dtype))


def latents_of(config: FlexTokConfig, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    size = tuple(2 * side for side in config.grid_size)
    return torch.randn(batch, 5, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients(tokenizer: FlexTok, loss: Tensor, features: Tensor) -> dict[str, Tensor]:
    tokenizer.zero_grad()
    (loss.mean() + features.square().mean()).backward()
    trained = {name: p.grad for name, p in tokenizer.named_parameters() if p.requires_grad}
    unused = [name for name, gradient in trained.items() if gradient is None]
    assert not unused, "DistributedDataParallel stops at parameters without gradients"
    return {name: gradient.clone() for name, gradient in trained.items()}


def check(
    tokenizer: FlexTok, latents: Tensor, draws: TrainingDraws, tolerance: float, route: Route | None = None
) -> None:
    """Loss, features and all gradients, relative to the largest value of each."""
    packed = flow_loss(tokenizer, latents, draws, route=route)
    found = gradients(tokenizer, *packed)
    expected = reference_loss(tokenizer, latents, draws, route)
    wanted = gradients(tokenizer, *expected)
    pairs = {"loss": (packed.loss, expected[0]), "features": (packed.patch_features, expected[1])}
    pairs |= {name: (found[name], wanted[name]) for name in wanted}
    for name, (ours, theirs) in pairs.items():
        scale = theirs.abs().max().item()
        difference = (ours - theirs).abs().max().item()
        assert difference <= tolerance * max(scale, 1e-2), f"{name}: {difference} of {scale}"


@pytest.fixture(params=["padded", "end_to_end"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Attention as on a CPU, and as on a GPU with a kernel for sequences of different lengths."""
    if request.param == "end_to_end":
        monkeypatch.setattr(packing_file, "takes_sequences", lambda device: True)
        monkeypatch.setattr(attention_file, "varlen_attn", attend_to_sequences)
    return request.param


def attend_to_sequences(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, *longest: int, scale: float, window_size=(-1, -1)
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, which runs on a GPU only."""
    assert q_ends.dtype == k_ends.dtype == torch.int32 and len(q) == q_ends[-1] and len(k) == len(v) == k_ends[-1]
    assert q_ends.diff().max() <= longest[0] and k_ends.diff().max() <= longest[1]
    outputs = []
    for i in range(len(q_ends) - 1):
        rows, seen = slice(*q_ends[i : i + 2].tolist()), slice(*k_ends[i : i + 2].tolist())
        logits = torch.einsum("qhd,khd->hqk", q[rows], k[seen]) * scale
        if window_size == (-1, 0):
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + logits.shape[2] - logits.shape[1])
            logits = logits.masked_fill(hidden, -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[seen]))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", BUDGET_LAWS)
def test_every_law(law: str, dtype: torch.dtype, kernel: str) -> None:
    config = replace(CONFIG, nested_dropout=law, null_dropout=0.3)
    latents = latents_of(config, 7, dtype)
    check(randomized(config, dtype), latents, draw(config, latents), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("budgets", "null"),
    [
        ([16, 1, 5, 5, 16, 3], [0, 0, 0, 1, 1, 0]),
        ([16, 16], [0, 0]),
        ([4, 4, 4], [0, 0, 0]),
        ([1], [0]),
        ([16], [0]),
        ([9], [1]),
        ([2, 7], [1, 1]),
    ],
)
def test_variants(variant: str, budgets: list[int], null: list[int], dtype: torch.dtype, kernel: str) -> None:
    config = VARIANTS[variant]
    latents = latents_of(config, len(budgets), dtype)
    num_tokens = torch.tensor(budgets).clamp(max=config.num_registers)
    draws = draw(config, latents)._replace(num_tokens=num_tokens, null=torch.tensor(null, dtype=torch.bool))
    check(randomized(config, dtype), latents, draws, DTYPES[dtype])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_smaller_latents_and_checkpointing(checkpointing: bool, kernel: str) -> None:
    tokenizer = randomized(CONFIG, torch.float64)
    tokenizer.checkpoint_activations(checkpointing)
    latents = latents_of(CONFIG, 5)[..., :2, :6]
    check(tokenizer, latents, draw(CONFIG, latents), 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_alone_and_in_another_order(variant: str, kernel: str) -> None:
    config = VARIANTS[variant]
    tokenizer, latents = randomized(config, torch.float64), latents_of(config, 6)
    draws = draw(config, latents, seed=4)
    together = flow_loss(tokenizer, latents, draws).loss
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = flow_loss(tokenizer, latents[order], TrainingDraws(*(each[order] for each in draws))).loss
    alone = [
        flow_loss(tokenizer, latents[i : i + 1], TrainingDraws(*(d[i : i + 1] for d in draws))).loss for i in range(6)
    ]
    torch.testing.assert_close(turned, together[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["registers", "one_register", "grid", "grid_of_zeros"])
@pytest.mark.parametrize("routing", [Routing(0.5, 1, 2), Routing(0.7, 0, 0)])
def test_patches_on_a_route(routing: Routing, variant: str, checkpointing: bool, kernel: str) -> None:
    config = replace(VARIANTS[variant], decoder_depth=4, repa_layer=3)
    tokenizer = randomized(config, torch.float64)
    tokenizer.checkpoint_activations(checkpointing)
    latents = latents_of(config, 5)
    route = sample_route(routing, config, latents, torch.Generator().manual_seed(2))
    check(tokenizer, latents, draw(config, latents, 4), 1e-12, route)


def positions(part: nn.Module, call: Callable[[], object]) -> list[int]:
    """How many positions enter the first linear map of the MLP of each block."""
    counts = [0] * len(part.blocks)

    def count(i: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(module: nn.Module, arguments: tuple[Tensor]) -> None:
            counts[i] += arguments[0].shape[:-1].numel()

        return add

    hooks = [block.mlp.fc1.register_forward_pre_hook(count(i)) for i, block in enumerate(part.blocks)]
    call()
    for hook in hooks:
        hook.remove()
    return counts


def test_only_what_an_image_keeps_is_computed(kernel: str) -> None:
    """Of B images with budgets k: N + k each in the encoder, N + k + 1 in the decoder, N for the null condition."""
    tokenizer = randomized(CONFIG, torch.float64)
    latents, patches = latents_of(CONFIG, 5), 16
    null = torch.tensor([False, True, False, False, False])
    draws = draw(CONFIG, latents)._replace(num_tokens=torch.tensor([1, 9, 16, 5, 3]), null=null)
    coded, decoded = 1 + 16 + 5 + 3, (1 + 1) + 1 + 16 + (5 + 1) + (3 + 1)
    if kernel == "end_to_end":
        coded, decoded = padded_size(coded), padded_size(decoded)
        assert (coded, decoded) == (32, 32)
    step = lambda: flow_loss(tokenizer, latents, draws)  # noqa: E731
    assert positions(tokenizer.encoder, step) == [4 * patches + coded, coded], "the last block has registers only"
    assert positions(tokenizer.decoder, step) == [5 * patches + decoded] * 2 + [5 * patches]


def test_positions_of_use() -> None:
    tokenizer = randomized(CONFIG, torch.float32)
    latents, patches = latents_of(CONFIG, 2, torch.float32), 16
    budgets = torch.tensor([3, 7])
    assert positions(tokenizer.encoder, lambda: tokenizer.encode(latents, 4))[0] == 2 * (patches + 4)
    assert positions(tokenizer.encoder, lambda: tokenizer.encode(latents, budgets))[0] == 2 * patches + 10
    tokens = torch.zeros(2, 16, dtype=torch.int64)

    def decode(**options: object) -> list[int]:
        return positions(tokenizer.decoder, lambda: tokenizer.sample_latents(tokens, budgets, 1, **options))

    conditional, unconditional = 2 * patches + 3 + 1 + 7 + 1, 2 * (patches + 1)
    assert decode(guidance="none")[0] == conditional
    assert decode(guidance="cfg")[0] == decode(guidance="apg")[0] == conditional + unconditional
    assert decode(guidance="cfg", guidance_scale=lambda t: 1.0)[0] == conditional, "without effect"


@pytest.mark.parametrize("total", [1, 7, 8, 100, 1000, 12345, 10**6])
def test_padded_sizes(total: int) -> None:
    assert total <= padded_size(total) <= total * (1 + 1 / 16) + 8
    assert padded_size(total) % 8 == 0
    assert len({padded_size(n) for n in range(1024, 2048)}) <= 17


@pytest.mark.parametrize(("batch", "patches", "most"), [(64, 16, 64), (256, 1, 16), (3, 16, 16), (5, 1, 1)])
def test_one_bound_holds_for_all_sequences(
    batch: int, patches: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for the registers that round up their number, which are many in a large batch."""
    monkeypatch.setattr(packing_file, "takes_sequences", lambda device: True)
    generator, bounds = torch.Generator().manual_seed(0), set()
    for most_here in range(1, most + 1):
        budgets = torch.randint(1, most_here + 1, (batch,), generator=generator)
        sequences = pack(*places(budgets), batch, patches, most, "all", torch.device("cpu")).sequences
        assert sequences is not None and sequences.ends.diff().max() <= sequences.longest
        bounds.add(sequences.longest)
    assert len(bounds) == 1, "another number would be compiled again"


def test_a_bound_on_compilations() -> None:
    """Batches of any budgets take three graphs of each network."""
    torch.compiler.reset()
    counter = CompileCounter()
    tokenizer = randomized(replace(CONFIG, encoder_depth=3, decoder_depth=4), torch.float32)
    for block in [*tokenizer.encoder.blocks, *tokenizer.decoder.blocks]:
        block.compile(backend=counter, dynamic=True, fullgraph=True)
    for seed in range(12):
        latents = latents_of(CONFIG, 5, torch.float32)
        flow_loss(tokenizer, latents, draw(CONFIG, latents, seed)).loss.mean().backward()
    assert counter.frame_count <= 6, "the first block, whose input needs no gradient, another one, and the last"
