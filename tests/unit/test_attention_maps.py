"""Shares of attention, against weights that torch computes itself."""

import pytest
import torch
import torch.nn.functional as F

from flextok_pl import FlexTok, FlexTokConfig
from flextok_pl.models.attention_maps import register_attention


@pytest.fixture(scope="module")
def tok():
    torch.manual_seed(0)
    tok = FlexTok(FlexTokConfig.preset("tiny")).eval()
    for parameter in tok.decoder.parameters():  # adaLN-zero would leave every block the same
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return tok


def test_shares_of_the_first_block(tok, monkeypatch):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shares = register_attention(tok, images, (0.9, 0.1), torch.Generator().manual_seed(2))
    assert shares.shape == (2, len(tok.decoder.blocks), 16)
    assert (shares > 0).all() and (shares.sum(-1) < 1).all()
    assert not torch.allclose(shares[0], shares[1]), "they depend on the time"

    # With values that name their position, the output of attention is the attention.
    seen, plain = [], F.scaled_dot_product_attention

    def named(q, k, v, attn_mask=None, scale=None, **_):
        names = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen.append(plain(q, k, names, attn_mask=attn_mask, scale=scale))
        return plain(q, k, v, attn_mask=attn_mask, scale=scale)

    latents = tok.encode_latents(images)
    codes = tok.quantizer(tok.encode(latents))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", named)
        tok.velocity(0.9 * noise + 0.1 * latents, 0.9, codes)
    num_patches = seen[0].shape[-1] - 16
    expected = torch.stack([each[:, :, :num_patches, num_patches:].mean((0, 1, 2)) for each in seen])
    torch.testing.assert_close(shares[0], expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_left_behind(tok):
    images = torch.zeros(1, 3, 32, 32)
    register_attention(tok, images, (0.5,))
    assert not any(block.attn._forward_hooks for block in tok.decoder.blocks)
    with pytest.raises(ValueError, match=r"times=\[1.5\]"):
        register_attention(tok, images, (1.5,))
