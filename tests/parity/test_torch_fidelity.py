"""Extractors and metrics against torch-fidelity, with a randomly initialised Inception weights file.

Tolerance: 1e-5 relative, torch-fidelity's own statistics being partly float32; 1e-10 for the inception score, which it
takes in float64; 1e-6 for precision and recall, whose counts are the same and whose mean it takes in float32.
"""

import numpy as np
import pytest
import torch
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_poly, kid_features_to_metric, mmd2
from torch_fidelity.metric_prc import prc_features_to_metric

from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.metrics.frechet import features_to_statistics, frechet_distance
from flextok_pl.metrics.inception_score import InceptionScore
from flextok_pl.metrics.kernel import draw_subsets, kernel_distance
from flextok_pl.metrics.manifold import manifold_scores


def _images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(20, 24), mode="bilinear").to(torch.uint8)


def test_inception_features_and_distances(inception_file):
    ours = build_extractor("inception-v3-compat", inception_file)
    assert (ours.metric_name, ours.kernel_metric_name) == ("frechet_inception_distance", "kernel_inception_distance")
    assert ours.dim == 2048
    assert len(ours.weights_hash) == 16
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    features = []
    for seed in (0, 1):
        images = _images(2, seed)
        with torch.no_grad():
            expected, logits = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.class_logits(ours(images)), logits, rtol=1e-5, atol=1e-5)
        features.append(expected[:, ::16])  # a Frechet distance of 2048 features takes half a minute here
    a, b = (features_to_statistics(each) for each in features)
    theirs_a, theirs_b = (fid_features_to_statistics(each.double()) for each in features)
    expected = fid_statistics_to_metric(theirs_a, theirs_b, False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("count", "dim"), [(400, 64), (60, 128)], ids=["full rank", "rank deficient"])
def test_frechet_distance(count, dim):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(count, dim, generator=generator).abs() * (1 + 0.2 * i) for i in range(2))
    expected = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    ours = frechet_distance(features_to_statistics(a), features_to_statistics(b))
    assert ours == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)


def test_kernel_distance_on_all_samples():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(80, 32, generator=generator) + 0.3 * i for i in range(2))
    options = {**DEFAULTS, "kid_subsets": 1, "kid_subset_size": 80, "verbose": False}
    expected = kid_features_to_metric(a, b, **options)["kernel_inception_distance_mean"]
    assert kernel_distance(a, b)[0] == pytest.approx(expected, rel=1e-5)


def test_kernel_distance_on_the_same_subsets():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(90 + 20 * i, 32, generator=generator) + 0.3 * i for i in range(2))
    values = []
    for i, j in draw_subsets(90, 110, subsets=7, size=40, seed=11):
        x, y = a[i].numpy(), b[j].numpy()
        kernels = [kernel_poly(p, q, **DEFAULTS) for p, q in ((x, x), (x, y), (y, y))]
        values.append(mmd2(*kernels))
    mean, std = kernel_distance(a, b, subsets=7, subset_size=40, seed=11)
    assert mean == pytest.approx(np.mean(values), rel=1e-5)
    assert std == pytest.approx(np.std(values), rel=1e-4)


def test_kernel_distance_of_pairs():
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(50, 32, generator=generator)
    b = a + 0.3 * torch.randn(50, 32, generator=generator)
    kernels = [kernel_poly(p.numpy(), q.numpy(), **DEFAULTS) for p, q in ((a, a), (a, b), (b, b))]
    expected = mmd2(*kernels, mmd_est="u-statistic")
    assert kernel_distance(a, b, paired=True)[0] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("in_parts", [False, True])
def test_precision_and_recall(k, in_parts):
    generator = torch.Generator().manual_seed(5)
    real = torch.randn(150, 6, generator=generator)
    generated = 0.7 * torch.randn(110, 6, generator=generator) + 0.5
    options = {**DEFAULTS, "prc_neighborhood": k, "prc_batch_size": 40, "save_cpu_ram": in_parts, "verbose": False}
    expected = prc_features_to_metric(generated.double(), real.double(), **options)
    assert 0 < expected["recall"] < expected["precision"] < 1
    scores = manifold_scores(real, generated, k)
    assert scores["precision"] == pytest.approx(expected["precision"], rel=0, abs=1e-6)
    assert scores["recall"] == pytest.approx(expected["recall"], rel=0, abs=1e-6)


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score(splits):
    """Theirs splits by position: 20 samples whose ids leave the rest 0 come first, then those with 1, and so on."""
    logits = 3 * torch.randn(20 * splits, 30, generator=torch.Generator().manual_seed(6))
    expected = isc_features_to_metric(logits, splits, shuffle=False)
    score = InceptionScore(30, splits)
    ids = torch.arange(20 * splits) * splits + torch.arange(splits).repeat_interleave(20)
    score.update(logits.double().softmax(1), ids)
    mean, std = score.compute()
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-10) and mean > 2
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-8, abs=1e-12)
