"""Read and write FlexAR releases: priors of EPFL and Apple, as `model.safetensors` with `config.yaml` beside it.

Where our null class has its own embedding, the published model adds nothing to the start token. So we write the start
token plus this embedding, and the classes minus it; the sums are the same up to rounding. The original tensors are
written too, under names that the published loader ignores, so that reading returns exactly what was written. The same
holds for the states of the empty string, which the published code computes.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from flextok_pl.config import PriorConfig
from flextok_pl.interop.flexar_config import HEAD, POST_TRUNK, PREPROCESSOR, TEXT_MLP, read_config
from flextok_pl.interop.flexar_section import BLOCKS
from flextok_pl.interop.flexar_write import config_to_flexar
from flextok_pl.interop.format import Contents, Format, Made, Written
from flextok_pl.interop.interpolation import Resolver, read_yaml
from flextok_pl.interop.tensor_file import TensorFile

CONFIG = "config.yaml"

_START = f"{PREPROCESSOR}sos_token_embed"
_CLASSES = f"{PREPROCESSOR}cls_embedding.weight"
_PASSED_OVER = ("image_tokenizer", "t5_embedder")  # parts of names; those networks have their own repositories
_OWN_START = "models.image_tokenizer.flextok_pl.start"
_OWN_CLASSES = "models.image_tokenizer.flextok_pl.class_embedding"
_OWN_NULL_TEXT = "models.text_encoder.t5_embedder.flextok_pl.null_text"
_PREFIXES = {  # prefix of a name in our state dict -> prefix of the published name
    "token_embedding.": f"{PREPROCESSOR}embedding.",
    "positions": f"{PREPROCESSOR}positional_embedding",
    "class_embedding.weight": _CLASSES,
    "text_projection.0.": f"{TEXT_MLP}fc1.",
    "text_projection.2.": f"{TEXT_MLP}fc2.",
    "norm.": POST_TRUNK,
    "head_norm.": f"{HEAD}norm.",
    "head.": f"{HEAD}linear.",
}
_CLASS_BLOCK = {"attn_norm": "norm_1", "mlp_norm": "norm_2", "attn": "attn", "mlp": "mlp"}
_TEXT_BLOCK = {
    "attn_norm": "norm_1",
    "cross_norm": "norm_2",
    "mlp_norm": "norm_3",
    "attn": "self_attn",
    "cross": "cross_attn",
    "mlp": "mlp",
}


class FlexAR(Format[PriorConfig]):
    """The format of the published priors."""

    companion = CONFIG

    def recognises(self, file: TensorFile) -> bool:
        """Check for tensors of the published model."""
        return any(name.startswith("models.ar_image_model.") for name in file.shapes)

    def read(self, file: TensorFile, vae_config: Mapping[str, Any] | str | Path | None = None) -> Contents[PriorConfig]:
        """Compare the configuration with the tensors; see `flextok_pl.interop.flexar_config`."""
        if CONFIG not in file.beside:
            raise ValueError(
                f"there is no {CONFIG} beside it, which a FlexAR release needs: tensors do not show everything"
            )
        config = read_config(Resolver(read_yaml(file.beside[CONFIG])), file.shapes, file.path.parent)
        if _OWN_CLASSES in file.shapes:
            config = dataclasses.replace(config, null_class="learned")
        if _OWN_NULL_TEXT in file.shapes:
            config = dataclasses.replace(config, null_text_length=file.shapes[_OWN_NULL_TEXT][0])
        return Contents(config, partial(_source, config=config, there=file.shapes), _is_passed_over)

    def write(self, config: PriorConfig, weights: Mapping[str, Tensor]) -> Written:
        """Write the published layout; ValueError for an option that its classes cannot express."""
        text = yaml.safe_dump(config_to_flexar(config), sort_keys=False)
        tensors: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            source = _source(name, config, {_OWN_NULL_TEXT: ()})
            if isinstance(source, str):
                tensors[source] = tensor
            elif source.names == (_START,):
                tensors[_START] = tensor.view(1, 1, -1)
            elif name not in ("start", "class_embedding.weight"):
                tensors |= zip(source.names, map(torch.clone, tensor.chunk(len(source.names))), strict=True)
        if config.null_class == "learned" and config.num_classes:
            tensors[_OWN_START], tensors[_OWN_CLASSES] = weights["start"], weights["class_embedding.weight"]
            tensors[_START], tensors[_CLASSES] = _without_null(tensors[_OWN_START], tensors[_OWN_CLASSES])
        return Written({"format": "pt"}, tensors, {CONFIG: text})


def _is_passed_over(name: str) -> bool:
    return any(part in name for part in _PASSED_OVER)


def _source(name: str, config: PriorConfig, there: Mapping[str, tuple[int, ...]]) -> str | Made:
    """Find or make a tensor of our state dict in a release with the tensors `there`."""
    if config.null_class == "learned" and config.num_classes and name in ("start", "class_embedding.weight"):
        return Made((_OWN_START, _OWN_CLASSES, _START, _CLASSES), partial(_with_null, name == "start"))
    if name == "start":
        return Made((_START,), torch.flatten)
    if name == "null_text":
        if _OWN_NULL_TEXT in there:
            return _OWN_NULL_TEXT
        assert config.text_width is not None
        return Made((), partial(torch.full, (config.null_text_length, config.text_width), float("nan")))
    if name.startswith("blocks."):
        return _block_source(name, config, there)
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no published name for {name}")


def _block_source(name: str, config: PriorConfig, there: Mapping[str, tuple[int, ...]]) -> str | Made:
    """`_source` of a tensor of a block."""
    _, number, part, rest = name.split(".", 3)
    names = _CLASS_BLOCK if config.text_width is None else _TEXT_BLOCK
    theirs = f"{BLOCKS}{number}.{names[part]}."
    matrix, _, kind = rest.rpartition(".")  # of attention: wqkv, wq, wkv, proj, q_norm, k_norm
    if matrix == "wqkv":
        separate = tuple(f"{theirs}{each}_proj.{kind}" for each in "qkv")
        return Made(separate, _joined) if separate[0] in there else f"{theirs}qkv.{kind}"
    if part == "cross" and matrix == "wkv":
        return Made((f"{theirs}Wk.{kind}", f"{theirs}Wv.{kind}"), _joined)
    if part == "cross" and matrix == "wq":
        return f"{theirs}Wq.{kind}"
    if part == "attn" and matrix == "proj" and f"{theirs}o_proj.{kind}" in there:
        return f"{theirs}o_proj.{kind}"
    return theirs + rest


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _without_null(start: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Convert start token (D,) and embeddings (C + 1, D), null class last, to a model that adds nothing for null."""
    return (start + classes[-1]).view(1, 1, -1), classes[:-1] - classes[-1]


def _with_null(wants_start: bool, start: Tensor, classes: Tensor, theirs: Tensor, their_classes: Tensor) -> Tensor:
    """Our start token or embeddings; refuses them if the published model's are not made of them."""
    made = _without_null(start, classes)
    if not start.is_meta and not all(map(torch.equal, made, (theirs, their_classes))):
        raise ValueError(f"{_OWN_START} and {_OWN_CLASSES} do not fit {_START} and {_CLASSES}: remove the former")
    return start if wants_start else classes
