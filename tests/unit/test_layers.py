"""Blocks and embeddings against plain references. Attention and packing have a file of their own, `test_packing.py`."""

import math

import pytest
import torch

from flextok_pl.layers.blocks import AdaLNBlock, SwiGLU
from flextok_pl.layers.embeddings import TimeEmbedding, grid_positions, patchify, sincos_position_table, unpatchify
from flextok_pl.layers.norm import layer_norm
from flextok_pl.layers.packing import Positions, pack, places


def test_modulation_is_separate_and_normalised() -> None:
    """With the attention gate at 0 and the MLP gate at 1, a block adds the MLP of the modulated normalised input."""
    block = AdaLNBlock(16, 8, 4.0)
    linear = block.adaLN_modulation[1]
    torch.nn.init.zeros_(linear.weight)
    parts = torch.zeros(2, 6, 16)
    parts[:, 1] = 1.0  # gate_mlp
    parts[0, 4], parts[1, 4] = 0.5, -0.5  # shift_mlp of patches, of registers
    parts[0, 5], parts[1, 5] = 1.0, 2.0  # scale_mlp
    linear.bias.data.copy_(parts.flatten())
    generator = torch.Generator().manual_seed(0)
    patches, registers = torch.randn(1, 3, 16, generator=generator), torch.randn(2, 16, generator=generator)
    packing = pack(*places(torch.tensor([2])), 1, 3, 2, "all", torch.device("cpu"))
    found = block(Positions(patches, registers), torch.zeros(1, 16), packing)
    torch.testing.assert_close(found.patches, patches + block.mlp(layer_norm(patches) * 2 + 0.5))
    torch.testing.assert_close(found.registers, registers + block.mlp(layer_norm(registers) * 3 - 0.5))


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1152, 3072), (1792, 4778), (128, 341), (160, 426)])
def test_swiglu_width(width: int, hidden: int) -> None:
    with torch.device("meta"):
        assert SwiGLU(width, 4.0).fc1.out_features == hidden


def test_patches_keep_row_column_channel_order() -> None:
    latents = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    patches = patchify(latents, 2)
    assert patches.shape == (2, 2, 3, 12)
    assert patches[1, 1, 2].tolist() == [
        latents[1, c, 2 + r, 4 + s].item() for r in (0, 1) for s in (0, 1) for c in range(3)
    ]
    assert torch.equal(unpatchify(patches, 2), latents)


@pytest.mark.parametrize("base", [10000.0, 10.0])
def test_position_table_has_rows_first(base: float) -> None:
    table = sincos_position_table(8, (3, 5), base)
    assert table.shape == (1, 8, 3, 5)
    row, column, omega = 2, 4, (1.0, base**-0.5)
    expected = [f(n * w) for n in (row, column) for f in (math.sin, math.cos) for w in omega]
    assert table[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(grid_positions(table, 2, 3)[0, 1, 2], table[0, :, 1, 2])
    with pytest.raises(ValueError, match="grid_size"):
        grid_positions(table, 4, 3)


@pytest.mark.parametrize("max_timestep", [1.0, 1000.0])
def test_time_frequencies(max_timestep: float) -> None:
    embedding = TimeEmbedding(8, 256, max_timestep)
    values = embedding.frequencies(torch.tensor([max_timestep / 2]))[0]
    angle = 500.0 * math.exp(-math.log(256) * 17 / 128)
    assert values[17].item() == pytest.approx(math.cos(angle), abs=1e-4)
    assert values[128 + 17].item() == pytest.approx(math.sin(angle), abs=1e-4)
