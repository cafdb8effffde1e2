"""State the protocol of a number in its record: the networks, the model, the decoding and the software."""

from __future__ import annotations

import math
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.contracts import Reconstructor, weights_hash
from flextok_pl.flow.decoding import Decoding


def extractor_facts(extractor: FeatureExtractor) -> dict[str, str]:
    """Facts of a feature network for records."""
    return {
        "extractor": extractor.name,
        "extractor_weights_hash": extractor.weights_hash,
        "extractor_resize": extractor.resize,
    }


def decoding_facts(tokenizer: Reconstructor, decoding: Decoding) -> dict[str, Any]:
    """The decoding that a tokenizer really uses for these options: with objective `mse` one step, unguided."""
    config = getattr(tokenizer, "config", None)
    return decoding.under(getattr(config, "objective", "flow")).facts


def bits_per_token(tokenizer: Reconstructor) -> float | None:
    """log2 of the vocabulary, the most information of a token; None if the tokenizer does not state it."""
    vocab_size = getattr(getattr(tokenizer, "config", None), "vocab_size", None)
    return None if vocab_size is None else math.log2(vocab_size)


def model_hashes(tokenizer: object, prior: object = None) -> dict[str, str]:
    """`weights_hash` of each model with weights, and the commit of each model from the Hub.

    A tokenizer's hash includes the decoder, because it makes the images.
    """
    parts = {"tokenizer": tokenizer, "prior": prior}
    hashes = {f"{name}_hash": weights_hash(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    known = {f"{name}_source": getattr(part, "loaded_from", "") for name, part in parts.items()}
    return hashes | {name: source for name, source in known.items() if source}


def data_hash_text(total: int) -> str:
    """Format the hash of pixels and keys for records."""
    return f"{total % 2**64:016x}"


def versions() -> dict[str, str]:
    """Versions of the packages that a number depends on, and the commit if they run from a checkout."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for package in ("flextok_pl", "lightning", "torchmetrics", "torch-fidelity"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists() and shutil.which("git"):
        asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
        found["commit"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
    return found
