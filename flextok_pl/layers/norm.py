"""Layer normalisation without parameters, in float32 or wider, and norms with parameters by their kind."""

import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.config import NormKind
from flextok_pl.precision import at_least_float32


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last dimension of `x` (eps 1e-5) in float32 or wider; keeps shape and dtype."""
    return F.layer_norm(at_least_float32(x), x.shape[-1:], eps=1e-5).to(x.dtype)


def make_norm(kind: NormKind, width: int, eps: float) -> nn.Module:
    """RMSNorm with gain, or LayerNorm with gain and bias or gain only, over the last dimension of (..., width)."""
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps)
    return nn.LayerNorm(width, eps=eps, bias=kind == "layer")
