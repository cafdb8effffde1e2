"""The page for those who come from the published code: each line of ours runs, as it stands there."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from flextok_pl import FlexTok

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coming_from_ml_flextok.md"
GOLDEN = ROOT / "tests" / "parity" / "golden"

SMALLER = {
    "num_tokens=256": "num_tokens=16",
    "num_tokens=64": "num_tokens=8",
    ":64]": ":8]",
    "256": "128",
    ":192]": ":96]",
    "285": "5",
    "207": "7",
}
"""Sizes, numbers of tokens and classes in the page -> those of the models that stand in for the published ones."""


def lines_of_ours() -> Iterator[str]:
    """The Python blocks, and the second columns of the tables that have a column "what differs"."""
    for part in re.findall(r"```python\n[^`]*```|(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE):
        if part.startswith("```"):
            yield part.removeprefix("```python\n").removesuffix("```")
        elif "| what differs |" in part:
            for row in part.splitlines()[2:]:
                _, _, here, _, _ = row.split("|")
                yield here.strip().strip("`")


def in_one_step(detokenize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def quick(tok: FlexTok, *given: Any, num_steps: int = 1, **options: Any) -> Tensor:
        return detokenize(tok, *given, num_steps=min(num_steps, 1), **options)

    return quick


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names in the page -> models of tiny size and random weights."""
    folder = tmp_path_factory.mktemp("published")
    golden = GOLDEN / "flextok_a"
    tok = FlexTok.from_pretrained(golden, vae_config=golden / "vae_config.json")
    tok.save_pretrained(folder / "tokenizer")
    tok.require_vae().save_pretrained(folder / "vae")
    for kind in ("class", "text"):
        shutil.copytree(GOLDEN / f"flexar_{kind}_a", folder / kind)
        release = yaml.safe_load((folder / kind / "config.yaml").read_text())
        release["model"]["meta_model"]["models"]["image_tokenizer"] = {
            "_target_": "flextok_ar.model.integration.ImageResamplerTokenizer",
            "model_id": str(folder / "tokenizer"),
        }
        (folder / kind / "config.yaml").write_text(yaml.safe_dump(release))
    names = {
        "EPFL-VILAB/flextok_d18_d28_dfn": "tokenizer",
        "/path/to/model.safetensors": "tokenizer/model.safetensors",
        "EPFL-VILAB/flextok_vae_c16": "vae",
        "EPFL-VILAB/FlexAR-1B-C2I": "class",
        "EPFL-VILAB/FlexAR-3B-T2I": "text",
    }
    return {name: str(folder / place) for name, place in names.items()}


def test_each_line_of_the_page_runs(stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FlexTok, "detokenize", in_one_step(FlexTok.detokenize))
    for name in ("photo.jpg", "drawing.png"):
        pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)
    names: dict[str, Any] = {}
    shapes = []
    for code in lines_of_ours():
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        for published, ours in stand_ins.items():
            code = code.replace(f'"{published}"', repr(ours))
        exec(code, names)
        shapes.append(tuple(names["reconst"].shape) if "reconst" in code else ())
    assert len(shapes) > 30
    assert set(shapes) == {(), (2, 3, 128, 128), (2, 3, 96, 128)}, "pictures decode to their own shape"
    assert names["tokens"].shape == (1, 16) and [k for k, _ in names["columns"]] == [1, 4, 16]
    assert {path.name for path in tmp_path.iterdir()} >= {"row.png", "tokenizer_folder", "prior_folder"}


def test_an_equal_generator_draws_the_noise_of_the_published_code(stand_ins: dict[str, str]) -> None:
    tok = FlexTok.from_pretrained(stand_ins["EPFL-VILAB/flextok_d18_d28_dfn"])
    tokens, generator = torch.zeros(2, 16, dtype=torch.int64), torch.Generator().manual_seed(3)
    shape = (1, tok.config.latent_channels, *tok.latent_size)
    noise = torch.cat([torch.randn(shape, generator=generator) for _ in range(2)])  # as its pipeline draws it
    ours = tok.sample_latents(tokens, num_steps=1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours, tok.sample_latents(tokens, num_steps=1, noise=noise))
