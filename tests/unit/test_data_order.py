"""Who reads what, as numbers: exactly once, equal shares, parts in proportion."""

import pytest
import torch

from flextok_pl.data.order import Lanes, Mixture, Row, eval_samples, rank_share, train_steps


@pytest.mark.parametrize("total", [1, 2, 7, 64, 101])
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("limit", [None, 1, 5, 1000])
def test_evaluation_sees_every_sample_once(total, world_size, limit):
    seen = [i for rank in range(world_size) for i in rank_share(eval_samples(total, limit), rank, world_size)]
    assert seen == sorted(set(seen))
    assert len(seen) == min(total, limit or total)
    if limit == 5 and total == 101:
        assert seen == [0, 20, 40, 60, 80]


def test_training_steps():
    assert list(train_steps(25, 4, 2, drop_last=True)) == [0, 8, 16]
    assert list(train_steps(25, 4, 2, drop_last=True, first=5)) == [5, 13]
    kept = train_steps(25, 4, 2, drop_last=False)
    assert list(kept) == [0, 8, 16, 24] and kept.stop == 26  # sample 25 is the first one again
    assert not train_steps(25, 4, 2, drop_last=True, first=24)


@pytest.mark.parametrize("total", [1, 7, 100, 101])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lanes_and_groups_hold_every_sample_once(total, number, size):
    lanes = Lanes(total, number, size)
    seen = []
    for position in range(total):
        (lane, group), place = lanes.place(position)
        assert lane == position % number
        low, high = lanes.span(lane, group)
        assert 0 <= place < high - low
        assert size <= high - low < 2 * size or group == 0  # a lane may be shorter than a group
        seen.append(low + place)
    assert sorted(seen) == list(range(total))
    assert seen[::number] == sorted(seen[::number]), "a lane is gone through from its beginning to its end"
    assert lanes.span(0, 10**6) == (0, 0)


def test_spans_of_a_row():
    row = Row([2, 0, 1, 3], [4, 0, 3, 5])
    assert list(row.spans(0, 12)) == [(2, 0, 3), (0, 0, 4), (3, 0, 5)]
    assert list(row.spans(2, 8)) == [(2, 2, 3), (0, 0, 4), (3, 0, 1)]
    assert list(row.spans(7, 7)) == []


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (0.5, 0.2, 0.3), (100.0, 1.0, 1.0, 7.0)])
def test_every_stretch_of_a_mixed_row_has_the_shares(weights):
    mixture = Mixture.weighted([10] * len(weights), weights, 1000)
    assert sum(mixture.takes) == 1000
    cuts = torch.stack(mixture.cut(torch.arange(1001)))  # (parts, positions)
    assert cuts[:, -1].tolist() == list(mixture.takes)
    assert [mixture.cut(position) for position in (0, 17, 1000)] == cuts[:, [0, 17, 1000]].T.tolist()
    steps = cuts.diff(dim=1)
    assert (steps >= 0).all() and (steps.sum(dim=0) == 1).all()  # one sample of one part at every place
    exact = torch.arange(1001) * torch.tensor(mixture.takes)[:, None] / 1000
    assert (cuts - exact).abs().max() < len(weights)


def test_epochs_of_a_mixture_go_on_where_the_last_one_ended():
    mixture = Mixture.weighted([7, 3], [1.0, 1.0], 10)
    taken = [[], []]
    for epoch in range(3):
        for part, number, begin, end in mixture.pieces(epoch, 0, 10):
            taken[part] += [(number, sample) for sample in range(begin, end)]
    assert taken == [[divmod(i, 7) for i in range(15)], [divmod(i, 3) for i in range(15)]]


def test_kinds_of_samples_share_what_a_mixture_takes():
    mixture = Mixture.weighted([10, 6], [1.0, 2.0], 16)  # takes 5 and 11
    kinds = mixture.split([[4, 0], [6, 1], [0, 5]])
    assert [kind.takes for kind in kinds] == [(2, 0), (3, 1), (0, 10)]
    assert sum(kind.length for kind in kinds) == 16
    assert [[*kind.pieces(0, 0, kind.length)] for kind in kinds[::2]] == [[(0, 0, 0, 2)], [(1, 0, 0, 5), (1, 1, 0, 5)]]


def test_a_part_that_gets_nothing_is_an_error():
    with pytest.raises(ValueError, match="train_weights give"):
        Mixture.weighted([10, 10], [1.0, 1e-6], 100)
