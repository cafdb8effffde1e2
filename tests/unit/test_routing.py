"""Patches on a route around middle blocks: what is drawn, and what is left alone.

`test_packing.py` compares losses and gradients with a reference. B images, N patches, n that take the blocks.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from flextok_pl.config import FlexTokConfig
from flextok_pl.layers.packing import Positions
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.routing import Route, Routing, build_routing, sample_route
from flextok_pl.models.tokenizer import FlexTok

CONFIG = replace(FlexTokConfig.preset("tiny"), vae=None, grid_size=(4, 4), decoder_depth=4, repa_layer=0)
ROUTING = Routing(0.5, 1, 2)


def latents(batch: int = 6) -> Tensor:
    return torch.randn(batch, 12, 8, 8, generator=torch.Generator().manual_seed(1))


def drawn(routing: Routing = ROUTING, batch: int = 6, seed: int = 0, rank: int = 0, ranks: int = 1) -> Tensor:
    """(B, n) places of the patches that take the blocks."""
    route = sample_route(routing, CONFIG, latents(batch), torch.Generator().manual_seed(seed), rank, ranks)
    assert route is not None
    rows = route.rows.view(batch, -1)
    assert torch.equal(rows // 16, torch.arange(batch)[:, None].expand_as(rows)), "of the image itself"
    return rows % 16


@pytest.mark.parametrize(("share", "kept"), [(0.5, 8), (0.7, 5), (0.99, 1), (0.01, 16)])
def test_each_image_keeps_as_many_patches(share: float, kept: int) -> None:
    found = drawn(Routing(share, 1, 2))
    assert found.shape == (6, kept) and bool((found.diff(dim=1) > 0).all()), "in their order, none twice"


def test_all_patches_are_as_likely() -> None:
    counts = torch.cat([drawn(batch=64, seed=seed) for seed in range(50)]).flatten().bincount(minlength=16)
    assert counts.sum() == 64 * 50 * 8 and (counts - 1600).abs().max() < 5 * (3200 * 0.25) ** 0.5


def test_draws_do_not_depend_on_the_number_of_processes() -> None:
    whole = drawn()
    for rank in range(2):
        assert torch.equal(drawn(batch=3, rank=rank, ranks=2), whole[rank::2])
    assert torch.equal(drawn(), whole) and not torch.equal(drawn(seed=1), whole)
    assert len({tuple(row.tolist()) for row in whole}) == 6, "each image's own"


def test_without_routing_nothing_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert build_routing(0.0, (1, 2), CONFIG, aligned=True) is None
    assert sample_route(None, CONFIG, latents(), generator) is None
    assert torch.equal(generator.get_state(), before)


def test_a_route_that_no_patch_takes_changes_nothing() -> None:
    torch.manual_seed(0)
    tokenizer, data = FlexTok(CONFIG), latents()
    draws = sample_draws(CONFIG, data, torch.Generator().manual_seed(0))
    route = sample_route(Routing(0.01, 1, 2), CONFIG, data, torch.Generator())
    found, plain = flow_loss(tokenizer, data, draws, route=route), flow_loss(tokenizer, data, draws)
    assert torch.equal(found.loss, plain.loss)


def test_leaving_and_joining() -> None:
    rows = torch.tensor([1, 2, 4, 7])  # of two images of four patches
    route = Route(Routing(0.5, 1, 2), rows)
    before = Positions(torch.arange(8.0).view(2, 4, 1), torch.tensor([[50.0]]))
    inside = route.leave(before)
    assert inside.patches is not None and inside.patches.flatten().tolist() == [1, 2, 4, 7]
    after = route.join(Positions(inside.patches * 10, inside.registers + 1), before)
    assert after.patches is not None and after.patches.flatten().tolist() == [0, 10, 20, 3, 40, 5, 6, 70]
    assert after.registers.tolist() == [[51.0]]
    assert [route.covers(i) for i in range(4)] == [False, True, True, False]


def test_decoding_and_validation_take_all_patches_through_all_blocks() -> None:
    """Blocks on the route see n patches in a training step only."""
    torch.manual_seed(0)
    tokenizer, data, seen = FlexTok(CONFIG), latents(2), []
    for block in tokenizer.decoder.blocks:
        block.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].patches.shape[1]))
    draws = sample_draws(CONFIG, data, torch.Generator().manual_seed(0))
    flow_loss(tokenizer, data, draws, route=sample_route(ROUTING, CONFIG, data, torch.Generator()))
    flow_loss(tokenizer, data, draws)
    assert seen == [16, 8, 8, 16, 16, 16, 16, 16]


def test_a_bound_on_compilations() -> None:
    """A route adds no graph to those that batches of any budgets take."""
    torch.compiler.reset()
    counter, frames = CompileCounter(), []
    torch.manual_seed(0)
    tokenizer, data = FlexTok(CONFIG), latents()
    for block in tokenizer.decoder.blocks:
        block.compile(backend=counter, dynamic=True, fullgraph=True)
    for routing in (None, ROUTING):
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            draws = sample_draws(CONFIG, data, generator)
            route = sample_route(routing, CONFIG, data, generator)
            flow_loss(tokenizer, data, draws, route=route).loss.mean().backward()
        frames.append(counter.frame_count)
    assert frames[1] == frames[0] <= 3
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("share", "blocks", "aligned", "message"),
    [
        (1.0, (1, 2), False, r"route_share=1\.0.*\[0, 1\)"),
        (-0.1, (1, 2), False, r"route_share=-0\.1"),
        (0.5, None, False, r"route_blocks=None.*0\.\.2 for decoder_depth=4"),
        (0.5, (1, 3), False, r"route_blocks=\(1, 3\).*the last block"),
        (0.5, (2, 1), False, r"route_blocks=\(2, 1\)"),
        (0.5, (-1, 1), False, r"route_blocks=\(-1, 1\)"),
        (0.5, (0, 2), True, r"route_blocks=\(0, 2\) has net\.repa_layer=0"),
    ],
)
def test_wrong_options(share: float, blocks: tuple[int, int] | None, aligned: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_routing(share, blocks, CONFIG, aligned)


def test_routes_beside_an_alignment() -> None:
    assert build_routing(0.5, (1, 2), CONFIG, aligned=True) == ROUTING
    assert build_routing(0.5, (0, 2), CONFIG, aligned=False) == Routing(0.5, 0, 2)
