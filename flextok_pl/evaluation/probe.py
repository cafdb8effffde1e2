"""Fit a linear probe on an extractor's features to the classes of any shard set, once, and keep it.

It learns from real images and their reconstructions. From real images alone it would mistake the decoder's look, which
all generated images share, for the mark of some class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.contracts import ImageSize, Reconstructor, class_difference
from flextok_pl.data import ShardDataModule
from flextok_pl.distributed import all_agree, gather_rows, rank
from flextok_pl.evaluation.decoding import decode
from flextok_pl.evaluation.kept_files import keep, kept_file, load_kept
from flextok_pl.evaluation.protocol import model_hashes
from flextok_pl.flow.decoding import EVERYWHERE, Decoding
from flextok_pl.keys import key_hash
from flextok_pl.metrics.images import to_uint8
from flextok_pl.metrics.linear_probe import LinearProbe
from flextok_pl.progress import announced

VERSION = 2
"""Version of a probe's training data; increase it if they change for the same key."""

PROBE_SEED = 0
"""Seed of the noise for reconstructions, so that runs of different seeds have the same probe."""

NONE = torch.zeros(0, dtype=torch.int64)


def probe_data(source: str, image_size: ImageSize, classes: Sequence[str] = (), channels: int = 3) -> ShardDataModule:
    """Open the images for a probe as a test set; see `fitted_probe`."""
    data = ShardDataModule(test=source, image_size=image_size, eval_batch_size=64, num_workers=0, channels=channels)
    index = data.shard_set("test").indices[0]
    if "image" not in index.fields or not index.classes:
        raise ValueError(
            f"classifier_data={source!r} holds {list(index.fields)} and {len(index.classes)} classes; a probe needs "
            "images with classes"
        )
    difference = class_difference(classes, index.classes) if classes else None
    if difference is not None:
        raise ValueError(
            f"classifier_data={source!r} and the prior differ in classes: {difference}; give pictures of the prior's "
            "classes (flextok data folder --classes)"
        )
    return data


def tokenizer_probe(
    source: str,
    image_size: ImageSize,
    extractor: FeatureExtractor,
    tokenizer: Reconstructor,
    decoding: Decoding,
    seed: int,
    cache_dir: Path | None,
    classes: Sequence[str] = (),
) -> LinearProbe:
    """A `fitted_probe` for a tokenizer's images, decoded in this way, on the extractor's device."""

    def reconstruct(images: Tensor, keys: list[str]) -> Tensor:
        tokens = tokenizer.tokenize(images.to(extractor.device))
        ((_, made),) = decode(
            tokenizer, tokens, [tokenizer.num_registers], decoding, keys, seed, image_size=images.shape[2:]
        )
        return made

    digest = model_hashes(tokenizer).get("tokenizer_hash", type(tokenizer).__name__)
    made_by = [digest, decoding.num_steps, decoding.guidance, decoding.guidance_scale, seed]
    if decoding.guidance_interval != EVERYWHERE:
        made_by.append(decoding.guidance_interval)
    channels = getattr(tokenizer, "image_channels", 3)
    probe = fitted_probe(source, image_size, extractor, reconstruct, made_by, cache_dir, classes, channels)
    return probe.to(extractor.device)


def fitted_probe(
    source: str,
    image_size: ImageSize,
    extractor: FeatureExtractor,
    reconstruct: Callable[[Tensor, list[str]], Tensor],
    made_by: Sequence[object],
    cache_dir: Path | None,
    classes: Sequence[str] = (),
    channels: int = 3,
) -> LinearProbe:
    """Fit a probe, or load the one that was fitted to the same images before. All processes must call it.

    `reconstruct` turns (B, channels, H, W) in [-1, 1] and their keys into uint8 reconstructions, and `made_by`, of JSON
    types, identifies it. `classes` are the names of the expected classes; empty if they are unknown.
    """
    data = probe_data(source, image_size, classes, channels)
    key = [VERSION, data.data_hash("test"), extractor.name, extractor.weights_hash, extractor.resize, *made_by]
    file = None if cache_dir is None else kept_file(cache_dir, "probe_", key)
    if file is not None and all_agree(file.is_file()):
        return load_kept(file, lambda state: LinearProbe(**state))
    features, labels, ids = [torch.zeros(0, extractor.dim)], [NONE], [NONE]
    for batch in tqdm(data.test_dataloader(), desc="features for the classifier", unit="batch", leave=False):
        for pixels in (to_uint8(batch["image"]), reconstruct(batch["image"], batch["key"])):
            features.append(extractor(pixels).cpu())
            labels.append(batch["label"])
            ids.append(torch.tensor([key_hash(key) for key in batch["key"]]))
    of_all = [gather_rows(torch.cat(parts)) for parts in (features, labels, ids)]  # each process has a share
    order = of_all[2].argsort(stable=True)  # an image, then its reconstruction
    with announced("fitting the classifier to the features"):
        probe = LinearProbe.fit(of_all[0][order], of_all[1][order], len(data.classes), extractor.name)
    if file is not None and rank() == 0:
        keep(file, probe.state_dict())
    return probe
