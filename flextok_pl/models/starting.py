"""Start a model from the weights of a finished one, with errors that name each mismatch; train parts of a model."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flextok_pl.contracts import same_maker, weights_hash
from flextok_pl.layers.embeddings import fitted_positions
from flextok_pl.layers.frozen import is_frozen
from flextok_pl.models.identity import latents_identity, makers_of_the_same
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE

NOTES = frozenset(
    {"tokenizer", "tokenizer_id", "text_encoder", "null_text_length", "text_length", "class_names"}
    | {"generation", "started_from", "same_tokens_as", "num_steps", "guidance", "guidance_scale", "trained_grids"}
    | {"scaling_factor", "shift_factor"}
)
"""Options that belong to a model itself. States of the empty string come from its own text encoder."""

OF_NEW_MODELS = frozenset({"vae", "position_base"})
"""Options that affect new models only. An autoencoder is frozen and given separately."""

OF_TRAINING = frozenset(
    {"nested_dropout", "null_dropout", "timestep_law", "mode_scale", "stratified", "repa_layer", "fixed_positions"}
)
"""Options that affect how a model is trained, not what it computes."""

OF_SHAPES = frozenset(
    {"num_classes", "text_width", "vocab_size", "num_tokens", "depth", "width", "mlp_ratio", "mlp_hidden_width"}
    | {"qk_norm", "cross_qk_norm", "qkv_bias", "bias", "head_bias", "gated", "final_norm", "head_norm", "null_class"}
    | {"text_hidden_width", "text_bias", "latent_channels", "grid_size", "num_registers", "time_frequencies"}
    | {"encoder_width", "encoder_depth", "decoder_width", "decoder_depth"}
    | {"kind", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types"}
    | {"mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"}
)
"""Options that are visible in the names and shapes of tensors: if those fit, so do these."""

OF_PARTS = {
    **dict.fromkeys(("head_dim", "qk_scale", "qk_norm_kind", "qk_norm_eps", "activation", "text_mask"), "blocks"),
    **{"text_activation": "text_projection", "encoder_head_dim": "encoder", "causal_registers": "encoder"},
    **dict.fromkeys(("decoder_head_dim", "max_timestep", "objective", "missing_tokens"), "decoder"),
}
"""Options that affect one part only."""

Network = Prior | FlexTok | VAE
"""Models that can start from a finished model of their kind."""

_VERBS = {"init_parts": "takes", "train": "trains"}
_SHOWN = 5


class Start(NamedTuple):
    """Source of a model's first weights."""

    source: Network  # the finished model
    taken: frozenset[str]  # names of the weights taken
    notes: Mapping[str, Any]  # `started_from`: the source as given, and its hash; `same_tokens_as`


def check_parts(network: Network, option: Literal["init_parts", "train"], parts: Sequence[str] | None) -> None:
    """Refuse parts that the model does not have, or that have nothing to train; None means all."""
    if parts is None:
        return
    if not parts:
        verb = _VERBS[option]
        raise ValueError(f"{option}=[] {verb} nothing; null {verb} everything")
    names = list(_weights(network))
    for part in parts:
        if not any(_within(name, [part]) for name in names):
            known = sorted({name.partition(".")[0] for name in names})
            raise ValueError(
                f"{option} has {part!r}, which is not a part of the model; it has {', '.join(known)}, and parts of "
                f"these, such as {names[0]}"
            )
    if option == "train" and not any(weight.requires_grad for weight in _weights(network, parts).values()):
        raise ValueError(f"train={list(parts)} trains nothing: positions of patches are fixed; name other parts")


def train_only(network: nn.Module, parts: Sequence[str] | None) -> None:
    """Freeze all other parts, in place: they get no gradient, no optimizer state and no average."""
    if parts is not None:
        for name, weight in _weights(network).items():
            weight.requires_grad_(weight.requires_grad and _within(name, parts))


def check_frozen(network: Network, trained: Sequence[str] | None, start: Start | None) -> None:
    """Refuse to freeze new weights, because nothing would ever train them. Fixed position tables need no training."""
    taken = frozenset[str]() if start is None else start.taken
    new = [
        name
        for name in _weights(network)
        if name not in taken and not _is_fixed(network, name) and not _within(name, trained or [name])
    ]
    if new:
        parts = ", ".join(sorted({name.partition(".")[0] for name in new}))
        raise ValueError(
            f"train={list(trained or [])} freezes {parts}, whose weights are new: name a finished model as "
            "model.init_from, with these among model.init_parts, or train them too"
        )


def load_autoencoder(source: str) -> VAE:
    """Load the autoencoder of a folder, a Hub id or a tokenizer's `.safetensors` file."""
    whole = source.endswith(".safetensors")
    return FlexTok.from_pretrained(source).require_vae() if whole else VAE.from_pretrained(source)


def start_from(network: Network, source: str, parts: Sequence[str] | None = None) -> Start:
    """Give a model the weights of a finished one, in place.

    Position tables of another patch grid are resampled to the model's; the note records this.

    Args:
        network: a new model, on the CPU. Buffers and a tokenizer's autoencoder stay as they are.
        source: see `from_pretrained` of its class, or `load_autoencoder`.
        parts: prefixes of the names to take, such as `encoder` or `blocks.0`; None for all.

    Raises:
        ValueError: there is no such model, or it does not fit: its configuration computes something else, its weights
            have other names or shapes, or, for a whole tokenizer, its autoencoder differs.
    """
    if source.endswith(".ckpt"):
        raise ValueError(
            f"init_from={source!r} is a training checkpoint: give the .safetensors file that it exported, or resume "
            "that training with --ckpt_path"
        )
    try:
        given = load_autoencoder(source) if isinstance(network, VAE) else type(network).from_pretrained(source)
    except ValueError as error:
        raise ValueError(f"init_from={source!r}: {error}") from error
    here = _weights(network, parts)
    there, resampled = fitted_positions(_weights(given, parts), here)
    wrong = _wrong_tensors(there, here)
    concerned = {name.partition(".")[0] for name in here}
    differing = {
        name: values
        for name, values in _differing(given.config, network.config).items()
        if (name not in OF_PARTS or OF_PARTS[name] in concerned) and (wrong or name not in OF_SHAPES)
    }
    if wrong or differing:
        facts = [f"{name} is {_plain(its)} there and {_plain(own)} here" for name, (its, own) in differing.items()]
        options = [f"model.net.{name}={_plain(its)}" for name, (its, _) in differing.items()]
        remedy = f"set {' '.join(options)}" if options else "give a model of this architecture"
        raise ValueError(
            f"init_from={source!r} does not fit the model: {_some(facts or wrong)}; {remedy}, or name the parts "
            "to take as model.init_parts"
        )
    if isinstance(given, FlexTok) and isinstance(network, FlexTok) and parts is None:
        _check_autoencoder(given, network, source)
    with torch.no_grad():
        for name, weight in here.items():
            weight.copy_(there[name])
    note = f"{getattr(given, 'loaded_from', '') or source} ({weights_hash(given)}{resampled})"
    notes: dict[str, Any] = {"started_from": note if parts is None else f"{note}: {', '.join(parts)}"}
    if isinstance(given, FlexTok) and isinstance(network, FlexTok) and is_frozen(network.encoder):
        its = given.identity()
        notes["same_tokens_as"] = makers_of_the_same(its) if same_maker(its, network.identity()) else []
    return Start(given, frozenset(here), notes)


def _check_autoencoder(given: FlexTok, network: FlexTok, source: str) -> None:
    if given.vae is None or network.vae is None:
        return
    its, own = _latents_of(given.require_vae()), _latents_of(network.require_vae())
    if its != own:
        raise ValueError(
            f"init_from={source!r} was trained on latents of the autoencoder {its}, but the model has {own}: set "
            "model.vae to the former, such as the .safetensors file that holds both, or "
            "model.init_parts=[encoder,decoder] to train them on other latents"
        )


def _latents_of(vae: VAE) -> dict[str, Any]:
    """The facts that determine an autoencoder's latents and their scale."""
    config, sha256 = vae.config, latents_identity(vae)["sha256"]
    return {"sha256": sha256, "scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor}


def _weights(network: nn.Module, parts: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """Parameters that may be taken or trained, by name; of some parts only, if given."""
    owner = network.network if isinstance(network, VAE) else network
    found = ((name, weight) for name, weight in owner.named_parameters() if not _within(name, ["vae"]))
    return {name: weight for name, weight in found if parts is None or _within(name, parts)}


def _is_fixed(network: Network, name: str) -> bool:
    """Whether a weight is a position table that no training changes."""
    return name.endswith("patch_posemb") or (
        isinstance(network, Prior) and network.config.fixed_positions and name == "positions"
    )


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _differing(there: Any, here: Any) -> dict[str, tuple[Any, Any]]:
    """Option -> its values in two configurations of one class, where they differ, except notes."""
    names = [field.name for field in dataclasses.fields(there)]
    counted = [name for name in names if name not in NOTES | OF_NEW_MODELS | OF_TRAINING]
    values = {name: (getattr(there, name), getattr(here, name)) for name in counted}
    return {name: (its, own) for name, (its, own) in values.items() if its != own}


def _wrong_tensors(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing there" for name in here if name not in there]
    wrong += [f"{name} is missing here" for name in there if name not in here]
    shapes = [(name, list(there[name].shape), list(here[name].shape)) for name in here if name in there]
    return wrong + [f"{name} is {its} there and {own} here" for name, its, own in shapes if its != own]


def _plain(value: Any) -> str:
    """Format as in YAML and on the command line."""
    return json.dumps(value)


def _some(facts: Sequence[str]) -> str:
    more = f"; and {len(facts) - _SHOWN} more" if len(facts) > _SHOWN else ""
    return f"{'; '.join(facts[:_SHOWN])}{more}"
