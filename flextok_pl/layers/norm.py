"""Layer normalisation without parameters, in float32 or wider."""

import torch.nn.functional as F
from torch import Tensor

from flextok_pl.precision import at_least_float32


def layer_norm(x: Tensor) -> Tensor:
    """Normalise the last dimension of `x` in float32, or float64 if it is (eps 1e-5); of `x`'s shape and dtype."""
    return F.layer_norm(at_least_float32(x), x.shape[-1:], eps=1e-5).to(x.dtype)
