"""Masks and embeddings against plain dense references. B batch, H heads, N patches, K registers."""

import math

import pytest
import torch

from flextok_pl.layers.attention import aligned_registers, attention, registers_last_mask
from flextok_pl.layers.blocks import AdaLNBlock, Block, SwiGLU
from flextok_pl.layers.embeddings import TimeEmbedding, grid_positions, patchify, sincos_position_table, unpatchify
from flextok_pl.layers.norm import layer_norm


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: torch.Tensor) -> torch.Tensor:
    logits = (q.double() @ k.double().transpose(-1, -2) * scale).masked_fill(~visible, -math.inf)
    return (logits.softmax(-1) @ v.double()).float()


def qkv(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, length, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize(("patches", "registers"), [(5, 4), (1, 1), (4, 1), (1, 6)])
@pytest.mark.parametrize("causal", [True, False])
def test_registers_last(patches: int, registers: int, causal: bool) -> None:
    q, k, v = qkv(patches + registers)
    visible = torch.zeros(patches + registers, patches + registers, dtype=torch.bool)
    visible[:, :patches] = True
    for i in range(registers):
        visible[patches + i, patches : patches + (i + 1 if causal else registers)] = True
    reference = dense(q, k, v, 0.3, visible)
    mask = registers_last_mask(patches, registers, causal, q.device)
    torch.testing.assert_close(attention(q, k, v, 0.3, mask), reference)
    only_registers = attention(q[:, :, patches:], k, v, 0.3, mask[patches:])
    torch.testing.assert_close(only_registers, reference[:, :, patches:])


def test_gpus_compute_whole_vectors_of_positions() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    lengths = [aligned_registers(256, needed, 256, gpu) for needed in (1, 8, 9, 250, 256)]
    assert lengths == [8, 8, 16, 256, 256]
    assert aligned_registers(60, 1, 64, gpu) == 4 and aligned_registers(60, 62, 64, gpu) == 64
    assert [aligned_registers(256, needed, 256, cpu) for needed in (1, 8, 9)] == [1, 8, 9]


def test_key_bias_of_log_n_counts_n_times() -> None:
    q, k, v = qkv(6)
    repeated = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5])
    everything = torch.ones(6, 9, dtype=torch.bool)
    reference = dense(q, k[:, :, repeated], v[:, :, repeated], 0.5, everything)
    bias = torch.tensor([0.0, 0, 0, 0, 0, math.log(4)]).expand(2, -1)
    torch.testing.assert_close(attention(q, k, v, 0.5, bias), reference)


def test_blocks_compute_only_the_rows_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x, time = torch.randn(2, 7, 16, generator=generator), torch.randn(2, 16, generator=generator)
    plain, conditioned = Block(16, 8, 4.0), AdaLNBlock(16, 8, 4.0)
    torch.testing.assert_close(plain(x, None, x[:, 3:]), plain(x)[:, 3:])
    whole = conditioned(x, time, 3)
    torch.testing.assert_close(conditioned(x, time, 3, None, x[:, :3]), whole[:, :3])
    torch.testing.assert_close(conditioned(x, time, 3, None, x[:, :5]), whole[:, :5])


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
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([layer_norm(x[:, :3]) * 2 + 0.5, layer_norm(x[:, 3:]) * 3 - 0.5], dim=1)
    torch.testing.assert_close(block(x, torch.zeros(1, 16), 3), x + block.mlp(expected))


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
