"""Small models and verifiers for tests of search."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from model_helpers import randomized
from torch import Tensor

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.flow.decoding import Decoding
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.verifier import Context

K, V, E = 16, 30, 8
NET = PriorConfig(num_classes=4, vocab_size=V, num_tokens=K, depth=2, width=32, head_dim=16)
NETS = {"class": NET, "text": replace(NET, num_classes=0, text_width=E, null_text_length=2)}
CONDITIONS: dict[str, Any] = {
    "class": torch.tensor([2]),
    "text": TextStates(torch.randn(1, 3, E, generator=torch.Generator().manual_seed(3)), torch.ones(1, 3).bool()),
}
PROMPT = Prompt("apple", 2, "an apple")


def small_prior(kind: str = "class") -> Prior:
    generator = torch.Generator().manual_seed(0)
    prior = Prior(NETS[kind]).eval()
    for parameter in prior.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return prior


def small_tokenizer() -> FlexTok:
    return randomized(replace(FlexTokConfig.preset("tiny"), fsq_levels=(5, 3, 2))).eval()


def options(**changes: Any) -> SearchOptions:
    usual = {"num_candidates": 3, "beam_width": 2, "cfg_scale": [1.0, 3.0], "decoding": Decoding(num_steps=2)}
    return SearchOptions(**{**usual, **changes})


@dataclass
class Likelihood:
    """Log-probability of each token, on average."""

    name: str = "likelihood"
    needs_images: bool = False

    def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        assert images is None and context.log_probs is not None and len(prompts) == len(context.tokens)
        return context.log_probs / context.tokens.shape[1]


@dataclass
class Sum:
    """Of token ids: the best sequence is known."""

    name: str = "sum"
    needs_images: bool = False

    def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        return context.tokens.double().sum(1)


@dataclass
class Alike:
    """Cannot tell candidates apart."""

    name: str = "alike"
    needs_images: bool = False

    def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        return torch.zeros(len(prompts), dtype=torch.float64)


class Red:
    """Of images; keeps how many it saw at a time."""

    name = "red"
    needs_images = True

    def __init__(self) -> None:
        self.pools: list[int] = []

    def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        assert images is not None and images.dtype == torch.uint8 and len(images) == len(prompts)
        self.pools.append(len(images))
        means = images.double().mean((2, 3))  # (B, 3)
        return means[:, 0] - means[:, 1:].mean(1)
