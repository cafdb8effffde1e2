"""iREPA's projection and its normalisation of a teacher's features. B batch, N = H x W patches, D and F widths."""

import pytest
import torch
from torch import Tensor, nn

from flextok_pl.models.irepa import ConvProjection, build_projection, spatially_normalized
from flextok_pl.models.teacher import ProjectionHead, alignment_loss

GRID = (3, 5)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_convolution_is_that_of_the_map_of_patches() -> None:
    torch.manual_seed(0)
    head, maps = ConvProjection(8, 6), drawn(2, 8, *GRID)
    found = head(maps.flatten(2).transpose(1, 2), GRID)  # (B, N, F)
    expected = nn.functional.conv2d(maps, head.weight, head.bias, padding=1)
    torch.testing.assert_close(found.transpose(1, 2).unflatten(2, GRID), expected)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_what_a_projection_sees_of_its_neighbours(kind: str) -> None:
    """The MLP nothing; the convolution the eight around it, by rows and columns rather than by their order."""
    torch.manual_seed(0)
    head, patches = build_projection(kind, 8, 6), drawn(1, 15, 8)  # type: ignore[arg-type]
    changed = patches.clone()
    changed[0, 7] += 1.0  # row 1, column 2 of 3 x 5
    moved = (head(patches, GRID) != head(changed, GRID)).any(dim=-1)[0].nonzero().flatten().tolist()
    assert moved == ([7] if kind == "mlp" else [1, 2, 3, 6, 7, 8, 11, 12, 13])


def test_the_mlp_is_reached_as_before() -> None:
    torch.manual_seed(0)
    head, patches = ProjectionHead(8, 6, hidden=16), drawn(2, 15, 8)
    assert torch.equal(head(patches, GRID), nn.Sequential.forward(head, patches))


def test_normalised_features() -> None:
    features = drawn(2, 4, *GRID) * torch.tensor([1.0, 5.0, 0.1, 20.0])[:, None, None] + 3.0
    found = spatially_normalized(features, 1.0)
    torch.testing.assert_close(found.mean(dim=(2, 3)), torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std(dim=(2, 3), correction=0), torch.ones(2, 4), rtol=1e-4, atol=0)
    part = spatially_normalized(features, 0.6)
    left = 0.4 * features.mean(dim=(2, 3)) / features.std(dim=(2, 3), correction=0)
    torch.testing.assert_close(part.mean(dim=(2, 3)), left, rtol=1e-4, atol=1e-4)


def test_the_published_formula_gives_the_same_loss() -> None:
    """It works on (B, N, F) and divides by the standard deviation of a sample."""
    features, projected = drawn(2, 4, *GRID) * 3.0 + 1.0, drawn(2, 15, 4).flip(0)
    patches = features.flatten(2).transpose(1, 2)
    published = patches - 0.6 * patches.mean(dim=1, keepdim=True)
    published = published / (published.std(dim=1, keepdim=True) + 1e-6)
    expected = -nn.functional.cosine_similarity(projected, published, dim=-1).mean()
    torch.testing.assert_close(alignment_loss(projected, spatially_normalized(features, 0.6)), expected)


def test_features_in_half_precision_and_of_one_patch() -> None:
    assert spatially_normalized(drawn(2, 4, *GRID).half(), 0.6).dtype == torch.float32
    assert spatially_normalized(drawn(2, 4, 1, 1), 0.6).isfinite().all()


def test_an_unknown_projection() -> None:
    with pytest.raises(ValueError, match="repa_projection='linear'.*'mlp' or 'conv'"):
        build_projection("linear", 8, 6)  # type: ignore[arg-type]
