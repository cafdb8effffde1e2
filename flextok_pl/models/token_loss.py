"""Cross-entropy over a large vocabulary without a logits tensor for the whole batch.

Logits of 8 images at 256 tokens of 64,000 take 0.5 GB in float32, and their gradient as much again. Here a chunk of
positions at a time is projected, turned into its loss and its gradient, and dropped; the gradients with respect to the
hidden states and the weight are complete when the forward pass ends. Under autocast to float16 those two products are
taken in float32.

Shapes: N positions of all images, D width, V vocabulary.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenLoss(NamedTuple):
    """Result of `token_loss`."""

    loss: Tensor  # scalar, the mean over positions, smoothed; only this one carries gradients
    nll: Tensor  # (...) negative log-likelihood in nats of each target
    correct: Tensor  # (...) bool, whether the target was the most likely token


def token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0, chunk_size: int | None = 512
) -> TokenLoss:
    """Cross-entropy of `hidden @ weight.T`, (..., D) and (V, D), against (...) int64 targets.

    `label_smoothing` is the share of the target's probability that is spread over the vocabulary; `chunk_size` the
    positions whose logits exist at a time, None for all at once, through autograd.
    """
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    if chunk_size is None:
        logits = F.linear(rows, weight).float()
        loss = F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)
        nll, correct = F.cross_entropy(logits.detach(), wanted, reduction="none"), logits.argmax(-1) == wanted
    else:
        loss, nll, correct = cast(
            tuple[Tensor, Tensor, Tensor],
            _ChunkedCrossEntropy.apply(rows, weight, wanted, label_smoothing, chunk_size),
        )
    return TokenLoss(loss, nll.view_as(targets), correct.view_as(targets))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`token_loss` for (N, D), (V, D) and (N,), with the gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, chunk_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wants_gradient = any(ctx.needs_input_grad[:2])
        count, vocabulary = len(hidden), len(weight)
        nll = torch.empty(count, device=hidden.device)
        correct = torch.empty(count, dtype=torch.bool, device=hidden.device)
        spread = torch.zeros((), device=hidden.device)  # summed loss of the smoothed part
        # The scaling of the loss, which keeps gradients in float16's range, comes with the backward pass only.
        wide = torch.float32 if dtype == torch.float16 else dtype
        gradients = None
        if wants_gradient:
            gradients = torch.empty_like(hidden, dtype=torch.float32), torch.zeros_like(weight)
        matrix, back = weight.to(dtype), weight.to(wide)
        with torch.autocast(device, enabled=False):
            for start in range(0, count, chunk_size):
                part = slice(start, start + chunk_size)
                rows, wanted = hidden[part].to(dtype), targets[part, None]
                logits = (rows @ matrix.T).float()  # (chunk, V)
                correct[part] = logits.argmax(-1) == wanted[:, 0]
                normaliser = logits.logsumexp(-1, keepdim=True)
                nll[part] = (normaliser - logits.gather(-1, wanted))[:, 0]
                if smoothing:
                    spread += (normaliser - logits.mean(-1, keepdim=True)).sum()
                if gradients is not None:
                    slope = logits.sub_(normaliser).exp_()  # softmax
                    slope.scatter_add_(-1, wanted, slope.new_full(wanted.shape, smoothing - 1))
                    slope = slope.sub_(smoothing / vocabulary).div_(count).to(wide)
                    gradients[0][part] = slope @ back
                    gradients[1].add_(slope.T @ rows.to(wide))
        ctx.gradients, ctx.dtype = gradients, hidden.dtype
        ctx.mark_non_differentiable(nll, correct)
        return (1 - smoothing) * nll.mean() + smoothing * spread / count, nll, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        return of_hidden.mul_(slope).to(ctx.dtype), of_weight.mul_(slope), None, None, None
