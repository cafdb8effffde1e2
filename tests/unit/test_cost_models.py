"""Costs that are counted from configurations against those of real steps."""

import dataclasses
import multiprocessing
import os
import socket
import weakref
from collections import Counter
from contextlib import nullcontext
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.cost.count import Activations, Count, Numerics, count_activations, count_flops
from flextok_pl.cost.machines import machine
from flextok_pl.cost.models import (
    _kept_at_every_budget,
    _shape,
    all_blocks,
    decoder,
    encoder,
    prior_activations,
    prior_flops,
    projection,
    token_loss_bytes,
    tokenizer_activations,
    tokenizer_flops,
)
from flextok_pl.cost.plan import Setup, memory
from flextok_pl.cost.workload import prior_workload, tokenizer_workload
from flextok_pl.flow.nested_dropout import BUDGET_LAWS, budget_probabilities, budgets_from_uniform
from flextok_pl.models.irepa import Projection, build_projection
from flextok_pl.models.objective import TrainingDraws, flow_loss, sample_draws
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.routing import Routing, sample_route
from flextok_pl.models.starting import train_only
from flextok_pl.models.teacher import alignment_loss
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.runtime.sharding import shard

CONFIG = dataclasses.replace(
    FlexTokConfig.preset("tiny"), vae=None, encoder_width=32, decoder_width=64, decoder_depth=3, grid_size=(4, 4)
)
LATENTS, GRID = (12, 8, 8), (4, 4)


def counted(forward) -> tuple[int, int]:
    """(forward, backward); attention as plain products, since the count of fused kernels includes what they repeat."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = forward()
        first = counter.get_total_flops()
        loss.backward()
    return first, counter.get_total_flops() - first


def tokenizer_step(model: FlexTok, draws: TrainingDraws) -> tuple[int, int]:
    latents = torch.randn(draws.noise.shape)
    return counted(lambda: flow_loss(model, latents, draws).loss.mean())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", [1, 5, 16])
@pytest.mark.parametrize("options", [{}, {"causal_registers": False}, {"layout": "grid"}])
def test_tokenizer_is_exact(options: dict[str, object], kept: int, checkpointing: bool) -> None:
    batch = 3
    config = dataclasses.replace(CONFIG, **options)
    model = FlexTok(config)
    model.checkpoint_activations(checkpointing)
    draws = TrainingDraws(
        torch.randn(batch, *LATENTS),
        torch.rand(batch),
        torch.full((batch,), kept),
        torch.zeros(batch, dtype=torch.bool),
    )
    planned = count_flops(encoder(config, kept, GRID), config.encoder_depth, checkpointing)
    planned = (planned + count_flops(decoder(config, kept, GRID), config.decoder_depth, checkpointing)) * batch
    assert tokenizer_step(model, draws) == (planned.forward, planned.backward + planned.recomputed)
    always = dataclasses.replace(config, nested_dropout="none", null_dropout=0.0)
    if kept == config.num_registers:
        assert tokenizer_flops(always, checkpointing=checkpointing) * batch == planned


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("routing", "options"), [(Routing(0.5, 1, 2), {}), (Routing(0.3, 0, 0), {"layout": "grid"})])
def test_tokenizer_with_a_route_is_exact(routing: Routing, options: dict[str, object], checkpointing: bool) -> None:
    config = dataclasses.replace(CONFIG, decoder_depth=5, nested_dropout="none", null_dropout=0.0, **options)
    model, latents = FlexTok(config), torch.randn(3, *LATENTS)
    model.checkpoint_activations(checkpointing)
    generator = torch.Generator().manual_seed(0)
    draws = sample_draws(config, latents, generator)
    route = sample_route(routing, config, latents, generator)
    found = counted(lambda: flow_loss(model, latents, draws, route=route).loss.mean())
    planned = tokenizer_flops(config, GRID, checkpointing, routing) * 3
    assert found == (planned.forward, planned.backward + planned.recomputed)
    assert planned.training < tokenizer_flops(config, GRID, checkpointing).training * 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("text", [0, 5])
def test_prior_is_exact(text: int, chunk: int | None, checkpointing: bool) -> None:
    batch = 2
    condition = {"text_width": 24} if text else {"num_classes": 3}
    config = PriorConfig(**condition, vocab_size=100, num_tokens=10, depth=3, width=64, head_dim=16)
    model, tokens = Prior(config), torch.randint(100, (batch, 10))
    model.checkpoint_activations(checkpointing)
    given = TextStates(torch.randn(batch, text, 24), torch.ones(batch, text, dtype=torch.bool))
    classes = torch.zeros(batch, dtype=torch.int64)

    def loss():
        hidden = model.hidden(tokens, given if text else classes)
        return token_loss(hidden, model.head.weight, tokens, chunk_size=chunk).loss

    planned = prior_flops(config, text, checkpointing) * batch
    # A chunked loss makes its gradients in the forward pass: only the sum is comparable.
    assert sum(counted(loss)) == planned.training + planned.recomputed


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_projection_is_exact(kind: Projection) -> None:
    head, patches = build_projection(kind, 64, 120), torch.randn(2, prod(GRID), 64, requires_grad=True)
    planned = count_flops(projection(kind, 64, 120, GRID), 1) * 2
    assert counted(lambda: head(patches, GRID).sum()) == (planned.forward, planned.backward)


@pytest.mark.parametrize("options", [{}, {"causal_registers": False}, {"layout": "grid"}, {"num_registers": 2}])
def test_three_numbers_of_registers_tell_all(options: dict[str, object]) -> None:
    config = dataclasses.replace(CONFIG, nested_dropout="uniform", null_dropout=0.3, **options)
    total = count_flops(decoder(config, 0, GRID), config.decoder_depth) * config.null_dropout
    for kept, share in enumerate(budget_probabilities("uniform", config.num_registers).tolist()):
        if share:
            total += count_flops(encoder(config, kept, GRID), config.encoder_depth) * (share * 0.7)
            total += count_flops(decoder(config, kept, GRID), config.decoder_depth) * (share * 0.7)
    found = tokenizer_flops(config)
    assert (found.forward, found.backward) == pytest.approx((total.forward, total.backward), rel=1e-12)


@pytest.mark.parametrize("law", BUDGET_LAWS)
@pytest.mark.parametrize("num_registers", [16, 12])
def test_probabilities_are_those_of_the_draws(law: str, num_registers: int) -> None:
    u = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = budgets_from_uniform(law, num_registers, u)
    observed = draws.bincount(minlength=num_registers + 1) / len(draws)
    planned = budget_probabilities(law, num_registers)
    assert planned.sum() == pytest.approx(1.0)
    assert (observed - planned).abs().max() < 0.01


def test_unknown_law() -> None:
    with pytest.raises(ValueError, match="nested_dropout='half' is unknown"):
        budget_probabilities("half", 8)


def test_expectation_is_the_mean_of_real_steps() -> None:
    batch, steps = 8, 25
    config = dataclasses.replace(CONFIG, nested_dropout="uniform", null_dropout=0.2)
    model, latents, generator = FlexTok(config), torch.randn(batch, *LATENTS), torch.Generator().manual_seed(0)
    found: Counter[tuple[int, bool]] = Counter()
    for _ in range(steps):
        draws = sample_draws(config, latents, generator, stratified_budgets=True)
        found.update(zip(draws.num_tokens.tolist(), draws.null.tolist(), strict=True))
    total = 0
    for (kept, null), times in found.items():  # one image at a time, without the padding of a CPU's attention
        one = TrainingDraws(latents[:1], torch.ones(1), torch.tensor([kept]), torch.tensor([null]))
        total += times * sum(tokenizer_step(model, one))
    assert tokenizer_flops(config).training == pytest.approx(total / steps / batch, rel=0.03)


def test_short_budgets_cost_less() -> None:
    laws = ("none", "uniform", "pow2")
    costs = [tokenizer_flops(dataclasses.replace(CONFIG, nested_dropout=law)).training for law in laws]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("stratified", [False, True])
def test_rare_budgets(stratified: bool) -> None:
    """The largest sum of what images keep, of a thousand steps; stratified ones are all near the mean."""
    config = dataclasses.replace(CONFIG, null_dropout=0.2)
    batch, generator, latents = 32, torch.Generator().manual_seed(0), torch.empty(32, 1, 1, 1)
    bytes_of = sum(_kept_at_every_budget(_shape(config), None, Numerics(), None, None))[:, 0]
    totals = []
    for _ in range(1000):
        draws = sample_draws(config, latents, generator, stratified_budgets=stratified)
        totals.append(float(bytes_of[draws.num_tokens.masked_fill(draws.null, 0)].sum()))
    planned = tokenizer_activations(config, Numerics(), batch, stratified=stratified).kept
    assert max(totals) == pytest.approx(planned, rel=0.02)


def test_prior_agrees_with_six_operations_per_weight() -> None:
    config = PriorConfig.preset("49m")  # PaLM's formula, https://arxiv.org/abs/2204.02311, appendix B
    weights = config.depth * (4 * config.width**2 + 3 * config.width * 1706) + config.width * config.vocab_size
    palm = config.num_tokens * (6 * weights + 12 * config.depth * config.width * config.num_tokens)
    assert prior_flops(config).training == palm


# Memory

BATCH = 2
TOKENIZER = FlexTokConfig(
    vae=None,
    encoder_width=128,
    encoder_depth=3,
    decoder_width=192,
    decoder_depth=4,
    num_registers=64,
    grid_size=(8, 8),
    repa_layer=None,
)
PRIOR = PriorConfig(num_classes=3, vocab_size=1000, num_tokens=64, depth=4, width=128, head_dim=32)
PRIORS = {
    "class": PRIOR,
    "normalised": dataclasses.replace(PRIOR, qk_norm=True),
    "text": dataclasses.replace(PRIOR, num_classes=0, text_width=24),
    "published": dataclasses.replace(
        PRIOR,
        norm="layer",
        qk_norm=True,
        qk_norm_kind="rms",
        qkv_bias=True,
        bias=True,
        head_norm=True,
        null_class="zero",
    ),
    "published_text": dataclasses.replace(
        PRIOR, num_classes=0, text_width=24, norm="layer", gated=False, activation="gelu", cross_qk_norm=True
    ),
}


def autocast(half: bool):
    return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()


def linear_bytes(module: nn.Module, half: bool) -> int:
    """What autocast's copies of the weights take; autograd keeps them, too."""
    return half * 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def bytes_kept(forward, half: bool) -> int:
    with Count() as count, autocast(half):
        result = forward()
        return count.alive - result.nbytes


def latents_of(config: FlexTokConfig, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, config.latent_channels, *(side * config.patch_size for side in config.grid_size))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", [64, 20])
@pytest.mark.parametrize("options", [{}, {"causal_registers": False}, {"layout": "grid"}, {"objective": "mse"}])
def test_tokenizer(options: dict[str, object], half: bool, checkpointing: bool, kept: int) -> None:
    config = dataclasses.replace(TOKENIZER, nested_dropout="none", null_dropout=0.0, **options)
    model = FlexTok(config)
    model.checkpoint_activations(checkpointing)
    latents, numerics = latents_of(config), Numerics(2 if half else 4, fused_norms=False)
    draws = sample_draws(config, latents, torch.Generator().manual_seed(0))
    draws = draws._replace(num_tokens=torch.full((BATCH,), kept))
    found = bytes_kept(lambda: flow_loss(model, latents, draws).loss, half)
    planned = tokenizer_activations(config, numerics, BATCH)
    if kept < 64:
        bytes_of = sum(_kept_at_every_budget(_shape(config), None, numerics, None, None))[kept]
        planned = Activations(*(BATCH * bytes_of).tolist())
    activations = planned.inputs if checkpointing else planned.kept
    assert activations + linear_bytes(model, half) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokenizer_with_a_route(checkpointing: bool, half: bool) -> None:
    config = dataclasses.replace(TOKENIZER, nested_dropout="none", null_dropout=0.0, decoder_depth=6)
    model, routing = FlexTok(config), Routing(0.5, 1, 3)
    model.checkpoint_activations(checkpointing)
    latents, numerics = latents_of(config), Numerics(2 if half else 4, fused_norms=False)
    generator = torch.Generator().manual_seed(0)
    draws = sample_draws(config, latents, generator)
    route = sample_route(routing, config, latents, generator)
    found = bytes_kept(lambda: flow_loss(model, latents, draws, route=route).loss, half)
    planned = tokenizer_activations(config, numerics, BATCH, routing=routing)
    activations = planned.inputs if checkpointing else planned.kept
    assert activations + linear_bytes(model, half) == pytest.approx(found, rel=0.05)
    whole = tokenizer_activations(config, numerics, BATCH)
    assert planned.kept < 0.95 * whole.kept and planned.largest_block == whole.largest_block


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", PRIORS)
def test_prior(name: str, half: bool) -> None:
    config, length = PRIORS[name], 20
    model = Prior(config)
    tokens = torch.randint(config.vocab_size, (BATCH, config.num_tokens))
    condition = torch.zeros(BATCH, dtype=torch.int64)
    if config.text_width is not None:
        condition = TextStates(torch.randn(BATCH, length, 24), torch.ones(BATCH, length, dtype=torch.bool))
    kept = bytes_kept(lambda: model.hidden(tokens, condition), half)
    planned = prior_activations(config, Numerics(2 if half else 4, fused_norms=False), length) * BATCH
    copies = linear_bytes(model, half) - linear_bytes(model.head, half)
    assert planned.kept + copies == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_projection_to_the_teacher(kind: Projection, half: bool) -> None:
    width, features, patches = 96, 120, 64
    head = build_projection(kind, width, features)
    inputs = torch.randn(BATCH, patches, width, requires_grad=True)
    kept = bytes_kept(lambda: alignment_loss(head(inputs, (8, 8)), torch.randn(BATCH, features, 8, 8)), half)
    planned = count_activations(projection(kind, width, features, (8, 8)), 1, Numerics(2 if half else 4)) * BATCH
    assert planned.kept + linear_bytes(head, half) == pytest.approx(kept, rel=0.05)


def peak_of_steps(model: nn.Module, loss_of, half: bool) -> int:
    """Peak of three steps in Lightning's order: gradients go after the next forward pass."""
    with Count() as seen:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for _ in range(3):
            with autocast(half):
                loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    return seen.peak + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def setup(half: bool, checkpointing: bool) -> Setup:
    numerics = Numerics(2 if half else 4, fused_norms=False)
    return Setup(machine("cpu"), 1, numerics, checkpointing=checkpointing, averaged=False)


@pytest.mark.parametrize(
    ("half", "checkpointing", "train"),
    [
        *((half, checkpointing, None) for half in (False, True) for checkpointing in (False, True)),
        (True, False, ["decoder"]),
    ],
)
def test_peak_of_the_tokenizers_steps(half: bool, checkpointing: bool, train: list[str] | None) -> None:
    batch = 4
    config = dataclasses.replace(TOKENIZER, nested_dropout="none", null_dropout=0.0)
    model, latents = FlexTok(config), latents_of(config, batch)
    train_only(model, train)
    model.checkpoint_activations(checkpointing)
    draws = sample_draws(config, latents, torch.Generator().manual_seed(0))
    peak = peak_of_steps(model, lambda: flow_loss(model, latents, draws).loss.mean(), half)
    vae = VAEConfig(latent_channels=16, norm_num_groups=8, block_out_channels=(16,) * 4)
    net = dataclasses.replace(config, vae=vae)
    options = {
        "stratified_budgets": False,
        "vae": None,
        "teacher": None,
        "route_share": 0.0,
        "route_blocks": None,
        "activation_checkpointing": checkpointing,
        "train": train,
    }
    how = setup(half, checkpointing)
    planned = memory(tokenizer_workload(options, net, 128, "latents", how.numerics), how, batch)
    assert planned["total"] - planned["frozen"] == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [None, 64])
def test_peak_of_the_priors_steps(half: bool, checkpointing: bool, chunk: int | None) -> None:
    batch = 4
    model, tokens = Prior(PRIOR), torch.randint(PRIOR.vocab_size, (batch, PRIOR.num_tokens))
    model.checkpoint_activations(checkpointing)
    classes = torch.zeros(batch, dtype=torch.int64)
    loss = lambda: token_loss(model.hidden(tokens, classes), model.head.weight, tokens, chunk_size=chunk).loss  # noqa: E731
    peak, how = peak_of_steps(model, loss, half), setup(half, checkpointing)
    options = {"loss_chunk": chunk, "tokenizer": None, "text_encoder": None, "activation_checkpointing": checkpointing}
    planned = memory(prior_workload(options, PRIOR, 256, "tokens", how.numerics), how, batch)
    assert planned["total"] == pytest.approx(peak, rel=0.15)


def test_the_logits_are_most_of_an_unchunked_loss() -> None:
    whole, chunked = (token_loss_bytes(PRIOR, 64, chunk, Numerics()) for chunk in (None, 64))
    assert whole > 10 * chunked > 0


class Held(TorchDispatchMode):
    """The most that the storages of this process hold at one time, also those that grow and shrink, as fsdp's do."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                value = value.to_local() if isinstance(value, DTensor) else value
                storage = value.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = weakref.ref(storage)
                    weakref.finalize(storage, self.storages.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(ref().nbytes() for ref in list(self.storages.values()) if ref() is not None))
        return result


def peak_of_a_process(rank: int, port: int, batch: int, half: bool, answer) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    model, tokens = Prior(SHARDED), torch.randint(SHARDED.vocab_size, (batch, SHARDED.num_tokens))
    module = SimpleNamespace(
        device_mesh={"data_parallel": torch.distributed.init_device_mesh("cpu", (2,))},
        trainer=SimpleNamespace(precision="bf16-mixed" if half else "32-true"),
    )
    shard(module, [model], methods=["hidden"])
    classes, optimizer = torch.zeros(batch, dtype=torch.int64), torch.optim.AdamW(model.parameters(), fused=True)
    with Held() as held:
        for _ in range(3):
            with autocast(half):
                loss = token_loss(model.hidden(tokens, classes), model.head.weight, tokens, chunk_size=64).loss
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    if rank == 0:
        answer.put(held.peak)
    torch.distributed.destroy_process_group()


SHARDED = dataclasses.replace(PRIOR, depth=6, width=192)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("batch", [1, 12])
def test_peak_of_sharded_steps(batch: int, half: bool) -> None:
    """At the end of the backward pass for a small batch, at its beginning for a large one."""
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork.Process(target=peak_of_a_process, args=(rank, port, batch, half, answer)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    how = dataclasses.replace(setup(half, False), devices=2, strategy="fsdp")
    options = {"loss_chunk": 64, "tokenizer": None, "text_encoder": None, "activation_checkpointing": False}
    planned = memory(prior_workload(options, SHARDED, 256, "tokens", how.numerics), how, batch)
    assert planned["total"] == pytest.approx(answer.get(), rel=0.08)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "train",
    [("decoder",), ("encoder",), ("decoder.head", "decoder.blocks.1"), ("encoder.blocks", "decoder.null_token")],
)
def test_a_tokenizer_that_is_trained_in_part_is_exact(train: tuple[str, ...], checkpointing: bool) -> None:
    config = dataclasses.replace(CONFIG, encoder_depth=4, decoder_depth=5, nested_dropout="none", null_dropout=0.0)
    model = FlexTok(config)
    train_only(model, train)
    model.checkpoint_activations(checkpointing)
    draws = sample_draws(config, torch.randn(3, *LATENTS), torch.Generator().manual_seed(0))
    planned = tokenizer_flops(config, GRID, checkpointing, train=train) * 3
    assert tokenizer_step(model, draws) == (planned.forward, planned.backward + planned.recomputed)
    assert planned.forward == tokenizer_flops(config, GRID).forward * 3
    assert planned.training < tokenizer_flops(config, GRID).training * 3


@pytest.mark.parametrize("train", [("head",), ("blocks.1", "token_embedding")])
def test_a_prior_that_is_trained_in_part_is_exact(train: tuple[str, ...]) -> None:
    model, tokens = Prior(PRIOR), torch.zeros(2, PRIOR.num_tokens, dtype=torch.int64)
    train_only(model, train)
    classes = torch.zeros(2, dtype=torch.int64)
    found = counted(lambda: token_loss(model.hidden(tokens, classes), model.head.weight, tokens).loss)
    assert sum(found) == (prior_flops(PRIOR, train=train) * 2).training


def test_what_is_frozen_in_part_has_no_states_and_no_copies() -> None:
    options = {"vae": None, "teacher": None, "route_share": 0.0, "route_blocks": None, "stratified_budgets": False}
    options |= {"train": ["decoder"], "activation_checkpointing": False}
    net = dataclasses.replace(CONFIG, vae=VAEConfig("pixel", 12))
    workload = tokenizer_workload(options, net, 16, "latents", Numerics(2))
    whole = tokenizer_workload({**options, "train": None}, net, 16, "latents", Numerics(2)).parameters
    model, own = FlexTok(CONFIG).decoder, workload.parameters
    assert own.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert own.cast == sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)) < whole.cast
    assert own.total == whole.total > own.trained
    assert ["frozen encoder computes in float32" in note for note in workload.notes] == [True]
    assert all_blocks(("decoder.blocks.20.attn", "decoder.head")) == ("decoder.blocks", "decoder.head")
