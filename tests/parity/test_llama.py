"""The prior's block against transformers' Llama and Qwen3 layers, with the same weights and no rotation.

Llama's block has rotary positions; with cos = 1 and sin = 0 they vanish, and the maths coincide: RMSNorm, causal
attention, SwiGLU. Qwen3's is the same with RMSNorm on the queries and keys of each head.
"""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from flextok_pl.config import PriorConfig
from flextok_pl.layers.causal import CausalBlock, CrossAttention, KeyValueCache

WIDTH, HEAD_DIM, LENGTH = 64, 16, 11
CONFIG = PriorConfig(width=WIDTH, head_dim=HEAD_DIM)
HIDDEN = int(2 * 4 * WIDTH / 3)
OPTIONS = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": WIDTH // HEAD_DIM,
    "num_key_value_heads": WIDTH // HEAD_DIM,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": CONFIG.norm_eps,
    "attn_implementation": "eager",
}


def pair(qk_norm: bool) -> tuple[CausalBlock, torch.nn.Module]:
    torch.manual_seed(0)
    ours = CausalBlock(replace(CONFIG, qk_norm=qk_norm))
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    theirs = Qwen3DecoderLayer(Qwen3Config(**OPTIONS), 0) if qk_norm else LlamaDecoderLayer(LlamaConfig(**OPTIONS), 0)
    q, k, v = ours.attn.wqkv.weight.chunk(3)
    weights = {
        "self_attn.q_proj.weight": q,
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": ours.attn.proj.weight,
        "mlp.gate_proj.weight": ours.mlp.fc1.weight,
        "mlp.up_proj.weight": ours.mlp.fc3.weight,
        "mlp.down_proj.weight": ours.mlp.fc2.weight,
        "input_layernorm.weight": ours.attn_norm.weight,
        "post_attention_layernorm.weight": ours.mlp_norm.weight,
    }
    if qk_norm:
        weights |= {
            "self_attn.q_norm.weight": ours.attn.q_norm.weight,
            "self_attn.k_norm.weight": ours.attn.k_norm.weight,
        }
    theirs.load_state_dict(weights)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block(qk_norm: bool) -> None:
    ours, theirs = pair(qk_norm)
    x = torch.randn(2, LENGTH, WIDTH)
    still = (torch.ones(2, LENGTH, HEAD_DIM), torch.zeros(2, LENGTH, HEAD_DIM))
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1).expand(2, 1, -1, -1)
    with torch.no_grad():
        expected = theirs(x, attention_mask=mask, position_embeddings=still)
        expected = expected if isinstance(expected, torch.Tensor) else expected[0]
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_with_a_cache(qk_norm: bool) -> None:
    ours, _ = pair(qk_norm)
    x = torch.randn(2, LENGTH, WIDTH)
    cache = KeyValueCache(LENGTH)
    with torch.no_grad():
        steps = [ours(x[:, :4], cache=cache)] + [ours(x[:, i : i + 1], cache=cache) for i in range(4, LENGTH)]
        torch.testing.assert_close(torch.cat(steps, 1), ours(x), rtol=0, atol=1e-5)


def test_cross_attention() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(CONFIG)
    theirs = torch.nn.MultiheadAttention(WIDTH, WIDTH // HEAD_DIM, bias=False, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.wq.weight, ours.wkv.weight])
    theirs.out_proj.weight.data = ours.proj.weight
    x, text, mask = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH), torch.arange(7) < torch.tensor([[3], [7]])
    with torch.no_grad():
        expected, _ = theirs(x, text, text, key_padding_mask=~mask)
        torch.testing.assert_close(ours(x, ours.memory(text, mask)), expected, rtol=0, atol=1e-6)
