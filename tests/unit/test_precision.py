"""What is used computes in float32 and leaves settings as they were; who sums in float64; which precisions train."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from model_helpers import sample_tokens
from pretended_device import DEVICE, pretended_device
from torch.utils._python_dispatch import TorchDispatchMode

from flextok_pl import precision
from flextok_pl.assets import DEMO_PRIOR, DEMO_TOKENIZER
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.flow.decoding import AdaptiveProjectedGuidance
from flextok_pl.layers.embeddings import sincos_position_table
from flextok_pl.metrics.codes import position_entropy
from flextok_pl.metrics.kernel import kernel_distance
from flextok_pl.models.attention_maps import register_attention
from flextok_pl.models.prior import Prior
from flextok_pl.models.teacher import Teacher
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import PriorModule, TokenizerModule
from flextok_pl.precision import (
    accumulation_dtype,
    check_training_precision,
    frozen_networks_in,
    full_precision,
    outside_autocast,
)

PACKAGE = Path(__file__).parents[2] / "flextok_pl"
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
    for operation, value in zip(OPERATIONS, defaults, strict=True):
        operation.fp32_precision = value


def test_settings_hold_inside_only(before: list[str]) -> None:
    assert before[1] == "tf32"
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16):
        with full_precision("cpu"):
            assert precisions() == ["ieee"] * 4
            with full_precision(torch.device("meta")):
                assert precisions() == ["ieee"] * 4
            assert precisions() == ["ieee"] * 4, "an inner one ends without effect"
            assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu") and precisions() == before
        with full_precision("cpu"):
            raise KeyError
    assert precisions() == before
    assert torch.backends.cudnn.allow_tf32  # readable, and true as before


def test_frozen_networks_compute_in_bfloat16_where_asked(demo: tuple[FlexTok, Prior]) -> None:
    """In that thread and until the end; what they give stays float32."""
    tokenizer = demo[0]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, tokens = tokenizer.encode_latents(images), tokenizer.tokenize(images)
    elsewhere: list[bool] = []

    def look() -> None:
        with outside_autocast("cpu"):
            elsewhere.append(torch.is_autocast_enabled("cpu"))

    with pytest.raises(KeyError), frozen_networks_in(torch.bfloat16):
        inexact = tokenizer.encode_latents(images)
        assert (tokenizer.tokenize(images) == tokens).float().mean() > 0.8
        with outside_autocast("cpu"), frozen_networks_in(torch.float32):
            assert torch.equal(tokenizer.encode_latents(images), latents)
        thread = Thread(target=look)
        thread.start()
        thread.join()
        raise KeyError
    assert elsewhere == [False]
    assert inexact.dtype == torch.float32
    assert 1e-3 < (inexact - latents).abs().max() / latents.abs().max() < 0.05
    assert torch.equal(tokenizer.encode_latents(images), latents)


def test_threads_that_overlap_leave_the_settings_as_they_were() -> None:
    """The one that began first ends first, while the other still computes."""
    found, both_inside, first_ended = precisions(), Barrier(2), Barrier(2)
    seen: list[list[str]] = []

    def first() -> None:
        with full_precision("cpu"):
            both_inside.wait(10)
        first_ended.wait(10)

    def second() -> None:
        with full_precision("cpu"):
            both_inside.wait(10)
            first_ended.wait(10)
            seen.append(precisions())

    threads = [Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [["ieee"] * 4] and precisions() == found


def test_an_extractor_computes_in_float32(before: list[str]) -> None:
    extractor, found = build_extractor("effnet-lite0"), []
    convolution = next(module for module in extractor.network.modules() if isinstance(module, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda *_: found.append(precisions()))
    extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert found == [["ieee"] * 4] and precisions() == before


@pytest.fixture(scope="module")
def demo() -> tuple[FlexTok, Prior]:
    return FlexTok.from_pretrained(DEMO_TOKENIZER), Prior.from_pretrained(DEMO_PRIOR)


def test_what_is_used_does_not_follow_autocast(demo: tuple[FlexTok, Prior]) -> None:
    tok, prior = demo
    teacher = Teacher("effnet-lite2", image_size=64).eval()
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear") * 2 - 1
    classes = torch.tensor([1, 2])

    def results() -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        tokens = tok.tokenize(images)
        return {
            "tokens": tokens,
            "tokens of latents": tok.tokenize_latents(tok.encode_latents(images)),
            "drawn tokens": prior.generate(classes, 6, cfg_scale=2.0, generator=torch.Generator().manual_seed(0)),
            "moments": tok.require_vae().moments(images),
            "latents": tok.encode_latents(images),
            "decoded latents": tok.sample_latents(tokens, 8, 2, generator=generator),
            "images": tok.detokenize(tokens, num_tokens=8, num_steps=2, generator=generator.manual_seed(0)),
            "features of the teacher": teacher(images),
            "attention": register_attention(tok, images[:1], [0.5], generator.manual_seed(0)),
        }

    with torch.no_grad():
        outside = results()
        with torch.autocast("cpu", torch.bfloat16):
            inside = results()
    for name, values in outside.items():
        assert inside[name].dtype == values.dtype, name
        if values.is_floating_point():
            torch.testing.assert_close(inside[name], values, rtol=0, atol=1e-5, msg=name)
        else:
            assert torch.equal(inside[name], values), name


def test_what_is_trained_follows_autocast(demo: tuple[FlexTok, Prior]) -> None:
    tok, prior = demo
    with torch.autocast("cpu", torch.bfloat16):
        codes = tok.encode(torch.zeros(1, 16, 8, 8), 2)
        assert codes.dtype == torch.bfloat16 and codes.requires_grad
        assert tok.velocity(torch.zeros(1, 16, 8, 8), 0.5, codes).dtype == torch.bfloat16
        assert tok.require_vae()(torch.zeros(1, 3, 64, 64))[1].dtype == torch.bfloat16
        assert prior(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.bfloat16


def test_nothing_waits_for_latents_and_tokens(demo: tuple[FlexTok, Prior], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TokenizerModule(replace(demo[0].config, encoder_depth=1, decoder_depth=1))
    prior = PriorModule(replace(demo[1].config, depth=1, tokenizer=None), tokenizer=str(DEMO_TOKENIZER))
    with pretended_device(monkeypatch) as device:
        batch = {"image": torch.zeros(1, 3, 64, 64).to(DEVICE)}
        tokenizer.to(DEVICE)
        prior.to(DEVICE).tokens(batch)  # brings the tokenizer there
        for device.watching in (True, False):
            assert tokenizer.latents(batch).shape == (1, 16, 8, 8)
            assert prior.tokens(batch).shape == (1, 64)
        assert not device.waits, "\n".join(device.waits)
        device.watching = True
        prior.reconstructor.tokenize(batch["image"])
        assert device.waits, "it looks at the values"


class NoFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return result


def test_devices_without_float64(monkeypatch: pytest.MonkeyPatch, demo: tuple[FlexTok, Prior]) -> None:
    assert [accumulation_dtype(kind) for kind in ("cpu", "cuda", "mps")] == [torch.float64] * 2 + [torch.float32]
    tok, prior = demo
    a, b = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(50, (40, 6), generator=torch.Generator().manual_seed(1))
    logits, uniform = torch.randn(500, 300, generator=torch.Generator().manual_seed(2)), torch.rand(500)
    velocity = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def results() -> list[torch.Tensor]:
        return [
            torch.tensor(kernel_distance(a, b)).float(),
            position_entropy(tokens),
            AdaptiveProjectedGuidance()(*velocity, 3.0),
            sincos_position_table(16, (4, 4)),
            tok.detokenize(tokens[:1, :4], num_steps=1, noise=torch.zeros(1, 16, 8, 8)),
        ]

    wide = results()
    drawn = sample_tokens(logits, uniform, top_p=0.9)
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    with NoFloat64():
        for narrow, expected in zip(results(), wide, strict=True):
            torch.testing.assert_close(narrow, expected.float(), rtol=1e-4, atol=1e-4)
        assert (sample_tokens(logits, uniform, top_p=0.9) == drawn).float().mean() > 0.99
        shut = torch.tensor([[0.0, float("-inf")]]).expand(2, -1)
        assert sample_tokens(shut, torch.tensor([0.0, 1.0])).tolist() == [0, 0]
        assert prior.generate(torch.tensor([0]), 4, generator=torch.Generator().manual_seed(0)).max() < 4375


WIDE = {
    "precision.py": "the functions that say where it is",
    "models/sampling.py": "a table of both types",
    "metrics/frechet.py": "statistics on a `summing_device`",
    "metrics/inception_score.py": "sums on a `summing_device`",
    "evaluation/statistics.py": "sums on a `summing_device`",
    "evaluation/reconstruction_statistics.py": "sums on a `summing_device`",
    "metrics/linear_probe.py": "fitted on the CPU",
    "flow/nested_dropout.py": "probabilities for the plan, on the CPU",
    "data/transforms.py": "draws of a CPU generator",
    "search/verifier_ensemble.py": "scores, which verifiers give on the CPU",
}
"""Files that name float64, and why they may."""


def test_nobody_else_names_float64() -> None:
    """Elsewhere `accumulation_dtype` or `as_float64` decides, and `.double()` follows `.cpu()`."""
    naming = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            if node.attr in ("float64", "double") and isinstance(node.value, ast.Name) and node.value.id == "torch":
                naming.add(name)
            elif node.attr == "double":
                moved = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
                assert moved and node.value.func.attr == "cpu", f"{name}:{node.lineno}: .double() without .cpu()"
    assert naming == set(WIDE)


@pytest.mark.parametrize(
    ("given", "name"),
    [(None, "32-true"), (32, "32-true"), ("32", "32-true"), ("bf16", "bf16-mixed"), (16, "16-mixed")],
)
def test_names_of_precisions(given: object, name: str) -> None:
    assert check_training_precision(given) == check_training_precision(name) == name


@pytest.mark.parametrize(
    ("given", "adversarial", "remedy"),
    [
        ("bf16-true", False, "use bf16-mixed"),
        ("16-true", False, "use bf16-mixed"),
        ("64-true", False, "use 32-true"),
        ("transformer-engine", False, "use 32-true, bf16-mixed"),
        ("16-mixed", True, "gan_weight .* use bf16-mixed"),
    ],
)
def test_precisions_that_do_not_train(given: str, adversarial: bool, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.precision='{given}'.*{remedy}"):
        check_training_precision(given, adversarial)
