"""The picture of the search tree."""

import torch
from torch import Tensor

from flextok_pl.search.pictures import CHOSEN, LINE, MOST_COLUMNS, TreeRow, search_tree


def row(k: int, colours: list[int], parents: list[int]) -> TreeRow:
    images = torch.tensor(colours, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    return TreeRow(k, images, [0.1 * i for i in range(len(colours))], parents)


def pixels(picture: Tensor, colour: tuple[int, ...]) -> int:
    return int((picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).sum())


def test_a_tile_for_each_kept_candidate_and_a_frame_around_the_chosen() -> None:
    rows = [row(1, [11, 22], [0, 0]), row(2, [33, 44, 55], [1, 0, 1]), row(8, [66], [1])]
    tree = search_tree(rows)
    assert tree.dtype == torch.uint8
    for colour in (11, 22, 33, 44, 55, 66):
        assert pixels(tree, (colour,) * 3) >= 32 * 32
    places = {c: tuple((tree[0] == c).nonzero()[0].tolist()) for c in (11, 44, 66)}
    # 66 comes from 44, and that from 11: a frame stands around these three, not around 22 or 33.
    for top, left in places.values():
        assert tuple(tree[:, top - 1, left + 5].tolist()) == CHOSEN
    for colour in (22, 33):
        top, left = (tree[0] == colour).nonzero()[0].tolist()
        assert tuple(tree[:, top - 1, left + 5].tolist()) != CHOSEN
    assert pixels(tree, LINE) > 0, "33 and 55 have lines, too"
    grey = [each._replace(images=each.images[:, :1]) for each in rows]
    assert torch.equal(search_tree(grey), tree)


def test_more_candidates_than_columns() -> None:
    count = MOST_COLUMNS + 3
    tree = search_tree([row(4, [100 + i for i in range(count)], [0] * count)])
    shown = [i for i in range(count) if pixels(tree, (100 + i,) * 3) >= 32 * 32]
    assert shown == list(range(MOST_COLUMNS))
