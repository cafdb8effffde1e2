"""Write image shards as token shards, on which a prior trains without the tokenizer.

Shapes in this file: B batch, S image side, K tokens of one image, L text positions, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextok_pl.contracts import Batch
from flextok_pl.data.encode.encoded import Encoding, npy, require_identity, write_encoded
from flextok_pl.data.shards.index import ShardIndex

Tokenize = Callable[[Tensor], Tensor]
"""(B, 3, S, S) in [-1, 1] -> (B, K) int64."""

EncodeText = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Maps B captions to states (B, L, E) and mask (B, L) bool, True for states, False for padding."""


def write_tokens(
    src: str | list[str],
    dst: Path | str,
    tokenize: Tokenize,
    *,
    tokenizer_id: Mapping[str, Any],
    encode_text: EncodeText | None = None,
    text_encoder_id: Mapping[str, Any] | None = None,
    **options: Any,
) -> ShardIndex:
    """Tokenize image shards and write the tokens, with label and text, as token shards.

    Repeat an interrupted run to resume it.

    Args:
        src: image shard set(s), as for `ShardDataModule`.
        dst: folder for the new set.
        tokenize: the tokenizer; gets batches on the CPU and may move them.
        tokenizer_id: JSON types that identify the tokenizer, with `sha256`, `vocab_size` and `num_tokens` (K). It goes
            into the index; sets of different `sha256` cannot be read together.
        encode_text: the text encoder, for a source with captions; its states are stored as float16.
        text_encoder_id: JSON types that identify it, with `name`. It goes into the index; sets of different encoders
            cannot be read together.
        **options: those of `Encoding`.

    Raises:
        ValueError: an option is out of range, the source lacks images or captions, or a model's output is invalid.
    """
    encoding = Encoding(**options)
    require_identity("tokenizer_id", tokenizer_id, {"sha256": str, "vocab_size": int, "num_tokens": int})
    vocab_size, num_tokens = tokenizer_id["vocab_size"], tokenizer_id["num_tokens"]
    made_by = {"tokenizer": dict(tokenizer_id)}
    fields, needs = ["tokens"], ["image"]
    if (encode_text is None) != (text_encoder_id is None):
        raise ValueError("encode_text and text_encoder_id belong together: give both or none")
    if text_encoder_id is not None:
        require_identity("text_encoder_id", text_encoder_id, {"name": str})
        made_by["text_encoder"] = dict(text_encoder_id)
        fields.append("text_states")
        needs.append("text")

    def files(batch: Batch) -> list[dict[str, bytes]]:
        tokens = _tokens(tokenize(batch["image"]), batch["key"], vocab_size, num_tokens)
        samples = [{"tokens.npy": npy(row)} for row in tokens]
        if encode_text is not None:
            for sample, states in zip(samples, _states(*encode_text(batch["text"]), batch["key"]), strict=True):
                sample["states.npy"] = npy(states)
        return samples

    return write_encoded(
        src, dst, files, encoding, writer="tokens", fields=fields, made_by=made_by, options={}, needs=needs
    )


def _tokens(tokens: Tensor, keys: Sequence[str], vocab_size: int, num_tokens: int) -> np.ndarray[Any, Any]:
    """Check the tokens, (B, K), and convert them to the smallest type that holds the vocabulary."""
    if tokens.shape != (len(keys), num_tokens) or tokens.dtype != torch.int64:
        raise ValueError(
            f"tokenize gave {tokens.dtype} of shape {tuple(tokens.shape)} for {len(keys)} images, expected int64 of "
            f"shape (B, K={num_tokens})"
        )
    array = tokens.cpu().numpy()
    for key, row in zip(keys, array, strict=True):
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"the tokens of {key!r} are in {row.min()}..{row.max()}, outside 0..{vocab_size - 1}; give the "
                f"vocab_size of this tokenizer instead of {vocab_size}"
            )
    return array.astype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _states(states: Tensor, mask: Tensor, keys: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """Check the states of each caption and drop their padding: (L_i, E) float16."""
    if states.ndim != 3 or len(states) != len(keys) or mask.shape != states.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"encode_text gave states {tuple(states.shape)} and a mask {tuple(mask.shape)} of {mask.dtype} for "
            f"{len(keys)} captions, expected (B, L, E) and (B, L) of torch.bool"
        )
    states, mask = states.to("cpu", torch.float16), mask.cpu()
    kept = [row[chosen] for row, chosen in zip(states, mask, strict=True)]  # B of (L_i, E)
    for key, rows in zip(keys, kept, strict=True):
        if not rows.isfinite().all():
            raise ValueError(f"the text states of {key!r} are not finite in float16; try another text encoder")
    return [rows.numpy() for rows in kept]
