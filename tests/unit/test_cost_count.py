"""The counter against closed forms of one layer."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flextok_pl.config import VAEConfig
from flextok_pl.cost.count import Activations, Count, Flops, Model, Numerics, count_activations, count_flops
from flextok_pl.cost.models import vae_cost
from flextok_pl.models.vae import VAE

ROWS, WIDTH = 5, 12
PRODUCT = 2 * ROWS * WIDTH**2


class SquaredBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).square())


def layers(depth: int, checkpointing: bool) -> Model:
    """A projection, and blocks of two linear maps with a square between them."""
    first = nn.Linear(WIDTH, WIDTH)
    blocks = nn.ModuleList(SquaredBetween() for _ in range(depth))

    def step(batch: int) -> torch.Tensor:
        x = first(first.weight.new_empty(batch, ROWS, WIDTH))
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return x.sum()

    return Model(step, blocks)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_operations_of_linear_maps(depth: int) -> None:
    forward = (1 + 2 * depth) * PRODUCT
    backward = 2 * forward - PRODUCT  # the input has no gradient
    assert count_flops(layers, depth) == Flops(forward, backward)
    # The last product of a block is not repeated: its input is there again before it.
    assert count_flops(layers, depth, checkpointing=True) == Flops(forward, backward, depth * PRODUCT)


@pytest.mark.parametrize("half", [False, True])
def test_bytes_of_linear_maps(half: bool) -> None:
    number = 2 if half else 4
    values = ROWS * WIDTH * number
    found = count_activations(layers, 4, Numerics(number))
    # Each block keeps its input, what it squares, and the square; or with checkpointing its input alone.
    assert found.largest_block == 3 * values and found.kept - found.inputs == 4 * 2 * values


def test_what_runs_is_counted_on_any_device() -> None:
    x, weight = torch.zeros(ROWS, WIDTH), torch.zeros(WIDTH, WIDTH, requires_grad=True)
    with Count() as count:
        product = x @ weight
        total = (product + 1).sum()
        assert count.alive == product.nbytes + total.nbytes and count.peak == 2 * product.nbytes + total.nbytes
        assert (count.operations, count.backward) == (PRODUCT, PRODUCT)
        total.backward()
    assert count.operations == 2 * PRODUCT


def test_one_block_at_a_time_is_computed_again() -> None:
    assert Activations(3, 2, 1) * 4 + Activations(1, 1, 6) == Activations(13, 9, 6)


def test_an_autoencoder_costs_what_its_step_does() -> None:
    config = VAEConfig(
        latent_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    model, images = VAE(config), torch.randn(1, 3, 32, 32)
    with Count() as seen:
        loss = nn.functional.l1_loss(model(images)[1], images)
        forward, peak = seen.operations, seen.peak
        loss.backward()
    with torch.device("meta"):
        flops, kept = vae_cost(VAE(config), None, (32, 32))
    assert kept == pytest.approx(peak, rel=0.15)
    assert flops == Flops(forward, seen.operations - forward)


AFTERWARDS = """
import multiprocessing, sys, torch
from flextok_pl.config import FlexTokConfig
from flextok_pl.cost.count import Numerics
from flextok_pl.cost.models import tokenizer_activations

def train():
    torch.ones(2, requires_grad=True).sum().backward()

tokenizer_activations(FlexTokConfig.preset("tiny"), Numerics(), 1)
train()
process = multiprocessing.get_context("fork").Process(target=train)
process.start()
process.join()
sys.exit(process.exitcode)
"""


def test_a_process_of_one_that_has_counted_can_train() -> None:
    done = subprocess.run([sys.executable, "-c", AFTERWARDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
