"""Hyper-parameters of the models: VAE, tokenizer and prior.

- Each configuration is one flat, frozen dataclass. It names everything needed to build the model, and checks itself
  when made.
- Its fields are the options of `model.net` in YAML and on the command line, and the metadata of a checkpoint.
- Presets are named configurations; the files in `experiments/nets` hold the same values.

The architecture is described in FlexTok (https://arxiv.org/abs/2502.13967). Values marked "unconfirmed" are stated by
no primary source; a checkpoint's own metadata always decides.
"""

from flextok_pl.config.checks import config_from_dict
from flextok_pl.config.prior import PRIOR_PRESETS, Activation, GenerationConfig, NormKind, PriorConfig
from flextok_pl.config.tokenizer import (
    TOKENIZER_PRESETS,
    FlexTokConfig,
    Guidance,
    Layout,
    NestedDropoutLaw,
    Objective,
    TimestepLaw,
    VAEConfig,
)

__all__ = [
    "PRIOR_PRESETS",
    "TOKENIZER_PRESETS",
    "Activation",
    "FlexTokConfig",
    "GenerationConfig",
    "Guidance",
    "Layout",
    "NestedDropoutLaw",
    "NormKind",
    "Objective",
    "PriorConfig",
    "TimestepLaw",
    "VAEConfig",
    "config_from_dict",
]
