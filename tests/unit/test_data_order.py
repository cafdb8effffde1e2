"""Who reads what, as numbers: exactly once, equal shares, parts in proportion."""

from itertools import pairwise

import pytest
import torch

from flextok_pl.data.order import Mixture, Reader, Row, eval_positions, groups, train_span


def readers(world_size, num_workers):
    return [
        Reader(rank, world_size, worker, num_workers) for rank in range(world_size) for worker in range(num_workers)
    ]


@pytest.mark.parametrize("total", [1, 2, 7, 64, 101])
@pytest.mark.parametrize("world_size, num_workers", [(1, 1), (1, 3), (4, 1), (3, 5)])
@pytest.mark.parametrize("limit", [None, 1, 5, 1000])
def test_evaluation_sees_every_sample_once(total, world_size, num_workers, limit):
    seen = [i for reader in readers(world_size, num_workers) for i in eval_positions(total, limit, 4, reader)]
    assert seen == sorted(set(seen))
    assert len(seen) == min(total, limit or total)
    if limit == 5 and total == 101:
        assert seen == [0, 20, 40, 60, 80]


@pytest.mark.parametrize("total", [24, 25, 64, 101])
@pytest.mark.parametrize("world_size, num_workers", [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_training_shares_are_equal_and_disjoint(total, world_size, num_workers):
    spans = [train_span(total, 4, True, reader) for reader in readers(world_size, num_workers)]
    assert all((stop - start) % 4 == 0 for start, stop in spans)
    assert all(a[1] == b[0] for a, b in pairwise(spans))  # side by side
    assert spans[-1][1] == total // (4 * world_size) * 4 * world_size
    per_rank = {
        sum(b - a for a, b in spans[rank * num_workers : (rank + 1) * num_workers]) for rank in range(world_size)
    }
    assert len(per_rank) == 1


def test_keeping_the_last_batch_covers_all_and_wraps_around():
    spans = [train_span(10, 4, False, reader) for reader in readers(3, 1)]
    assert spans == [(0, 4), (4, 8), (8, 12)]  # 10 and 11 are the first two again


def test_worker_shares_follow_the_loader():
    # 5 batches over 2 workers: worker 0 has one more, so that taking turns gives batch i from worker i % 2.
    assert [train_span(20, 4, True, reader) for reader in readers(1, 2)] == [(0, 12), (12, 20)]


@pytest.mark.parametrize("start, stop, size", [(0, 0, 5), (3, 4, 5), (0, 99, 10), (7, 1007, 300)])
def test_groups_are_of_about_the_size(start, stop, size):
    found = list(groups(start, stop, size))
    assert found[0][0] == start and found[-1][1] == stop
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(size <= high - low < 2 * size for low, high in found) or len(found) == 1


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


def test_a_part_that_gets_nothing_is_an_error():
    with pytest.raises(ValueError, match="train_weights give"):
        Mixture.weighted([10, 10], [1.0, 1e-6], 100)
