"""`flextok push`: publish a model on the Hugging Face Hub, with a card from its run's records."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from flextok_pl.models.pretrained import PretrainedModel, kind_of
from flextok_pl.models.prior import Prior
from flextok_pl.models.publishing import Publishable
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.sharing.publication import Publication


def push_model(
    source: str,
    repository: str,
    *,
    send: bool = False,
    records: str | None = None,
    tokenizer: str | None = None,
    half: bool = False,
    format: Literal["ours", "official", "flexar"] = "ours",
    max_shard_size: str | None = None,
    out: str | None = None,
    **options: Any,
) -> None:
    """Publish a model on the Hugging Face Hub with a model card; without `--send`, only show what it would send.

    Shows the repository, its visibility, the files with their sizes, and the text of the card. The card is written from
    the records of the run and its evaluations. All files go in one commit, with the token in HF_TOKEN or of
    `hf auth login`.

    Args:
        source: folder of a run, a `.safetensors` file, or a folder with a model: a tokenizer, a prior or an
            autoencoder.
        repository: `OWNER/NAME`; created if it does not exist.
        send: send the files. By default nothing leaves this machine.
        records: folder that `flextok test` wrote; default that of the run, or the newest one beside it with records of
            these weights.
        tokenizer: for a prior: Hub id of the tokenizer of its tokens, for its file and its card.
        half: store weights in half precision, for half the size.
        format: `official` for the published code of tokenizers, `flexar` for that of priors.
        max_shard_size: size of the largest file, such as `5GB`; a larger model becomes several files with an index.
            Default 5 GB for our format, and one file for the published formats, whose code reads only that.
        out: folder that keeps the files, for you to inspect; it must be empty or new.
        **options: options of `Publication`.
    """
    given = Publication(repository=repository, **options)  # reports what is missing before a model is read
    model, run = _model(source)
    if tokenizer is not None:
        if not isinstance(model, Prior):
            raise ValueError(f"tokenizer={tokenizer}: only a prior has one, and {source} is a {type(model).__name__}")
        model.config = dataclasses.replace(model.config, tokenizer_id=tokenizer)
    if half:
        model.half()
    model.publish(given, send, run, records, format, max_shard_size, out)


def _model(source: str) -> tuple[Publishable, Path | None]:
    """Load a model, and find the folder of its run."""
    place = Path(source)
    for folder in (place / "vae", place):
        if (folder / "diffusion_pytorch_model.safetensors").is_file():
            return VAE.from_pretrained(folder), place
    kinds: tuple[type[PretrainedModel], ...] = (Prior, FlexTok)  # a file beside it may mark the official format
    kind, file = kind_of(source, *kinds)
    return kind.from_pretrained(source), file.parent if place.exists() else None
