"""The chunked cross-entropy is the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flextok_pl.models.token_loss import _compiled_chunk, token_loss

B, K, D, V = 3, 7, 16, 50


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, K, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(V, (B, K), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [None, 1, 4, 21, 512])
def test_values_and_gradients(inputs, smoothing: float, chunk: int | None) -> None:
    hidden, weight, targets = inputs
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    result = token_loss(hidden, weight, targets, smoothing, chunk)
    gradients = torch.autograd.grad(3 * result.loss, (hidden, weight))
    torch.testing.assert_close(result.loss, plain, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, K)
    torch.testing.assert_close(result.nll, nll, rtol=0, atol=5e-6)
    assert torch.equal(result.correct, logits.argmax(-1) == targets)
    assert not result.nll.requires_grad


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_bias_of_the_head(inputs, chunk: int | None) -> None:
    hidden, weight, targets = inputs
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1), requires_grad=True)
    logits = F.linear(hidden, weight, bias)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    result = token_loss(hidden, weight, targets, chunk_size=chunk, bias=bias)
    torch.testing.assert_close(result.loss, plain, rtol=1e-6, atol=0)
    assert torch.equal(result.correct, logits.argmax(-1) == targets)
    sources = (hidden, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad(result.loss, sources), torch.autograd.grad(plain, sources), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_without_gradients_none_are_made(inputs) -> None:
    hidden, weight, targets = inputs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = token_loss(hidden.detach(), weight, targets, chunk_size=4)
    assert not result.loss.requires_grad and counter.get_total_flops() == 2 * B * K * D * V, "only the logits"
    torch.testing.assert_close(result.loss, token_loss(hidden, weight, targets, chunk_size=None).loss)


def test_autocast_uses_half_matrices_and_float32_sums(inputs) -> None:
    hidden, weight, targets = inputs
    with torch.autocast("cpu", torch.bfloat16):
        result = token_loss(hidden, weight, targets, chunk_size=4)
    result.loss.backward()
    assert result.loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    full = token_loss(hidden.detach(), weight.detach(), targets, chunk_size=4).loss
    assert 0 < abs(result.loss.item() - full.item()) < 0.05


def test_a_matrix_that_comes_in_half_precision_has_the_gradient_of_autocasts_own_copy(inputs) -> None:
    """Shards are gathered so; their gradients are sums in float32, over all chunks."""
    hidden, weight, targets = inputs
    own = weight.detach().bfloat16().float().requires_grad_()
    gathered = weight.detach().bfloat16().requires_grad_()
    gathered.grad_dtype = torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        losses = [token_loss(hidden, matrix, targets, chunk_size=2).loss for matrix in (own, gathered)]
    torch.stack(losses).sum().backward()
    assert losses[0] == losses[1] and torch.equal(own.grad, gathered.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_chunk_is_one_graph_with_the_same_values(
    inputs, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with its gradients and mutations, and run without a compiler, which a build machine need not have."""
    compile, sizes = torch.compile, []

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> object:
        sizes.append(len(examples[0]))
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    _compiled_chunk.cache_clear()
    hidden, weight, targets = inputs
    found = []
    for compiled in (False, True, True):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            result = token_loss(hidden, weight, targets, 0.1, 8, compiled)
        found.append([*result, *torch.autograd.grad(result.loss, (hidden, weight))])
    _compiled_chunk.cache_clear()
    assert sizes == [8, 5], "21 positions, and nothing compiled again"
    for plain, *others in zip(*found, strict=True):
        for other in others:
            assert torch.equal(plain, other)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("positions", "vocabulary", "deviation"), [(8192, 500, 0.02), (512, 64000, 0.02), (512, 64000, 1)]
)
def test_float16_keeps_small_gradients_under_loss_scaling(
    hidden_dtype: torch.dtype, positions: int, vocabulary: int, deviation: float
) -> None:
    """The slope of a logit is first 1 / (8,192 positions x 500 tokens) = 2.4e-7: float16 resolves 6e-8."""
    generator, scale = torch.Generator().manual_seed(0), 65536.0
    hidden = torch.randn(positions, 16, generator=generator).to(hidden_dtype).requires_grad_()
    weight = (deviation * torch.randn(vocabulary, 16, generator=generator)).requires_grad_()
    seen = vocabulary // 2  # the other tokens are never targets
    targets = torch.randint(seen, (positions,), generator=generator)
    plain = F.cross_entropy(hidden.float() @ weight.T, targets)
    expected = torch.autograd.grad(plain, (hidden, weight), grad_outputs=torch.tensor(scale))
    with torch.autocast("cpu", torch.float16):
        result = token_loss(hidden, weight, targets, chunk_size=512)
    gradients = torch.autograd.grad(scale * result.loss, (hidden, weight))
    assert [gradient.dtype for gradient in gradients] == [hidden_dtype, torch.float32]
    torch.testing.assert_close(result.loss, plain, rtol=1e-4, atol=0)
    pairs = {
        "hidden": (gradients[0], expected[0]),
        "head": (gradients[1], expected[1]),
        "rows that are no target": (gradients[1][seen:], expected[1][seen:]),
    }
    for name, (ours, theirs) in pairs.items():
        assert (ours.float() - theirs.float()).norm() < 5e-3 * theirs.float().norm(), name
