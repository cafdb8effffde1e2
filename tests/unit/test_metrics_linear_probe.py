"""The linear probe."""

import pytest
import torch
import torch.nn.functional as F

from flextok_pl.metrics.linear_probe import LinearProbe

NO_IMAGES = torch.zeros(0)


def _blobs(counts, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centres = 2 * torch.randn(len(counts), dim, generator=torch.Generator().manual_seed(9))
    scales = torch.tensor([10.0**i for i in range(dim)])  # as different as standardising has to bear
    return (centres[labels] + torch.randn(len(labels), dim, generator=generator)) * scales + 100, labels


def test_probe_learns_the_classes_of_new_samples():
    probe = LinearProbe.fit(*_blobs([60, 60, 60]), 3, "effnet-lite0")
    features, labels = _blobs([40, 40, 40], seed=1)
    p = probe.probabilities(NO_IMAGES, features)
    assert (probe.name, probe.num_classes) == ("probe_effnet_lite0", 3)
    assert p.shape == (120, 3) and p.dtype == torch.float32
    torch.testing.assert_close(p.sum(1), torch.ones(120))
    assert (p.argmax(1) == labels).float().mean() > 0.9


def test_probe_is_at_the_minimum():
    """The gradient vanishes: bias and weight meet the equations of penalised logistic regression."""
    features, labels = _blobs([50, 20, 5])
    probe = LinearProbe.fit(features, labels, 3, "x", l2=0.05)
    state = probe.state_dict()
    rows = features.double()
    inputs = (rows - rows.mean(0)) / rows.std(0, correction=0)
    residual = F.linear(inputs, state["weight"], state["bias"]).softmax(1) - F.one_hot(labels).double()
    weights = 1 / torch.bincount(labels).double()[labels]
    residual = residual * (weights / weights.sum())[:, None]
    torch.testing.assert_close(residual.sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(residual.T @ inputs, -0.05 * state["weight"], rtol=0, atol=1e-5)
    assert state["weight"].abs().max() > 0.1


def test_rare_classes_weigh_as_much_as_others():
    generator = torch.Generator().manual_seed(2)
    labels = (torch.arange(300) < 30).long()
    features = torch.randn(300, 2, generator=generator) + labels[:, None]
    probe = LinearProbe.fit(features, labels, 2, "x")
    assert 0.2 < (probe.probabilities(NO_IMAGES, features).argmax(1) == 1).float().mean() < 0.6


def test_unlabelled_samples_count_for_the_mean_only():
    features, labels = _blobs([30, 30])
    more = torch.cat([features, features.new_full((10, 5), 50.0)])
    probe = LinearProbe.fit(more, torch.cat([labels, torch.full((10,), -1)]), 2, "x")
    state = probe.state_dict()
    torch.testing.assert_close(state["mean"], more.double().mean(0))
    torch.testing.assert_close(state["class_means"][1], features[30:].double().mean(0) - state["mean"])


def test_nearest_class_is_by_angle_around_the_mean_of_all():
    features = torch.tensor([[10.0, 0.0], [12.0, 0.0], [0.0, 2.0], [0.0, 2.2], [-11.0, -2.1], [-11.0, -2.1]]) + 7
    probe = LinearProbe.fit(features, torch.tensor([0, 0, 1, 1, 2, 2]), 3, "x")
    centre = features.mean(0)
    asked = torch.tensor([[0.1, 0.0], [5.0, 90.0], [1.0, 2.0], [-1.0, -0.2]]) + centre
    assert probe.nearest_class(asked).tolist() == [0, 1, 1, 2]


def test_probe_is_kept_and_repeated_exactly(tmp_path):
    features, labels = _blobs([30, 40])
    features[:, 3] = 1.0  # a feature that never varies
    first, again = (LinearProbe.fit(features, labels, 2, "effnet-lite0") for _ in range(2))
    torch.save(first.state_dict(), tmp_path / "probe.pt")
    kept = LinearProbe(**torch.load(tmp_path / "probe.pt", weights_only=True))
    p = first.probabilities(NO_IMAGES, features)
    assert p.isfinite().all() and (kept.name, kept.num_classes) == (first.name, 2)
    for other in (again, kept):
        assert torch.equal(other.probabilities(NO_IMAGES, features), p)
        assert torch.equal(other.nearest_class(features), first.nearest_class(features))


def test_probe_refuses():
    features, labels = _blobs([5, 5])
    with pytest.raises(ValueError, match=r"classes \[2, 3\] of num_classes=4 have no samples"):
        LinearProbe.fit(features, labels, 4, "x")
    with pytest.raises(ValueError, match=r"0\.\.1, outside num_classes=1"):
        LinearProbe.fit(features, labels, 1, "x")
    with pytest.raises(ValueError, match="l2=0"):
        LinearProbe.fit(features, labels, 2, "x", l2=0)
