"""The prior: what it predicts, what it generates, and that the cache changes nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import sample_tokens
from pretended_device import DEVICE, pretended_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flextok_pl.config import PriorConfig
from flextok_pl.layers.causal import KeyValueCache
from flextok_pl.models import generation
from flextok_pl.models import prior as module
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.sampling import filter_logits, scale_at_positions

B, K, V, E = 3, 12, 40, 8
SMALL = PriorConfig(num_classes=5, vocab_size=V, num_tokens=K, depth=2, width=32, head_dim=16)
CONFIGS = {
    "class": SMALL,
    "qk_norm": dataclasses.replace(SMALL, qk_norm=True),
    "text": dataclasses.replace(SMALL, num_classes=0, text_width=E, null_text_length=2),
    "none": dataclasses.replace(SMALL, num_classes=0),
    "published": dataclasses.replace(
        SMALL,
        **{"norm": "layer", "norm_eps": 1e-5, "qk_norm": True, "qk_norm_kind": "rms", "qk_scale": 0.1},
        **{"qkv_bias": True, "bias": True, "head_bias": True, "head_norm": True, "final_norm": False},
        **{"gated": False, "activation": "gelu_tanh", "mlp_hidden_width": 70, "fixed_positions": True},
        null_class="zero",
    ),
}


def build(kind: str) -> Prior:
    """A prior with weights large enough to be decided."""
    generator = torch.Generator().manual_seed(0)
    prior = Prior(CONFIGS[kind]).eval()
    for parameter in prior.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    if kind == "text":
        prior.set_null_text(torch.randn(2, E, generator=generator))
    return prior


def condition_of(kind: str) -> Tensor | TextStates | None:
    if kind == "none":
        return None
    if kind != "text":
        return torch.tensor([0, 4, -1])
    states = torch.randn(B, 6, E, generator=torch.Generator().manual_seed(1))
    return TextStates(states, torch.arange(6) < torch.tensor([[1], [6], [3]]))


def row_of(condition: Tensor | TextStates | None, i: int) -> Tensor | TextStates | None:
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else condition[i : i + 1]
    return TextStates(condition.states[i : i + 1], condition.mask[i : i + 1])


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(B)]


def without_cache(prior: Prior, condition: Tensor | TextStates | None, scale: object, temperature: float) -> Tensor:
    """Sampling by whole forward passes, conditional and unconditional apart."""
    uniform = torch.stack([torch.rand(K, generator=g, dtype=torch.float64) for g in seeds()])
    scales = scale_at_positions(scale, K)
    tokens = torch.zeros(B, 0, dtype=torch.int64)
    for position in range(K):
        padded = torch.cat([tokens, torch.zeros(B, 1, dtype=torch.int64)], 1)
        with torch.no_grad():
            own, free = prior(padded, condition)[:, -1], prior(padded)[:, -1]
        logits = free + scales[position] * (own - free)
        tokens = torch.cat([tokens, sample_tokens(logits, uniform[:, position], temperature=temperature)[:, None]], 1)
    return tokens


@pytest.mark.parametrize("kind", CONFIGS)
def test_position_i_predicts_token_i_from_those_before(kind: str) -> None:
    prior = build(kind)
    tokens = torch.randint(V, (B, K), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = prior(tokens, condition_of(kind))
        assert logits.shape == (B, K, V)
        for i in range(K):
            changed = tokens.clone()
            changed[:, i] = (changed[:, i] + 1) % V
            moved = (prior(changed, condition_of(kind)) - logits).abs().amax((0, 2)) > 0
            assert moved.tolist() == [position > i for position in range(K)]
        torch.testing.assert_close(prior(tokens[:, :5], condition_of(kind)), logits[:, :5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_the_condition_matters_and_null_is_null(kind: str) -> None:
    prior, condition = build(kind), condition_of(kind)
    tokens = torch.randint(V, (B, K), generator=torch.Generator().manual_seed(2))
    null = torch.tensor([False, True, False])
    with torch.no_grad():
        own, free = prior(tokens, condition), prior(tokens)
        mixed = prior.head(prior.hidden(tokens, condition, null))
    assert (own[0] - free[0]).abs().max() > 0.1
    for row, expected in enumerate((own, free, own)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=0, atol=1e-5)
    if kind == "class":
        torch.testing.assert_close(own[2], free[2])  # -1 is no class


def test_text_padding_is_not_seen() -> None:
    prior, (states, mask) = build("text"), condition_of("text")
    noisy = torch.where(mask[..., None], states, torch.randn(states.shape))
    tokens = torch.zeros(B, K, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(prior(tokens, TextStates(noisy, mask)), prior(tokens, TextStates(states, mask)))
        alone = prior(tokens[:1], TextStates(states[:1, :1], mask[:1, :1]))
        torch.testing.assert_close(alone, prior(tokens, TextStates(states, mask))[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("scale", [1.0, 3.0, [1.0, 4.0]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_and_the_batched_guidance_change_nothing(kind: str, scale: object, temperature: float) -> None:
    prior, condition = build(kind), condition_of(kind)
    tokens = prior.generate(condition, cfg_scale=scale, temperature=temperature, generator=seeds())
    assert torch.equal(tokens, without_cache(prior, condition, scale, temperature))


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_with_the_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 within 1e-5 of those of a whole pass, guidance included."""
    prior, condition, seen = build(kind), condition_of(kind), []

    def spy(logits: Tensor, *arguments: object) -> Tensor:
        seen.append(logits)
        return filter_logits(logits, *arguments)

    monkeypatch.setattr(generation, "filter_logits", spy)
    tokens = prior.generate(condition, cfg_scale=2.0, generator=seeds())
    with torch.no_grad():
        own, free = prior(tokens, condition), prior(tokens)
    torch.testing.assert_close(torch.stack(seen, 1), free + 2 * (own - free), rtol=0, atol=1e-5)


class Calls(TorchDispatchMode):
    """Names and shapes of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.seen.append((str(func), [tensor.shape for tensor in tensors]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"cfg_scale": [1.0, 4.0], "top_p": 0.9}, {"cfg_scale": 2.0, "top_k": 9}])
def test_steps_for_a_graph_change_nothing(
    kind: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph captures is the same operations on the same shapes at each position, and reads no number."""
    prior, condition, logits, steps = build(kind), condition_of(kind), [], []

    def spy(values: Tensor, *arguments: object) -> Tensor:
        logits.append(values)
        return filter_logits(values, *arguments)

    def repeat(step: Callable[[], None], count: int, graph_device: torch.device | None) -> None:
        assert graph_device == prior.device
        for _ in range(count):
            with Calls() as calls:
                step()
            steps.append(calls.seen)

    monkeypatch.setattr(generation, "filter_logits", spy)
    growing = [prior.generate(condition, **options, generator=seeds())]
    growing.append(prior.generate(condition, **options, prefix=growing[0][:, :4], generator=seeds()))
    expected, logits[:] = torch.stack(logits), []
    monkeypatch.setattr(module, "can_capture", lambda model: True)
    monkeypatch.setattr(generation, "repeat", repeat)
    fixed = [prior.generate(condition, **options, generator=seeds())]
    fixed.append(prior.generate(condition, **options, prefix=growing[0][:, :4], generator=seeds()))
    torch.testing.assert_close(torch.stack(logits), expected, rtol=0, atol=1e-5)
    for one, other in zip(fixed, growing, strict=True):
        assert torch.equal(one, other)
    assert len(steps) == (K - 1) + (K - 5) and all(step == steps[0] for step in steps)
    assert not any(name in seen for seen, _ in steps[0] for name in ("_local_scalar_dense", "nonzero"))


@pytest.mark.parametrize("for_graph", [False, True])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0, "top_k": 9, "top_p": 0.9}])
def test_the_host_waits_for_no_token(
    options: dict[str, object], for_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build("class").generate(condition_of("class"), **options, generator=seeds())
    monkeypatch.setattr(module, "can_capture", lambda model: for_graph)
    with pretended_device(monkeypatch) as device:

        def repeat(step: Callable[[], None], count: int, graph_device: torch.device | None) -> None:
            assert (graph_device == DEVICE) == for_graph
            device.watching = True
            for _ in range(count):
                step()
            device.watching = False

        monkeypatch.setattr(generation, "repeat", repeat)
        prior = build("class").to(DEVICE)
        tokens = prior.generate(condition_of("class"), **options, generator=seeds()).cpu()
    assert not device.waits, "\n".join(device.waits)
    assert torch.equal(tokens, expected)


def test_texts_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, texts = torch.arange(B * K).view(B, K) % V, condition_of("text")
    with torch.no_grad():
        expected = build("text")(tokens, texts)
        with pretended_device(monkeypatch):
            found = build("text").to(DEVICE)(tokens, texts).cpu()
    torch.testing.assert_close(found, expected)


def test_the_cache_has_the_type_of_the_keys() -> None:
    """Which is not that of the weights under autocast."""
    block, x = build("qk_norm").blocks[0], torch.randn(B, K, 32, generator=torch.Generator().manual_seed(3))
    cache = KeyValueCache(K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        steps = [block(x[:, :4], None, cache), *(block(x[:, i : i + 1], None, cache) for i in range(4, K))]
        assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
        # CPUs round bfloat16 at different places of a sum; without the cache some values are off by more than 1.
        torch.testing.assert_close(torch.cat(steps, 1), block(x), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_without_a_value(value: float) -> None:
    prior = build("class")
    prior.head.weight.data[7, 3] = value
    with pytest.raises(ValueError, match="the prior's logits hold NaN or infinity"):
        prior.generate(condition_of("class"), generator=seeds())


@pytest.mark.parametrize("vocabulary", [64, 64 * 7, 50, 3 * 16])
def test_the_head_by_slices(vocabulary: int) -> None:
    prior = Prior(dataclasses.replace(SMALL, vocab_size=vocabulary))
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(prior.logits(states), prior.head(states), rtol=0, atol=1e-6)
        assert prior.bfloat16().logits(states.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sample_depends_on_its_seed_only(kind: str) -> None:
    prior, condition = build(kind), condition_of(kind)
    together = prior.generate(condition, cfg_scale=2.0, generator=seeds())
    for i in range(B):
        alone = prior.generate(row_of(condition, i), cfg_scale=2.0, generator=[seeds()[i]])
        assert torch.equal(alone[0], together[i])
    assert len(together.unique(dim=0)) == B
    short = prior.generate(condition, num_tokens=5, cfg_scale=2.0, generator=seeds())
    assert torch.equal(short, together[:, :5])


def test_prefix() -> None:
    prior, condition = build("class"), condition_of("class")
    tokens = prior.generate(condition, cfg_scale=2.0, generator=seeds())
    for length in (0, 1, 5, K):
        again = prior.generate(condition, cfg_scale=2.0, prefix=tokens[:, :length], generator=seeds())
        assert torch.equal(again, tokens)
    other = (tokens[:, :3] + 1) % V
    assert torch.equal(prior.generate(condition, prefix=other, generator=seeds())[:, :3], other)


def test_batch_without_condition() -> None:
    prior = build("none")
    assert prior.generate(num_tokens=2).shape == (1, 2)
    assert prior.generate(num_tokens=2, generator=seeds()).shape == (3, 2)
    assert prior.generate(num_tokens=2, prefix=torch.zeros(4, 1, dtype=torch.int64)).shape == (4, 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_leaves_gradients(checkpointing: bool) -> None:
    gradients = []
    for enabled in (False, checkpointing):
        prior = build("text").train()
        prior.checkpoint_activations(enabled)
        prior(torch.ones(B, K, dtype=torch.int64), condition_of("text")).square().mean().backward()
        gradients.append([p.grad for p in prior.parameters()])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, other)


def test_presets_have_their_sizes() -> None:
    sizes = {"49m": 49, "85m": 85, "201m": 201, "393m": 393, "679m": 680, "1.33b": 1327}
    sizes |= {"113m_text": 113, "382m_text": 382, "1.15b_text": 1152, "3.06b_text": 3058}
    for name, millions in sizes.items():
        config = PriorConfig.preset(name)
        assert config.width == 64 * config.depth and config.head_dim == 64
        with torch.device("meta"):
            blocks = Prior(config).blocks
        assert round(sum(p.numel() for p in blocks.parameters()) / 1e6) == millions, name
    with pytest.raises(ValueError, match="preset 'nosuch'"):
        PriorConfig.preset("nosuch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1"),
        ({"vocab_size": 1}, "vocab_size=1"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"width": 30}, "width=30 must be a multiple of head_dim=16"),
        ({"text_width": 8}, "one kind of condition"),
        ({"num_classes": 0, "text_width": 0}, "text_width=0"),
        ({"class_names": ("a",)}, "class_names has 1 entries"),
    ],
)
def test_impossible_configurations(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": torch.tensor([5])}, r"classes 5..5; this prior has 0..4"),
        ({"condition": torch.tensor([-2])}, "-2"),
        ({"condition": torch.tensor([0.5])}, "must be int64 classes"),
        ({"condition": (torch.zeros(1, 2, 8), torch.ones(1, 2).bool())}, "must be int64 classes"),
        ({"condition": LABELS, "num_tokens": 13}, r"num_tokens=13 is not in 1..12"),
        ({"condition": LABELS, "num_tokens": 0}, "num_tokens=0"),
        ({"condition": LABELS, "top_p": 0.0}, "top_p=0.0"),
        ({"condition": LABELS, "prefix": torch.zeros(2, 13, dtype=torch.int64)}, "prefix"),
        ({"condition": LABELS, "prefix": torch.zeros(2, 5, dtype=torch.int64), "num_tokens": 4}, "prefix has shape"),
        ({"condition": LABELS, "prefix": torch.zeros(3, 5, dtype=torch.int64)}, "prefix has shape"),
        ({"condition": LABELS, "prefix": torch.full((2, 1), V)}, "another tokenizer"),
        ({"condition": LABELS, "generator": [torch.Generator()]}, "1 entries for 2 samples"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("class").generate(**arguments)


def test_bad_tokens_and_texts() -> None:
    prior = build("class")
    for tokens in (torch.zeros(2, 3), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 13, dtype=torch.int64)):
        with pytest.raises(ValueError, match="tokens (is|must be)"):
            prior(tokens, LABELS)
    with pytest.raises(ValueError, match=r"tokens holds 40..40, outside 0..39"):
        prior(torch.full((2, 3), V), LABELS)
    text, tokens = build("text"), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="use the prior's own text encoder"):
        text(tokens, (torch.zeros(1, 4, E + 1), torch.ones(1, 4).bool()))
    with pytest.raises(ValueError, match="a text has no states"):
        text(tokens, (torch.zeros(1, 4, E), torch.zeros(1, 4).bool()))
    with pytest.raises(ValueError, match="null_text_length"):
        text.set_null_text(torch.zeros(3, E))
    assert text(tokens, torch.zeros(1, 4, E)).shape == (1, 3, V), "states without a mask are all there"
