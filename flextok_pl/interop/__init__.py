"""Translate checkpoint formats: a file's metadata, tensor names and shapes <-> our configuration and names.

Tokenizers and priors are loaded and saved by `FlexTok` and `Prior` themselves, in any format listed here.
"""

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.interop.flexar import FlexAR
from flextok_pl.interop.format import Format
from flextok_pl.interop.native import Native
from flextok_pl.interop.official import Official, config_to_official, official_to_config

__all__ = ["PRIOR_FORMATS", "TOKENIZER_FORMATS", "config_to_official", "official_to_config"]

TOKENIZER_FORMATS: dict[str, Format[FlexTokConfig]] = {
    "ours": Native("flextok_pl", "model.safetensors", FlexTokConfig, "tokenizer.safetensors"),
    "official": Official(),
}
PRIOR_FORMATS: dict[str, Format[PriorConfig]] = {
    "ours": Native("flextok_pl.prior", "prior.safetensors", PriorConfig),
    "flexar": FlexAR(),
}
