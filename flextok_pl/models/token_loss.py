"""Cross-entropy over a large vocabulary without a logits tensor for the whole batch.

Logits of 8 images at 256 tokens of 64,000 take 0.5 GB in float32, and their gradient as much again. Here one chunk of
positions at a time is projected and turned into its loss and gradient. The gradients of the hidden states and the
weight are complete when the forward pass ends. They are those of the sum over positions; the backward pass divides by
the number of positions and applies the loss scale. So float16 holds slopes of logits, which lie between -1 and 1.

`torch.nn.functional.linear_cross_entropy` (torch 2.13 and later) makes its gradients in the same way. We do not use it,
because in torch 2.15 it

- returns only the mean, not the loss and the hit of each token;
- makes all logits at once with label smoothing;
- rounds the loss to the type of its inputs (6.156 instead of 6.218 in bfloat16), and sums the weight's gradient in that
  type, with twice our error over eight chunks;
- uses gradients of the mean in float16: at 8,192 positions those of rarely drawn tokens are 17 % off, and a loss scale
  of 65,536, the usual first one, makes them NaN.

Shapes: N positions of all images, C of them in a chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenLoss(NamedTuple):
    """Result of `token_loss`."""

    loss: Tensor  # scalar, the smoothed mean over positions; only it carries gradients
    nll: Tensor  # (...) negative log-likelihood in nats of each target
    correct: Tensor  # (...) bool, whether the target was the most likely token


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    chunk_size: int | None = 512,
    compiled: bool = False,
    bias: Tensor | None = None,
) -> TokenLoss:
    """Cross-entropy of `hidden @ weight.T + bias`, (..., D), (V, D) and (V,), against (...) int64 targets.

    `label_smoothing` is the share of the target's probability that is spread over the vocabulary. `chunk_size` is the
    number of positions whose logits exist at a time; None takes all at once, through autograd. `compiled` fuses what
    lies between a chunk's matrix products, for GPUs; on a CPU it is slower.
    """
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    if not torch.is_grad_enabled():
        weight = weight.detach()  # else its gradient, made in the forward pass, would be made in vain
    if bias is not None:  # one more column, of ones
        rows, weight = F.pad(rows, (0, 1), value=1.0), torch.cat([weight, bias[:, None]], 1)
    if chunk_size is None:
        logits = F.linear(rows, weight).float()
        loss = F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)
        nll, correct = F.cross_entropy(logits.detach(), wanted, reduction="none"), logits.argmax(-1) == wanted
    else:
        loss, nll, correct = cast(
            tuple[Tensor, Tensor, Tensor],
            _ChunkedCrossEntropy.apply(rows, weight, wanted, label_smoothing, chunk_size, compiled),
        )
    return TokenLoss(loss, nll.view_as(targets), correct.view_as(targets))


class _Chunk(NamedTuple):
    """Result of `_chunk`."""

    slope: Tensor  # (C, V) gradient of the sum over positions with respect to the logits
    nll: Tensor  # (C,)
    correct: Tensor  # (C,) bool
    spread: Tensor  # (C,) loss against the uniform distribution, where labels are smoothed


def _chunk(logits: Tensor, targets: Tensor, smoothing: float, dtype: torch.dtype) -> _Chunk:
    """Loss and slope of (C, V) logits, which are overwritten, and (C,) targets; the slope has type `dtype`."""
    logits, wanted = logits.float(), targets[:, None]
    top, likeliest = logits.max(-1, keepdim=True)
    own = logits.gather(-1, wanted)
    mean = logits.mean(-1, keepdim=True) if smoothing else own
    slope = logits.sub_(top).exp_()
    total = slope.sum(-1, keepdim=True)
    slope.mul_(1 / total)  # softmax
    if smoothing:
        slope.sub_(smoothing / slope.shape[-1])
    slope.scatter_add_(-1, wanted, slope.new_full(wanted.shape, smoothing - 1))
    normaliser = total.log() + top
    columns = normaliser - own, likeliest == wanted, normaliser - mean
    return _Chunk(slope.to(dtype), *(column[:, 0] for column in columns))


@cache
def _compiled_chunk() -> Callable[[Tensor, Tensor, float, torch.dtype], _Chunk]:
    """`_chunk` in a few kernels, compiled for a full chunk and for the last one."""
    return torch.compile(_chunk, dynamic=False, fullgraph=True)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`token_loss` for (N, D), (V, D) and (N,), with the gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, chunk_size: int, compiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(weight.dtype, torch.float32)  # sharded weights may come in half precision
        of_hidden = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        matrix, evaluate, values = weight.to(dtype), _compiled_chunk() if compiled else _chunk, []
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk_size):
                place = slice(start, start + chunk_size)
                rows = hidden[place].to(dtype)
                slope, *columns = evaluate(rows @ matrix.T, targets[place], smoothing, dtype)
                if of_hidden is not None:
                    of_hidden[place] = slope @ matrix
                if of_weight is not None and dtype == of_weight.dtype:  # avoids a copy of its size
                    torch.addmm(of_weight, slope.T, rows, out=of_weight)
                elif of_weight is not None:
                    of_weight.add_(slope.T @ rows)
                del slope  # frees it before the next chunk's
                values.append(columns)
        ctx.gradients, ctx.dtype, ctx.count = (of_hidden, of_weight), hidden.dtype, len(hidden)
        nll, correct, spread = (torch.cat(column) for column in zip(*values, strict=True))
        ctx.mark_non_differentiable(nll, correct)
        return (1 - smoothing) * nll.mean() + smoothing * spread.mean(), nll, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, slope: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        slope = slope / ctx.count
        rows = None if of_hidden is None else of_hidden.mul_(slope).to(ctx.dtype)
        return rows, None if of_weight is None else of_weight.mul_(slope), None, None, None, None
