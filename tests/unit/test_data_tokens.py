"""Token shards: the tokenizer's tokens, views, captions under a text encoder, and whose tokens they are."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from flextok_pl.data import Augmentation, ShardDataModule, ShardError, ShardIndex, write_folder, write_tokens
from flextok_pl.data.shards.index import INDEX_NAME
from flextok_pl.data.shards.sources import load_indices

TOKENIZER = {"sha256": "aaaa", "vocab_size": 1000, "num_tokens": 12, "path": "tok.safetensors"}
ENCODER = {"name": "letters"}


def tokenize(images):
    pooled = torch.nn.functional.avg_pool2d(images, 4)  # (B, 3, 2, 2)
    return ((pooled.flatten(1) + 1) * 499).round().long()  # (B, 12) in 0..998


def encode_text(captions):
    """A caption's states are its letters' numbers and their halves; the padding is not zero."""
    length = max(map(len, captions)) + 1
    states, mask = torch.full((len(captions), length, 2), 77.0), torch.zeros(len(captions), length, dtype=torch.bool)
    for i, caption in enumerate(captions):
        letters = torch.tensor([ord(c) for c in caption], dtype=torch.float32)
        states[i, : len(caption)] = torch.stack([letters, letters / 2], dim=1)
        mask[i, : len(caption)] = True
    return states, mask


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    captions = ["file,caption"]
    for i in range(11):
        path = root / "src" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(90 * i).resize((8 + i, 12)).convert("RGB").save(path)
        captions.append(f"{path.relative_to(root / 'src')},{'x' * i + 'y'}")
    (root / "captions.csv").write_text("\n".join(captions))
    write_folder(root / "src", root / "text", captions=root / "captions.csv", num_workers=0, samples_per_shard=4)
    write_folder(root / "src", root / "plain", num_workers=0)
    return root


def write(images, folder, source="text", tokenize=tokenize, **options):
    defaults = {"tokenizer_id": TOKENIZER, "image_size": 8, "num_workers": 0}
    return write_tokens(str(images / source), folder, tokenize, **{**defaults, **options})


def load(folder, cache=False, size=64):
    data = ShardDataModule(
        val=str(folder), image_size=8, num_workers=0, eval_batch_size=size, cache_in_memory=cache, val_limit=None
    )
    return list(data.val_dataloader())


def bytes_of(index):
    return [path.read_bytes() for path in index.paths]


def arrays(index, extension):
    """The arrays as they lie in the first shard, by key."""
    with tarfile.open(index.paths[0]) as tar:
        files = {name.partition(".")[::2]: tar.extractfile(name).read() for name in tar.getnames()}
    return {key: np.load(io.BytesIO(content)) for (key, end), content in files.items() if end == extension}


@pytest.mark.parametrize("cache", [False, True])
def test_view_zero_is_the_tokenized_centre_crop(images, tmp_path, cache):
    index = write(images, tmp_path, batch_size=4)
    assert (index.num_samples, index.fields, index.image_size) == (11, ("tokens", "label", "text"), 8)
    assert index.maker("tokens") == index.provenance["tokenizer"] == TOKENIZER
    assert index.maker("text_states") is None and ShardIndex.load(tmp_path) == index
    (source,), (batch,) = load(images / "text"), load(tmp_path, cache)
    assert batch["key"] == [f"{key}_v0" for key in source["key"]]
    assert batch["tokens"].dtype == torch.int64 and torch.equal(batch["tokens"], tokenize(source["image"]))
    assert torch.equal(batch["label"], source["label"]) and batch["text"] == source["text"]
    assert set(batch) == {"key", "tokens", "label", "text"}


def test_a_source_without_captions(images, tmp_path):
    assert write(images, tmp_path, source="plain").fields == ("tokens", "label")


def test_views_are_training_augmentations(images, tmp_path):
    augmentation = Augmentation(translate=0.3, scale=(0.6, 0.9))
    index = write(images, tmp_path, num_views=3, augmentation=augmentation, samples_per_shard=10)
    assert [shard.count for shard in index.shards] == [9, 8, 8, 8]
    (batch,) = load(tmp_path)
    tokens = dict(zip(batch["key"], batch["tokens"], strict=True))
    assert len(tokens) == 33
    views = [tokens[f"a/0_v{view}"] for view in range(3)]
    assert not any(torch.equal(views[i], views[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


def test_bytes_do_not_depend_on_workers_or_batches(images, tmp_path):
    def among_batch(pictures):  # what a picture gives depends on its batch, as floating point may
        return tokenize(pictures) // 2 + len(pictures) + int(pictures[0].sum().abs()) % 100

    options = {"num_views": 2, "samples_per_shard": 5, "batch_size": 2}
    alone = write(images, tmp_path / "0", tokenize=among_batch, **options)
    for workers in (1, 2):
        index = write(images, tmp_path / str(workers), tokenize=among_batch, num_workers=workers, **options)
        assert bytes_of(index) == bytes_of(alone)
        assert (index.folder / INDEX_NAME).read_bytes() == (alone.folder / INDEX_NAME).read_bytes()
    keys = [key for batch in load(alone.folder, size=7) for key in batch["key"]]
    source = [key for batch in load(images / "text") for key in batch["key"]]
    assert keys == [f"{key}_v{view}" for view in range(2) for key in source]

    by_two, by_seven = (write(images, tmp_path / f"by{n}", **{**options, "batch_size": n}) for n in (2, 7))
    assert bytes_of(by_two) == bytes_of(by_seven)


@pytest.mark.parametrize("vocab_size, dtype", [(1000, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_stored_type_follows_the_vocabulary(images, tmp_path, vocab_size, dtype):
    identity = {"sha256": "b", "vocab_size": vocab_size, "num_tokens": 3}
    index = write(images, tmp_path, tokenize=lambda x: torch.full((len(x), 3), vocab_size - 1), tokenizer_id=identity)
    stored = arrays(index, "tokens.npy")["a/8_v0"]
    assert stored.dtype == dtype and stored.tolist() == [vocab_size - 1] * 3
    assert load(tmp_path)[0]["tokens"].unique().tolist() == [vocab_size - 1]


@pytest.mark.parametrize("cache", [False, True])
def test_text_states_are_stored_without_padding_and_padded_in_batches(images, tmp_path, cache):
    index = write(images, tmp_path, encode_text=encode_text, text_encoder_id=ENCODER, batch_size=4, num_views=2)
    assert index.fields == ("tokens", "text_states", "label", "text")
    assert index.maker("text_states") == index.provenance["text_encoder"] == ENCODER
    stored = arrays(index, "states.npy")
    assert {(array.dtype.name, array.shape[1]) for array in stored.values()} == {("float16", 2)}
    batches = load(tmp_path, cache, size=5)
    assert sum(len(batch["key"]) for batch in batches) == 22
    for batch in batches:
        assert [len(stored[key]) for key in batch["key"]] == [len(text) for text in batch["text"]]
        states, mask = encode_text(batch["text"])
        assert batch["text_states"].dtype == torch.float32 and batch["text_mask"].dtype == torch.bool
        longest = max(map(len, batch["text"]))
        assert batch["text_states"].shape == (len(batch["key"]), longest, 2)
        assert torch.equal(batch["text_mask"], mask[:, :longest])
        assert torch.equal(batch["text_states"], (states * mask[..., None])[:, :longest])


def test_sets_of_different_tokenizers_are_not_read_together(images, tmp_path):
    write(images, tmp_path / "a")
    write(images, tmp_path / "same", tokenizer_id={**TOKENIZER, "path": "elsewhere"}, seed=1)
    write(images, tmp_path / "other", tokenizer_id={**TOKENIZER, "sha256": "bbbb"})
    a, same, other = (str(tmp_path / name) for name in ("a", "same", "other"))
    message = rf"{a} and {other} hold tokens of different tokenizers \(aaaa and bbbb\).*flextok data latents or tokens"
    assert len(load_indices([a, same])) == 2
    with pytest.raises(ShardError, match=message):
        load_indices([a, same, other])
    options = {"image_size": 8, "num_workers": 0}
    ShardDataModule(a, same, **options).setup("fit")
    with pytest.raises(ShardError, match=message):
        ShardDataModule(a, other, **options).setup("fit")
    with pytest.raises(ShardError, match=rf"{a} and {other}"):
        data = ShardDataModule(a, same, other, **options)
        data.setup("fit")
        data.setup("test")
    ShardDataModule(a, str(images / "text"), other, **options).setup("fit")  # as long as the test set is not asked for


def test_text_states_of_different_encoders_are_not_read_together(images, tmp_path):
    for name in ("letters", "words"):
        write(images, tmp_path / name, encode_text=encode_text, text_encoder_id={"name": name})
    with pytest.raises(ShardError, match=r"text_states of different text encoders \(\{'name': 'letters'\} and "):
        load_indices(str(tmp_path / "{letters,words}"))
    with pytest.raises(ShardError, match="different text encoders"):
        data = ShardDataModule(str(tmp_path / "letters"), str(tmp_path / "words"), image_size=8, num_workers=0)
        data.setup("fit")


def test_the_data_module_knows_tokenizer_and_text_encoder(images, tmp_path):
    write(images, tmp_path / "tokens", encode_text=encode_text, text_encoder_id=ENCODER)
    pictures, tokens = str(images / "text"), str(tmp_path / "tokens")
    for sources in ((tokens, None), (None, tokens), (pictures, tokens)):
        data = ShardDataModule(*sources, image_size=8, num_workers=0)
        assert data.tokenizer == TOKENIZER and data.text_encoder == ENCODER
    data = ShardDataModule(pictures, image_size=8)
    assert data.tokenizer is None and data.text_encoder is None


def test_an_evaluation_reads_no_training_set(images, tmp_path):
    """It may be missing, or of another tokenizer than the one that is evaluated."""
    pictures = str(images / "text")
    for stage, sets in (("test", {"test": pictures}), ("validate", {"val": pictures}), ("predict", {"val": pictures})):
        data = ShardDataModule(train=str(tmp_path / "nowhere"), image_size=8, num_workers=0, **sets)
        data.setup(stage)
        assert data.tokenizer is None and data.text_encoder is None
        assert data.classes == ShardIndex.load(pictures).classes
    data.setup("test")
    with pytest.raises(ShardError, match="nowhere"):
        data.setup("fit")


def test_rerun_and_another_tokenizer(images, tmp_path):
    first = write(images, tmp_path)
    assert write(images, tmp_path, tokenize=None, num_workers=2) == first  # nothing is tokenized
    with pytest.raises(ShardError, match="overwrite"):
        write(images, tmp_path, tokenizer_id={**TOKENIZER, "sha256": "bbbb"})
    other = write(images, tmp_path, tokenizer_id={**TOKENIZER, "sha256": "bbbb"}, overwrite=True)
    assert other.maker("tokens")["sha256"] == "bbbb"


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda x: tokenize(x)[:, :5], r"shape \(11, 5\) for 11 images.*K=12"),
        (lambda x: tokenize(x)[:-1], r"\(10, 12\) for 11"),
        (lambda x: tokenize(x).float(), "torch.float32"),
        (lambda x: tokenize(x) - 999, r"the tokens of 'a/8' are in -\d+\.\..*outside 0\.\.999"),
        (lambda x: tokenize(x) + 1000, r"outside 0\.\.999; give the vocab_size"),
    ],
)
def test_bad_tokens_leave_nothing_half_written(images, tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        write(images, tmp_path, tokenize=broken)
    assert not list(tmp_path.glob("*.tar")) and not (tmp_path / INDEX_NAME).exists()
    assert write(images, tmp_path).num_samples == 11  # the same folder can be used at once


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda states, mask: (states[0], mask), "expected"),
        (lambda states, mask: (states[:-1], mask[:-1]), "for 11 captions"),
        (lambda states, mask: (states, mask[:, :-1]), "expected"),
        (lambda states, mask: (states, mask.long()), "torch.int64"),
        (lambda states, mask: (states * 1e4, mask), "the text states of 'a/8' are not finite in float16"),
    ],
)
def test_bad_text_states(images, tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        write(images, tmp_path, encode_text=lambda texts: broken(*encode_text(texts)), text_encoder_id=ENCODER)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_views": 0}, "num_views=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"tokenizer_id": {"vocab_size": 1000, "num_tokens": 12}}, "'sha256', a text"),
        ({"tokenizer_id": {**TOKENIZER, "sha256": ""}}, "'sha256', a text"),
        ({"tokenizer_id": {**TOKENIZER, "vocab_size": "1000"}}, "'vocab_size', a positive"),
        ({"tokenizer_id": {**TOKENIZER, "num_tokens": 0}}, "'num_tokens', a positive"),
        ({"encode_text": encode_text}, "give both or none"),
        ({"text_encoder_id": ENCODER}, "give both or none"),
        ({"encode_text": encode_text, "text_encoder_id": {}}, "text_encoder_id={} must have 'name'"),
        ({"encode_text": encode_text, "text_encoder_id": ENCODER, "source": "plain"}, "no texts to encode"),
    ],
)
def test_bad_options_are_named(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(images, tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_tokens_of_tokens_are_refused(images, tmp_path):
    write(images, tmp_path / "a")
    with pytest.raises(ShardError, match="no images to encode"):
        write(tmp_path, tmp_path / "b", source="a")


def test_an_index_of_unknown_origin_has_no_tokenizer(images, tmp_path):
    write(images, tmp_path / "a")
    write(images, tmp_path / "b")
    file = tmp_path / "b" / INDEX_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "provenance": {}}))
    unknown = ShardIndex.load(tmp_path / "b")
    assert unknown.maker("tokens") is None
    with pytest.raises(ShardError, match=r"aaaa and None"):
        load_indices(str(tmp_path / "{a,b}"))
