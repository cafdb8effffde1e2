"""Metrics of generated images by budget: what is reported, its values, and that processes make no difference."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from flextok_pl.evaluation import statistics as of_module
from flextok_pl.evaluation.generation_statistics import GenerationStatistics
from flextok_pl.keys import key_hash
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.frechet import features_to_statistics, frechet_distance
from flextok_pl.metrics.inception_score import InceptionScore
from flextok_pl.metrics.kernel import kernel_distance
from flextok_pl.metrics.linear_probe import LinearProbe
from flextok_pl.metrics.manifold import manifold_scores

COUNT, BUDGETS = 24, (1, 8)
KEYS = [f"picture{i}" for i in range(COUNT)]
LABELS = torch.arange(COUNT) % 3


class Colours:
    """Features are the mean colours of the four quarters."""

    name, metric_name, kernel_metric_name = "colours", "fd_colours", "kd_colours"
    dim, weights_hash, resize = 12, "0", "none"
    device = torch.device("cpu")

    def __init__(self, with_logits=False):
        self.with_logits = with_logits

    def __call__(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)

    def class_logits(self, features):
        return features[:, :5] * 3 if self.with_logits else None

    def to(self, device):
        return self


class Redness:
    """Two classes, by the upper left quarter's red."""

    name, num_classes = "redness", 2

    def probabilities(self, images, features):
        return torch.stack([features[:, 0], 1 - features[:, 0]], 1)


class Lengths:
    """In place of a CLIP score: the length of the caption."""

    def __call__(self, images, captions):
        return torch.tensor([float(len(caption)) for caption in captions], dtype=torch.float64)


def pictures(seed, noise=40.0, labels=LABELS, side=8):
    """Each class has its colour, with noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.eye(3)[labels] * 90 + 80
    images = colours[..., None, None] + noise * torch.randn(len(labels), 3, side, side, generator=generator)
    return images.clamp(0, 255).to(torch.uint8)


REAL = pictures(0)
MADE = {1: pictures(1, noise=80), 8: pictures(2)}


def probe():
    return LinearProbe.fit(Colours()(REAL), LABELS, 3, "colours")


def measured(part=slice(None), batch_size=COUNT, extractor=None, **options):
    statistics = GenerationStatistics(BUDGETS, extractor or Colours(), **options)
    for batch in torch.arange(COUNT)[part].split(batch_size):
        keys = [KEYS[i] for i in batch]
        statistics.update_real(REAL[batch], keys)
        for budget, images in MADE.items():
            captions = ["x" * (1 + i) for i in batch.tolist()]
            statistics.update_generated(budget, images[batch], keys, LABELS[batch], captions)
    return statistics


def test_names_and_their_order():
    def names(**options):
        (first, *others) = (list(metrics) for metrics in measured(**options).values().values())
        assert all(other == first for other in others)
        return first

    distances, manifold = ["fd_colours", "kd_colours"], ["precision", "recall", "density", "coverage"]
    assert names() == [*distances, *manifold]
    assert names(extractor=Colours(with_logits=True)) == [*distances, "inception_score", *manifold]
    agreements = ["class_agreement", "class_mean_agreement"]
    assert names(classifier=probe()) == [*distances, "score_probe_colours", *manifold, *agreements]
    everything = {"extractor": Colours(with_logits=True), "classifier": probe(), "clip": Lengths()}
    assert names(**everything) == [*distances, "inception_score", *manifold, *agreements, "clip_score"]


def test_values_are_those_of_the_parts():
    values = measured(classifier=probe(), clip=Lengths()).values(kernel_seed=3)
    real, ids = Colours()(REAL), torch.tensor([key_hash(key) for key in KEYS])
    for budget, images in MADE.items():
        features = Colours()(images)
        p = probe().probabilities(images, features)
        score = InceptionScore(3)
        score.update(p, ids)
        expected = {
            "fd_colours": frechet_distance(features_to_statistics(real), features_to_statistics(features)),
            "kd_colours": kernel_distance(real[ids.argsort()], features[ids.argsort()], seed=3)[0],
            "score_probe_colours": score.compute()[0],
            **manifold_scores(real, features),
            "class_agreement": float((p.argmax(1) == LABELS).double().mean()),
            "class_mean_agreement": float((probe().nearest_class(features) == LABELS).double().mean()),
            "clip_score": (1 + COUNT) / 2,
        }
        assert values[budget] == pytest.approx(expected, rel=1e-9)
    assert values[1]["fd_colours"] > values[8]["fd_colours"] > 0


def test_agreement_is_with_the_class_that_was_asked_for():
    statistics = GenerationStatistics([4], Colours(), classifier=probe())
    statistics.update_generated(4, pictures(3, noise=0), KEYS, LABELS)
    assert statistics.values()[4]["class_agreement"] == statistics.values()[4]["class_mean_agreement"] == 1
    statistics.update_generated(4, pictures(4, noise=0), [f"more{key}" for key in KEYS], (LABELS + 1) % 3)
    assert statistics.values()[4]["class_agreement"] == statistics.values()[4]["class_mean_agreement"] == 0.5


def test_images_without_a_class_do_not_count_for_agreement():
    statistics = GenerationStatistics([4], Colours(), classifier=probe())
    asked = LABELS.where(torch.arange(COUNT) < 6, -1)
    asked[0] = 1  # one of six wrong
    statistics.update_generated(4, pictures(3, noise=0), KEYS, asked)
    assert statistics.values()[4]["class_agreement"] == pytest.approx(5 / 6)
    for labels in (None, torch.full((COUNT,), -1)):
        unasked = GenerationStatistics([4], Colours(), classifier=probe(), clip=Lengths())
        unasked.update_generated(4, pictures(3), KEYS, labels)
        assert list(unasked.values()[4]) == ["score_probe_colours"], "no real image, class or caption"


def test_other_classifiers_have_no_class_means():
    statistics = GenerationStatistics([4], Colours(), classifier=Redness())
    statistics.update_generated(4, pictures(3), KEYS, LABELS.clamp_max(1))
    assert list(statistics.values()[4]) == ["score_redness", "class_agreement"]
    with pytest.raises(ValueError, match="label 2 is not among the 2 classes"):
        statistics.update_generated(4, pictures(3), KEYS, LABELS)


@pytest.mark.parametrize(("count", "expected"), [(1, []), (3, ["fd_colours", "kd_colours"])])
def test_what_too_few_samples_leave_undefined(count, expected):
    assert list(measured(slice(count)).values()[8]) == expected


def test_batches_do_not_matter():
    whole, parts = (measured(batch_size=size, classifier=probe()) for size in (COUNT, 5))
    assert parts.num_images == whole.num_images == COUNT
    assert parts.data_hash == whole.data_hash != 0
    assert parts.image_size == whole.image_size == [8, 8]
    for budget in BUDGETS:
        assert parts.values()[budget] == pytest.approx(whole.values()[budget], rel=1e-9)


def test_real_features_of_an_earlier_run():
    before = measured()
    kept = FeatureSet.from_state_dict(before.real.state_dict())
    after = measured(real=kept)
    assert after.real.statistics.count == COUNT, "they are not added again"
    assert after.data_hash == before.data_hash
    assert after.values() == before.values()


def test_a_pool_holds_a_share():
    statistics = measured(pool_fraction=0.5)
    assert 3 < len(statistics.real.pool()) < COUNT
    assert statistics.real.statistics.count == statistics.num_images == COUNT
    assert statistics.values()[8]["fd_colours"] == measured().values()[8]["fd_colours"]
    assert statistics.values()[8]["kd_colours"] != measured().values()[8]["kd_colours"]


def test_sizes_are_not_mixed():
    with pytest.raises(ValueError, match=r"\[8, 8\] and \[16, 16\] pixels"):
        measured().update_generated(1, pictures(1, side=16), KEYS)


def test_measuring_does_not_wait_for_a_device():
    """A meta tensor has no values, so it cannot be looked at, and cannot be copied to the CPU."""
    extractor, judge = Colours(with_logits=True), probe().to("meta")
    extractor.device = torch.device("meta")
    statistics = GenerationStatistics([8], extractor, pool_fraction=0.5, classifier=judge)
    for _ in range(2):
        statistics.update_generated(8, MADE[8].to("meta"), KEYS, LABELS)
    assert statistics.num_images == 2 * COUNT
    with pytest.raises(RuntimeError, match="meta"):
        statistics.values()


def _process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(9) if rank == 0 else slice(9, None)
    options = {"extractor": Colours(with_logits=True), "classifier": probe(), "clip": Lengths(), "pool_fraction": 0.8}
    statistics = measured(part, batch_size=4, **options)
    empty = GenerationStatistics([2], Colours())
    if rank == 1:
        empty.update_real(REAL, KEYS)
        empty.update_generated(2, MADE[1], KEYS)
    for each in (statistics, empty):
        each.all_reduce()
    computed = []
    of_module.frechet_distance = lambda *sides: computed.append(sides) or frechet_distance(*sides)
    statistics.values()
    assert len(computed) == 1, "of two budgets"
    facts = (statistics.values(), statistics.num_images, statistics.data_hash, statistics.image_size)
    torch.save([facts, (empty.values(), empty.num_images, empty.image_size)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Also where one of them has seen nothing."""
    torch.multiprocessing.start_processes(_process, (str(tmp_path),), nprocs=2, start_method="fork")
    options = {"extractor": Colours(with_logits=True), "classifier": probe(), "clip": Lengths(), "pool_fraction": 0.8}
    alone = measured(**options)
    for rank in range(2):
        facts, (values, count, size) = torch.load(tmp_path / f"{rank}.pt")
        for budget, metrics in alone.values().items():
            assert facts[0][budget] == pytest.approx(metrics, rel=1e-9)
        assert facts[1:] == (COUNT, alone.data_hash, [8, 8])
        assert values[2] == pytest.approx(measured().values()[1], rel=1e-9)
        assert (count, size) == (COUNT, [8, 8])
