"""`flextok fid` against torch-fidelity's `calculate_metrics` on 10,000 and 10,000 real pictures.

Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist, MIT) from Debian's `dataset-fashion-mnist`: the first
10,000 training pictures against all 10,000 test pictures. Kernel distance, precision and recall are of all samples, the
inception score of one part, so that nothing is drawn. The figures are printed (`-s`). FASHION_COUNT takes fewer.
"""

import gzip
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.cli import main
from flextok_pl.evaluation import statistics
from flextok_pl.metrics.kernel import kernel_distance

DATASET = Path("/usr/share/datasets/fashion-mnist")
COUNT = int(os.environ.get("FASHION_COUNT", "10000"))
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """Folders `train` and `test` of RGB pictures of 28 px."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))  # tests have one
    if not DATASET.is_dir():
        pytest.skip(f"{DATASET} is not there: apt-get install dataset-fashion-mnist")
    folder = tmp_path_factory.mktemp("fashion")
    for part, name in (("train", "train"), ("test", "t10k")):
        content = gzip.decompress((DATASET / f"{name}-images-idx3-ubyte.gz").read_bytes())
        pixels = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)[:COUNT]
        (folder / part).mkdir()
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).convert("RGB").save(folder / part / f"{i:05d}.png")
    return folder


class TheirEffNet(FeatureExtractorBase):
    """EfficientNet-Lite0 as torch-fidelity takes a network."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.ours = build_extractor("effnet-lite0")

    @staticmethod
    def get_provided_features_list():
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pooled"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        return (self.ours(images),)


@pytest.mark.parametrize("extractor", ["effnet-lite0", "inception-v3-compat"])
def test_agrees_with_torch_fidelity(extractor, fashion, inception_file, tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "effnet-lite0", TheirEffNet)
    monkeypatch.setattr(statistics, "kernel_distance", partial(kernel_distance, subset_size=COUNT))
    inception = extractor == "inception-v3-compat"
    weights = str(inception_file) if inception else None
    train, test = str(fashion / "train"), str(fashion / "test")

    file = tmp_path / "ours.json"
    options = ["--extractor", extractor, *(["--weights", weights] if weights else []), "--inception_splits", "1"]
    main(["fid", train, test, *options, "--batch_size", "100", "--json", str(file)])
    values = {record["metric"]: record["value"] for record in json.loads(file.read_text())}
    theirs = calculate_metrics(
        input1=train,
        input2=test,
        cuda=False,
        isc=inception,
        fid=True,
        kid=True,
        prc=True,
        isc_splits=1,
        kid_subsets=1,
        kid_subset_size=COUNT,
        feature_extractor=extractor,
        feature_extractor_weights_path=weights,
        batch_size=100,
        save_cpu_ram=True,
        verbose=False,
        cache=False,
    )
    names = {
        "frechet_inception_distance": next(name for name in values if name.startswith(("frechet", "fd_"))),
        "kernel_inception_distance_mean": next(name for name in values if name.startswith(("kernel", "kd_"))),
        "precision": "precision",
        "recall": "recall",
        **({"inception_score_mean": "inception_score"} if inception else {}),
    }
    for their, our in names.items():
        print(f"{extractor} {our}: {values[our]:.9g}, torch-fidelity {theirs[their]:.9g}")
    # It takes distances in float32, as differences of large products, and misplaces a few of 10,000 samples for it.
    for name in ("precision", "recall"):
        assert values[name] == pytest.approx(theirs[name], abs=1e-3)
    exact = {their: our for their, our in names.items() if our not in ("precision", "recall")}
    assert {our: values[our] for our in exact.values()} == pytest.approx(
        {our: theirs[their] for their, our in exact.items()},
        rel=1e-5,
        # These are halves of one distribution, and their kernel distance is nearly zero. With no more pictures than
        # features a covariance is singular, which costs torch-fidelity's root 1e-5.
        abs=1e-6 if COUNT > 2048 else 2e-5,
    )
