"""Models for tests."""

import torch

from flextok_pl.config import FlexTokConfig
from flextok_pl.models.sampling import draw_tokens, filter_logits
from flextok_pl.models.tokenizer import FlexTok


def randomized(config: FlexTokConfig, dtype: torch.dtype = torch.float32) -> FlexTok:
    """A tokenizer in which every parameter matters: nothing is zero."""
    torch.manual_seed(0)
    tok = FlexTok(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in [*tok.encoder.parameters(), *tok.decoder.parameters()]:
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tok.to(dtype)


def sample_tokens(logits: torch.Tensor, uniform: torch.Tensor, **options: object) -> torch.Tensor:
    """One token for each row, the most likely one with temperature 0: (B, V) and (B,) -> (B,)."""
    if options.get("temperature") == 0:
        return logits.argmax(-1)
    return draw_tokens(filter_logits(logits, **options), uniform[:, None])[:, 0]
