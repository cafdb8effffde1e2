"""Weights in several files with an index: bit-equal, complete or not there, and hostile ones refused."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_helpers import SMALL_VAE_FILE, assert_same, small_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flextok_pl.config import PriorConfig
from flextok_pl.interop import tensor_file
from flextok_pl.interop.shards import size_in_bytes
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok

INDEX = "model.safetensors.index.json"
MOST = 60_000


@pytest.fixture(scope="module")
def tok() -> FlexTok:
    return small_tokenizer()


@pytest.fixture
def folder(tok: FlexTok, tmp_path: Path) -> Path:
    assert tok.save_pretrained(tmp_path / "m", max_shard_size=MOST) == tmp_path / "m" / INDEX
    return tmp_path / "m"


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right) and all(map(torch.equal, left.values(), right.values()))


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_shards_are_as_huggingface_has_them(tok: FlexTok, folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    shards = [name for name in names(folder) if name != INDEX]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    state = tok.state_dict()
    assert index["metadata"]["total_size"] == sum(each.numel() * 4 for each in state.values())
    for shard in shards:
        tensors = load_file(folder / shard)
        size = sum(each.numel() * 4 for each in tensors.values())
        assert size <= MOST or len(tensors) == 1
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(tensors)


@pytest.mark.parametrize("format", ["ours", "official"])
def test_tokenizers_come_back(tok: FlexTok, format: str, tmp_path: Path) -> None:
    with pytest.warns() if format == "official" else nullcontext():
        index = tok.save_pretrained(tmp_path, format=format, max_shard_size="0.06MB")
    given: dict[str, Any] = {} if format == "ours" else {"vae_config": SMALL_VAE_FILE}
    for place in (tmp_path, index):
        loaded = FlexTok.from_pretrained(place, **given)
        assert_same_weights(tok, loaded)
    if format == "ours":
        assert_same(tok, loaded)


@pytest.mark.parametrize("format", ["ours", "flexar"])
def test_priors_come_back(format: str, tmp_path: Path) -> None:
    prior = Prior(PriorConfig(num_classes=3, vocab_size=24, num_tokens=4, depth=2, width=32, head_dim=16))
    index = prior.save_pretrained(tmp_path, format=format, max_shard_size=8_000)
    assert index.name == ("prior" if format == "ours" else "model") + ".safetensors.index.json"
    loaded = Prior.from_pretrained(tmp_path)
    assert_same_weights(prior, loaded)


def test_one_layout_takes_the_place_of_the_other(tok: FlexTok, folder: Path) -> None:
    assert tok.save_pretrained(folder).name == "model.safetensors"  # 5 GB is more than it has
    assert names(folder) == ["model.safetensors"]
    (folder / "other-00001-of-00002.safetensors").touch()
    tok.save_pretrained(folder, max_shard_size=MOST)
    few = len(names(folder))
    tok.save_pretrained(folder, max_shard_size=2 * MOST)
    assert "model.safetensors" not in names(folder) and len(names(folder)) < few
    assert "other-00001-of-00002.safetensors" in names(folder)
    assert_same(tok, FlexTok.from_pretrained(folder))


def test_a_full_disk_leaves_what_was_there(tok: FlexTok, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, written = names(folder), []

    def save(tensors: Any, file: Path, metadata: Any) -> None:
        if len(written) == 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(tensor_file, "save_file", save)
    other = small_tokenizer()
    with torch.no_grad():
        other.encoder.registers.add_(1.0)
    with pytest.raises(OSError, match="No space left on device.*Free some space"):
        other.save_pretrained(folder, max_shard_size=MOST)
    assert names(folder) == before and len(written) == 2
    assert_same(tok, FlexTok.from_pretrained(folder))
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(folder.with_name("new"), max_shard_size=MOST)
    assert names(folder.with_name("new")) == []


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = names(folder)[1]
    (folder / shard).unlink()
    with pytest.raises(ValueError, match=f"names {shard}, which is not beside it"):
        FlexTok.from_pretrained(folder)


def changed(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".hidden.safetensors", "x.bin", ""]
)
def test_places_elsewhere_are_refused(folder: Path, place: str) -> None:
    changed(folder, **{"encoder.registers": place})
    with pytest.raises(ValueError, match="places encoder.registers in .*it must be a .safetensors file beside it"):
        FlexTok.from_pretrained(folder)


def test_an_index_must_say_where_each_tensor_is(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    shards = [name for name in names(folder) if name != INDEX]
    first = next(name for name, file in json.loads(text)["weight_map"].items() if file == shards[0])
    changed(folder, **{first: shards[-1]})
    with pytest.raises(ValueError, match="they are of different models"):
        FlexTok.from_pretrained(folder)
    (folder / INDEX).write_text(text.replace(f'"{first}":', f'"{first}": "x.safetensors", "{first}":'))
    with pytest.raises(ValueError, match=f"it names {first!r} twice"):
        FlexTok.from_pretrained(folder)
    (folder / INDEX).write_text(text)
    shutil.copy(folder / shards[0], folder / shards[1])
    with pytest.raises(ValueError, match="they are of different models"):
        FlexTok.from_pretrained(folder)
    for broken in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        (folder / INDEX).write_text(broken)
        with pytest.raises(ValueError, match="is not an index of weights"):
            FlexTok.from_pretrained(folder)


def test_shards_of_two_models_do_not_mix(folder: Path, tmp_path: Path) -> None:
    shard = names(folder)[0]
    save_file(load_file(folder / shard), folder / shard, {"format": "flextok_pl", "version": "1", "config": "{}"})
    with pytest.raises(ValueError, match="have different metadata"):
        FlexTok.from_pretrained(folder)


def test_sizes(tok: FlexTok, tmp_path: Path) -> None:
    assert [size_in_bytes(each) for each in ("5GB", "1.5 mb", 7, "9")] == [5 * 10**9, 1_500_000, 7, 9]
    for wrong in ("5G", "big", 0, -1, "", 1.5):
        with pytest.raises(ValueError, match="max_shard_size=.* must be a number of bytes"):
            size_in_bytes(wrong)
    with pytest.raises(ValueError, match="give a folder, not"):
        tok.save_pretrained(tmp_path / "x.safetensors", max_shard_size=MOST)
