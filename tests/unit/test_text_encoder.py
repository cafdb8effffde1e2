"""Text encoders, and priors that listen to them."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertTokenizerFast, T5Config, T5EncoderModel

from flextok_pl.config import PriorConfig
from flextok_pl.models.text import TextEncoder
from flextok_pl.modules import PriorModule
from flextok_pl.modules.saved import SavedPrior

NET = PriorConfig(text_width=384, vocab_size=30, num_tokens=6, depth=1, width=32, head_dim=16)


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder("minilm", max_length=16)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 encoder of random weights, in a local folder with a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).save_pretrained(
        folder
    )
    words = folder / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "apple"]))
    BertTokenizerFast(vocab_file=str(words)).save_pretrained(folder)
    return folder


def test_states_do_not_depend_on_the_batch(minilm: TextEncoder) -> None:
    states, mask = minilm(["red apple", "", "a flag with three stripes of different colours"])
    assert states.shape[2] == minilm.width == 384 and states.dtype == torch.float32
    alone, alone_mask = minilm(["red apple"])
    assert alone_mask.all() and mask[0].sum() == alone.shape[1]
    torch.testing.assert_close(states[0, mask[0]], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(states[1, mask[1]], minilm.null_states(), rtol=0, atol=1e-5)
    assert not states.requires_grad and not any(p.requires_grad for p in minilm.parameters())


def test_meaning(minilm: TextEncoder) -> None:
    means = [minilm([text]).states[0].mean(0) for text in ("dog", "puppy", "bicycle")]
    near, far = (torch.cosine_similarity(means[0], other, 0) for other in means[1:])
    assert near > far


def test_long_texts(minilm: TextEncoder) -> None:
    long = "word " * 40
    with pytest.raises(ValueError, match="has 42 tokens, but minilm takes 16; shorten it"):
        minilm([long])
    with pytest.warns(UserWarning, match="the text is cut"):
        assert minilm([long], truncate=True).states.shape[1] == 16


def test_a_local_t5(t5_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(t5_folder.parent))
    encoder = TextEncoder(f"~/{t5_folder.name}", dtype="bfloat16")
    states, mask = encoder(["red apple", "green"])
    assert states.shape == (2, 4, 16) and states.dtype == torch.float32 and mask.sum(1).tolist() == [4, 3]
    assert encoder.network.dtype == torch.bfloat16
    exact = TextEncoder(str(t5_folder))(["red apple", "green"]).states
    assert 0 < (exact - states)[mask].abs().max() < 0.1


@pytest.mark.parametrize("name", ["/nowhere", "google/flan-t5-xl"])
def test_encoders_that_are_not_here(name: str) -> None:
    with pytest.raises(ValueError, match=f"text_encoder='{name}' cannot be loaded"):
        TextEncoder(name)


def test_a_prior_of_texts(tmp_path: Path, minilm: TextEncoder) -> None:
    torch.manual_seed(0)
    module = PriorModule(NET, text_encoder="minilm")
    config = module.prior.config
    assert (config.null_text_length, config.text_encoder, module.condition_kind) == (2, "minilm", "text")
    assert torch.equal(module.prior.null_text, minilm.null_states())
    assert not any("encoder" in name for name in module.state_dict()), "never in a checkpoint"

    states = module.condition({"text": ["red apple", ""], "key": ["a", "b"]})
    stored = {"text_states": states.states, "text_mask": states.mask, "key": ["a", "b"]}
    tokens = torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = module.prior(tokens, states)
        assert torch.equal(module.prior(tokens, module.condition(stored)), logits)
        free = module.prior(tokens)
    torch.testing.assert_close(logits[1], free[1], rtol=0, atol=1e-5)  # the empty text is no condition
    assert (logits[0] - free[0]).abs().max() > 1e-4

    module.prior.save_pretrained(tmp_path)
    saved = SavedPrior(str(tmp_path), None)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert saved.generate_tokens(["red apple", ""], 2.0, generator=seeds).shape == (2, 6)
    with pytest.raises(ValueError, match="shorten it"):
        saved.generate_tokens(["word " * 200])
    with pytest.raises(ValueError, match="needs captions"):
        saved.condition({"tokens": tokens})


def test_shards_with_states_of_another_encoder() -> None:
    module = PriorModule(NET, text_encoder="minilm")
    data = SimpleNamespace(text_encoder={"name": "google/flan-t5-xl"})
    module.trainer = SimpleNamespace(datamodule=data, _checkpoint_connector=None, is_global_zero=True)
    with pytest.raises(ValueError, match="states of 'google/flan-t5-xl', but text_encoder='minilm'"):
        module.setup("fit")


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="set null_text_length and text_width"):
        PriorModule(dataclasses.replace(NET, text_width=16), text_encoder="minilm")
