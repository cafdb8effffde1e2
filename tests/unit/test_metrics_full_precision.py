"""Networks that measure compute in float32, and leave the values of the settings as they were."""

from collections.abc import Iterator

import pytest
import torch

from flextok_pl.metrics.features import build_extractor
from flextok_pl.metrics.full_precision import full_precision

OPERATIONS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)


def precisions() -> list[str]:
    return [operation.fp32_precision for operation in OPERATIONS]


@pytest.fixture(params=["defaults", "medium", "by operation"])
def before(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What a user has set, by either of torch's interfaces."""
    defaults = precisions()
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "by operation":
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "tf32"
    yield precisions()
    torch.set_float32_matmul_precision("highest")
    for operation, precision in zip(OPERATIONS, defaults, strict=True):
        operation.fp32_precision = precision


def test_settings_hold_inside_only(before: list[str]) -> None:
    assert before[1] == "tf32"
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16):
        with full_precision("cpu"):
            assert precisions() == ["ieee"] * 4
            assert not torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and precisions() == before
        with full_precision("cpu"):
            raise KeyError
    assert torch.is_grad_enabled() and precisions() == before
    assert torch.backends.cudnn.allow_tf32  # readable, and true as before


def test_an_extractor_computes_in_float32(before: list[str]) -> None:
    extractor, found = build_extractor("effnet-lite0"), []
    convolution = next(module for module in extractor.network.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda *_: found.append(precisions()))
    extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert found == [["ieee"] * 4] and precisions() == before
