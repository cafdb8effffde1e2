"""`flextok probe`: measure how well a linear classifier predicts the class from the first k tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flextok_pl.cli.tools import checked_budgets, default_device, picture_size
from flextok_pl.contracts import same_maker, weights_hash
from flextok_pl.data import ShardDataModule
from flextok_pl.data.shards.sources import load_indices, require_same_classes
from flextok_pl.evaluation.protocol import versions
from flextok_pl.evaluation.report import format_columns, format_value, make_records, write_json
from flextok_pl.metrics.linear_probe import LinearProbe
from flextok_pl.models.tokenizer import FlexTok


def probe_tokens(
    train: str,
    val: str,
    tokenizer: str,
    budgets: str | None = None,
    l2: float = 0.1,
    batch_size: int = 64,
    num_workers: int = 2,
    json: str | None = None,
    device: str | None = None,
) -> None:
    """Fit a linear classifier to the codes of the first k tokens, and measure its accuracy on other pictures.

    The tokenizer is frozen. The codes of k tokens are concatenated and standardised. The classifier minimises
    cross-entropy, in which all classes weigh the same, plus a quadratic penalty.

    Args:
        train: shard set with classes to fit on: images, or tokens of this tokenizer.
        val: shard set to measure on, of images or tokens as well.
        tokenizer: a `.safetensors` file, a folder or a Hub id.
        budgets: numbers of tokens, such as 1,4,16,64; default 1, 2, 4, ... up to all.
        l2: strength of the penalty.
        batch_size: pictures per batch.
        num_workers: processes that decode pictures.
        json: file to write the records to.
        device: default a GPU if available.
    """
    place = default_device(device)
    tok = FlexTok.from_pretrained(tokenizer, device=place)
    wanted = checked_budgets(budgets, tok.num_registers)
    first, other = (load_indices(source)[0] for source in (train, val))
    classes = first.classes
    if not classes or not other.classes:
        raise ValueError(f"train={train!r} and val={val!r} both need classes, and one has none")
    require_same_classes(first, other)
    fitted, tested = (_codes(tok, source, batch_size, num_workers) for source in (train, val))
    rows, records = [], []
    protocol = {
        "train": train,
        "val": val,
        "train_samples": len(fitted[1]),
        "num_samples": len(tested[1]),
        "num_classes": len(classes),
        "largest_class": float(torch.bincount(tested[1]).max()) / len(tested[1]),
        "l2": l2,
        "image_size": picture_size(tok),
        "tokenizer_hash": weights_hash(tok),
        "versions": versions(),
    }
    for budget in wanted:
        features, labels = fitted[0][:, :budget].flatten(1), fitted[1]
        classifier = LinearProbe.fit(features, labels, len(classes), "tokens", l2)
        accuracy = _accuracy(classifier, tested[0][:, :budget].flatten(1), tested[1])
        records += make_records({budget: accuracy}, protocol, {})
        rows.append([str(budget), *(format_value(value) for value in accuracy.values())])
    print(format_columns([["tokens", "accuracy", "balanced accuracy"], *rows]))
    share = protocol["largest_class"]
    print(
        f"{len(tested[1])} pictures of {len(classes)} classes, fitted to {len(fitted[1])}; always naming the largest "
        f"class would reach {share:.2f} and {1 / len(classes):.2f}"
    )
    if json is not None:
        write_json(records, Path(json))


def _accuracy(classifier: LinearProbe, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the samples that are classified correctly, and the mean of this share over classes."""
    right = classifier.probabilities(features, features).argmax(1) == labels
    shares = [float(right[labels == label].float().mean()) for label in torch.unique(labels)]
    return {
        "probe_accuracy": int(right.sum()) / len(right),
        "probe_balanced_accuracy": sum(shares) / len(shares),
    }


def _codes(tok: FlexTok, source: str, batch_size: int, num_workers: int) -> tuple[Tensor, Tensor]:
    """(N, K, L) codes and (N,) classes of the samples that have one."""
    data = ShardDataModule(
        test=source,
        image_size=picture_size(tok),
        eval_batch_size=batch_size,
        num_workers=num_workers,
        channels=tok.image_channels,
    )
    made_by = data.tokenizer
    if made_by is not None and not same_maker(made_by, tok.identity()):
        own = tok.identity()["sha256"]
        raise ValueError(f"{source} holds tokens of tokenizer {made_by['sha256']}, not of {own}")
    codes, labels = [], []
    for batch in tqdm(data.test_dataloader(), desc="tokens", unit="batch", leave=False):
        tokens = batch["tokens"] if "tokens" in batch else tok.tokenize(batch["image"].to(tok.device))
        chosen = batch["label"] >= 0
        codes.append(tok.quantizer.tokens_to_codes(tokens.to(tok.device)).cpu()[chosen])
        labels.append(batch["label"][chosen])
    return torch.cat(codes), torch.cat(labels)
