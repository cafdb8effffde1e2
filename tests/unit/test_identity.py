"""Which tokens a model makes: what its hash depends on, and which records of tokenizers belong together."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flextok_pl.assets import DEMO_PRIOR, DEMO_TOKENIZER
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.contracts import by_all_weights, same_maker, weights_hash
from flextok_pl.layers.frozen import Frozen
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.modules.saved import SavedPrior

VAE_NET = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
NET = dataclasses.replace(
    FlexTokConfig.preset("tiny"), vae=VAE_NET, latent_channels=4, encoder_depth=1, decoder_depth=1, grid_size=(4, 4)
)


def tokenizer(**changes: Any) -> FlexTok:
    torch.manual_seed(0)
    return FlexTok(dataclasses.replace(NET, **changes))


def nudged(name: str) -> FlexTok:
    tok = tokenizer()
    with torch.no_grad():
        tok.get_parameter(name).view(-1)[0] += 1e-3
    return tok


@pytest.mark.parametrize(
    "name", ["decoder.head.proj.weight", "decoder.code_embed.weight", "vae.vae.decoder.conv_out.bias"]
)
def test_what_only_decodes_does_not_matter(name: str) -> None:
    own, its = tokenizer().identity(), nudged(name).identity()
    assert own["sha256"] == its["sha256"] and own["model_sha256"] != its["model_sha256"]
    assert own["model_sha256"] == weights_hash(tokenizer())


@pytest.mark.parametrize(
    "change",
    [
        lambda: nudged("encoder.head.bias"),
        lambda: nudged("encoder.registers"),
        lambda: nudged("encoder.patch_posemb"),
        lambda: nudged("vae.vae.encoder.conv_in.weight"),
        lambda: nudged("vae.vae.quant_conv.bias"),
        lambda: tokenizer(fsq_levels=(8, 8, 8, 5, 5, 6)),
        lambda: tokenizer(causal_registers=False),
        lambda: tokenizer(encoder_head_dim=16),
        lambda: tokenizer(vae=dataclasses.replace(VAE_NET, scaling_factor=0.5)),
        lambda: tokenizer(vae=dataclasses.replace(VAE_NET, shift_factor=0.1)),
        lambda: tokenizer(vae=dataclasses.replace(VAE_NET, norm_num_groups=2)),
    ],
)
def test_what_makes_tokens_matters(change: Callable[[], FlexTok]) -> None:
    assert change().identity()["sha256"] != tokenizer().identity()["sha256"]


def test_a_file_and_a_frozen_autoencoder_change_nothing(tmp_path: Path) -> None:
    own = tokenizer()
    assert FlexTok.from_pretrained(own.save_pretrained(tmp_path)).identity() == own.identity()
    assert FlexTok(NET, Frozen(VAE(VAE_NET))).identity()["sha256"] != own.identity()["sha256"]
    beside = FlexTok(NET, Frozen(own.require_vae()))
    beside.load_state_dict({name: value for name, value in own.state_dict().items() if not name.startswith("vae.")})
    assert beside.identity()["sha256"] == own.identity()["sha256"]


NEW = {"sha256": "tokens", "model_sha256": "whole"}
CASES = [
    (NEW, {"sha256": "tokens", "model_sha256": "other"}, True),
    (NEW, {"sha256": "others", "model_sha256": "whole"}, False),
    (NEW, {"sha256": "whole"}, True),
    (NEW, {"sha256": "before"}, False),
    ({**NEW, "same_as": ["older", "before"]}, {"sha256": "before"}, True),
    ({**NEW, "same_as": ["older", "before"]}, "before", True),
    (NEW, "tokens", True),
    (NEW, "whole", True),
    (NEW, "", False),
    ({"sha256": "whole"}, "whole", True),
    ("whole", "tokens", False),
]


@pytest.mark.parametrize(("one", "other", "same"), CASES)
def test_records(one: Any, other: Any, same: bool) -> None:
    assert same_maker(one, other) is same is same_maker(other, one)


def test_arguments_of_sets_are_what_earlier_versions_wrote() -> None:
    record = {"vae": "here", **NEW, "same_as": ["before"], "num_tokens": 4}
    assert by_all_weights(record) == {"vae": "here", "sha256": "whole", "num_tokens": 4}
    assert by_all_weights({"name": "minilm"}) == {"name": "minilm"}


def test_the_shipped_prior_knows_the_shipped_tokenizer() -> None:
    own = FlexTok.from_pretrained(DEMO_TOKENIZER).identity()
    assert same_maker(own, Prior.from_pretrained(DEMO_PRIOR).config.tokenizer)
    assert own["model_sha256"] == "ac70a1fd56692237", "as records have it"


def test_a_note_holds_as_long_as_the_tokens_are_the_same(tmp_path: Path) -> None:
    """An earlier version's prior goes with a tokenizer whose decoder was trained on, and not with another encoder."""
    before = tokenizer()
    old = weights_hash(before)
    config = PriorConfig(vocab_size=64000, num_tokens=16, depth=1, width=16, head_dim=16, tokenizer=old)
    prior = str(Prior(config).save_pretrained(tmp_path / "prior.safetensors"))
    for name, accepted in (("decoder.head.proj.weight", True), ("encoder.head.weight", False)):
        after = nudged(name)
        after.config = dataclasses.replace(after.config, same_tokens_as=(before.identity()["sha256"], old))
        assert ("same_as" in after.identity()) is accepted
        file = str(after.save_pretrained(tmp_path / f"{accepted}.safetensors"))
        if accepted:
            SavedPrior(prior, file)
        else:
            with pytest.raises(ValueError, match=f"belongs to tokenizer .*, the prior to tokenizer {old}"):
                SavedPrior(prior, file)
