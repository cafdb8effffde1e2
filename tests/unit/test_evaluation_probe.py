"""The probe is fitted once for the same images and extractor, and kept."""

from pathlib import Path

import pytest
import torch

from flextok_pl.data import ShardIndex
from flextok_pl.evaluation.probe import fitted_probe
from flextok_pl.metrics.linear_probe import LinearProbe


class Thumbnail:
    """The picture at 4 x 4 pixels."""

    name, weights_hash, resize, dim = "thumbnail", "0" * 16, "none", 48
    device = torch.device("cpu")
    seen = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        Thumbnail.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def upside_down(images: torch.Tensor, keys: list[str]) -> torch.Tensor:
    assert len(keys) == len(images)
    return images.flip(2)


def fitted(source: str, size: int, cache: Path | None, look: str = "a") -> LinearProbe:
    return fitted_probe(source, size, Thumbnail(), upside_down, [look], cache)


def test_probe_is_kept(image_shards: Path, tmp_path: Path) -> None:
    Thumbnail.seen = 0
    source = str(image_shards / "train")
    probe = fitted(source, 16, tmp_path)
    count = Thumbnail.seen
    assert (
        probe.num_classes == 2
        and count == 2 * ShardIndex.load(source).num_samples
        and len(list(tmp_path.iterdir())) == 1
    )
    again = fitted(source, 16, tmp_path)
    features = torch.rand(3, 48)
    assert Thumbnail.seen == count, "the second one comes from the file"
    assert torch.equal(again.probabilities(None, features), probe.probabilities(None, features))
    fitted(source, 32, tmp_path)
    assert Thumbnail.seen == 2 * count and len(list(tmp_path.iterdir())) == 2, "another size is another probe"
    fitted(source, 16, tmp_path, "b")
    assert Thumbnail.seen == 3 * count, "other reconstructions are another probe"
    fitted(source, 16, None)
    assert Thumbnail.seen == 4 * count

    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="is damaged"):
        fitted(source, 16, tmp_path)


def test_sets_that_cannot_teach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        fitted(str(tmp_path / "nowhere"), 16, None)


def test_a_set_of_other_classes(image_shards: Path) -> None:
    for classes in (("left", "other"), ("right", "left"), ("left", "right", "more")):
        with pytest.raises(ValueError, match="classifier_data=.* differ in classes"):
            fitted_probe(str(image_shards / "train"), 16, Thumbnail(), upside_down, ["a"], None, classes)
