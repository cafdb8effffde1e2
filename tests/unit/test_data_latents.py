"""Latent shards: moments as the encoder gave them, and what belongs to which autoencoder. Views: as of tokens."""

import pytest
import torch
from PIL import Image

from flextok_pl.data import Augmentation, ShardDataModule, ShardError, write_folder, write_latents
from flextok_pl.precision import outside_autocast


def encode(images):
    pooled = torch.nn.functional.avg_pool2d(images, 4)  # (B, 3, 2, 2)
    return torch.cat([pooled, -pooled.abs()], dim=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(11):
        path = root / "src" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(90 * i).resize((8 + i, 12)).convert("RGB").save(path)
    write_folder(root / "src", root / "shards", num_workers=0, samples_per_shard=4)
    return str(root / "shards")


def load(folder, **options):
    data = ShardDataModule(val=str(folder), image_size=8, num_workers=0, batch_size=64, **options)
    (batch,) = data.val_dataloader()
    return batch


def write(images, folder, **options):
    return write_latents(
        images, folder, encode, **{"source_id": {"vae": "pool"}, "image_size": 8, "num_workers": 0, **options}
    )


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0), ("float16", 1e-3)])
def test_view_zero_is_the_encoded_centre_crop(images, tmp_path, dtype, tolerance):
    index = write(images, tmp_path, dtype=dtype, batch_size=4)
    assert (index.num_samples, index.fields, index.image_size) == (11, ("latent", "label"), 8)
    assert index.classes == ("a", "b") and index.provenance["autoencoder"] == {"vae": "pool"}
    source, latents = load(images), load(tmp_path)
    assert latents["key"] == [f"{key}_v0" for key in source["key"]]
    assert torch.equal(latents["label"], source["label"])
    assert latents["latent"].dtype == torch.float32
    assert (latents["latent"] - encode(source["image"])).abs().max() <= tolerance


def extract(images):
    return torch.nn.functional.avg_pool2d(images, 2)[:, :2]  # (B, 2, 4, 4)


TEACHER = {"name": "pool", "sha256": "aaaa"}


@pytest.mark.parametrize("cache_in_memory", [False, True])
def test_features_of_a_teacher_are_of_the_same_views(images, tmp_path, cache_in_memory):
    options = {"num_views": 2, "dtype": "float32", "augmentation": Augmentation(translate=0.3)}
    index = write(images, tmp_path, extract=extract, teacher_id=TEACHER, **options)
    assert index.fields == ("latent", "teacher_features", "label") and index.maker("teacher_features") == TEACHER
    batch = load(tmp_path, cache_in_memory=cache_in_memory)
    features = batch["teacher_features"]
    assert features.shape == (22, 2, 4, 4) and features.dtype == torch.float32
    pooled = torch.nn.functional.avg_pool2d(features, 2)
    torch.testing.assert_close(pooled, batch["latent"][:, :2])  # as `encode` pools


def test_sets_of_different_makers_are_not_read_together(images, tmp_path):
    """Whose weights they are counts, and not where the weights lay."""
    teacher = {"extract": extract, "teacher_id": TEACHER}
    write(images, tmp_path / "a", source_id={"vae": "here", "sha256": "1"}, **teacher)
    write(images, tmp_path / "b", source_id={"vae": "there", "sha256": "1"}, **teacher)
    write(images, tmp_path / "c", source_id={"vae": "here", "sha256": "2"}, **teacher)
    other_teacher = {**teacher, "teacher_id": {**TEACHER, "sha256": "b"}}
    write(images, tmp_path / "d", source_id={"vae": "here", "sha256": "1"}, **other_teacher)
    data = ShardDataModule(train=str(tmp_path / "{a,b}"), image_size=8)
    assert data.num_samples("train") == 0 and data.autoencoder["vae"] == "here" and data.teacher == TEACHER
    for other, message in (("c", "latent of different autoencoders"), ("d", "features of different teachers")):
        with pytest.raises(ShardError, match=message):
            ShardDataModule(train=str(tmp_path / f"{{a,{other}}}"), image_size=8).num_samples("train")
        with pytest.raises(ShardError, match=message):
            data = ShardDataModule(train=str(tmp_path / "a"), val=str(tmp_path / other), image_size=8)
            data.setup("fit")


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda x: x.flatten(1), "expected"),
        (lambda x: encode(x)[:-1], "expected"),
        (lambda x: encode(x)[:, :5], "expected"),
        (lambda x: encode(x) * torch.inf, "not finite"),
        (lambda x: encode(x) + 70000, "not finite in float16"),
    ],
    ids=["flat", "one too few", "odd channels", "infinite", "beyond float16"],
)
def test_unusable_moments(images, tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        write_latents(images, tmp_path, broken, source_id={}, image_size=8, num_workers=0)


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda x: extract(x).flatten(1), "extract gave"),
        (lambda x: extract(x)[:-1], "extract gave"),
        (lambda x: extract(x) * torch.inf, "teacher's features of .* are not finite in float16"),
    ],
    ids=["flat", "one too few", "infinite"],
)
def test_unusable_features(images, tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        write(images, tmp_path, extract=broken, teacher_id=TEACHER)
    assert not list(tmp_path.glob("*.tar"))


def test_features_of_an_unknown_teacher(images, tmp_path):
    with pytest.raises(ValueError, match="belong together"):
        write(images, tmp_path, extract=extract)
    with pytest.raises(ValueError, match="must have 'sha256'"):
        write(images, tmp_path, extract=extract, teacher_id={"name": "pool"})


def test_numbers_of_another_type(images, tmp_path):
    with pytest.raises(ValueError, match="dtype='int8'"):
        write(images, tmp_path, dtype="int8")


def test_latents_in_bfloat16(images, tmp_path, capsys):
    """The index says what they were computed in; sets of the same weights are read together, whatever it was."""
    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def encode_frozen(images):
        with outside_autocast(images.device):
            return torch.nn.functional.conv2d(images, weight, stride=4).float()

    options = {"source_id": {"sha256": "1"}, "image_size": 8, "num_workers": 0, "dtype": "float32"}
    found = {}
    for dtype in ("float32", "bfloat16"):
        index = write_latents(images, tmp_path / dtype, encode_frozen, compute_dtype=dtype, **options)
        assert index.provenance["compute_dtype"] == dtype
        assert index.arguments.get("compute_dtype", "float32") == dtype
        found[dtype] = load(tmp_path / dtype)["latent"]
        assert ("was computed in bfloat16" in capsys.readouterr().err) == (dtype == "bfloat16")
    assert torch.equal(found["bfloat16"], found["bfloat16"].bfloat16().float())
    difference = (found["bfloat16"] - found["float32"]).abs().max()
    assert 0 < difference < 2**-7 * found["float32"].abs().max()
    assert ShardDataModule(train=str(tmp_path / "{float32,bfloat16}"), image_size=8, drop_last=False).num_samples(
        "train"
    ) == 2 * len(found["float32"])
    with pytest.raises(ShardError, match="overwrite"):
        write_latents(images, tmp_path / "float32", encode_frozen, compute_dtype="bfloat16", **options)
    with pytest.raises(ValueError, match="compute_dtype='half'"):
        write_latents(images, tmp_path / "float32", encode_frozen, compute_dtype="half", **options)
