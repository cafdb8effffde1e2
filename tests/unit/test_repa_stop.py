"""REPA that is stopped after a share of the training; see `test_tokenizer_module.py` for trainings with it."""

import pytest
import torch

from flextok_pl.models.irepa import build_projection
from flextok_pl.modules.repa_stop import aligned_steps, check_share, without_alignment


@pytest.mark.parametrize(
    ("share", "steps", "aligned"),
    [
        (1.0, 10, float("inf")),
        (0.5, 10, 5),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.001, 100, 1),
    ],
)
def test_number_of_steps(share: float, steps: int, aligned: float) -> None:
    assert aligned_steps(share, steps) == aligned


@pytest.mark.parametrize("total", [float("inf"), -1])
def test_trainings_without_end(total: float) -> None:
    assert aligned_steps(1.0, total) == float("inf")
    with pytest.raises(ValueError, match=r"repa_until=0\.5.*no end: set trainer\.max_steps"):
        aligned_steps(0.5, total)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_wrong_shares(share: float) -> None:
    with pytest.raises(ValueError, match=f"repa_until={share}.*model.teacher to null"):
        check_share(share)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_weights_get_a_gradient_of_zero_and_features_none(kind: str) -> None:
    projection = build_projection(kind, 8, 6)  # type: ignore[arg-type]
    features = torch.full((2, 16, 8), 1e30, requires_grad=True)
    loss = torch.tensor(0.3, requires_grad=True)
    (loss + without_alignment(projection, features)).backward()
    assert features.grad is None and loss.grad == 1
    gradients = [weight.grad for weight in projection.parameters()]
    assert gradients and all(each is not None and not each.any() for each in gradients)
