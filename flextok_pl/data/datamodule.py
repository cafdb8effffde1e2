"""The Lightning data module for image, latent and token shards."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from flextok_pl.contracts import Batch, checked_size, height_width
from flextok_pl.data.buckets import Shape, checked_shapes, name_of
from flextok_pl.data.epoch_loader import EpochLoader
from flextok_pl.data.samples import Collate, Decoder
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.data.shards.sources import load_indices, require_same_classes, require_same_kind, require_same_origin
from flextok_pl.data.stream import CachedBatches, EpochPlan, EpochStream, ShardSet, StreamedBatches
from flextok_pl.data.transforms import DEFAULT_AUGMENTATION, Augmentation, check_channels, crop_name, enlarges
from flextok_pl.distributed import rank, world_size
from flextok_pl.progress import announced, say

Split = Literal["train", "val", "test"]


@dataclass(eq=False, repr=False)
class ShardDataModule(pl.LightningDataModule):
    """Batches from shard sets that `flextok data` wrote.

    The fields in the sets' indices decide what a batch holds; see `flextok_pl.contracts.Batch`. Give a set as its
    folder, a pattern of folders or tar files (`*`, `{a,b}`), a URL (`https://`, `s3://`, ...), a command
    (`pipe:COMMAND {name}`), or a list of these.

    Args:
        train: shard set(s) to train on.
        train_weights: shares of the entries of the list `train` in an epoch; null takes all samples once. They do not
            change the length of an epoch; an entry that runs out starts again in a new order.
        val: shard set(s) to validate on.
        test: shard set(s) to test on; default `val`.
        image_size: side in pixels, or [height, width], of the images in a batch, or of those that latents were made
            from.
        batch_size: samples per batch and process in training.
        eval_batch_size: in evaluation; default `batch_size`.
        num_workers: loader processes per training process; 0 loads in the training process itself.
        seed: seed of order and augmentation.
        augmentation: random changes of training images; null for the plain centre crop. Latents and tokens do not
            change.
        shuffle_buffer: samples, of several shards, that a training stream permutes together; a larger number costs no
            memory. Unused with `cache_in_memory`.
        drop_last: leave out the training samples that do not fill a batch on every process.
        val_limit: validate on this many samples, evenly spread over the set.
        cache_in_memory: decode the sets once and keep them in memory; for small sets, such as the demo set and latents.
        cache_dir: folder that keeps the shards of remote sets; null downloads each one again whenever it is read.
        fast_decode: in training, decode JPEG pictures at a fraction of their size that is still twice the size needed;
            evaluation never does.
        on_error: for a broken training sample, `raise` an error, or `skip` it, warn and count it; evaluation always
            raises.
        max_skipped: broken samples that a process skips before it stops with an error.
        verify_checksums: read all shards and compare their checksums before the first epoch.
        pin_memory: copy batches to page-locked memory; default with a GPU.
        lanes: parts of the row of shards from which a training batch takes samples in turn. They decide the order,
            which does not depend on the number of processes. With one lane each process reads all shards; with as many
            lanes as processes, or a multiple, only its own. Unused with `cache_in_memory`.
        labels: give the classes of samples; with false a list may hold sets whose classes differ.
        shapes: several [height, width] in pixels for training, instead of `image_size`. Each picture is resized to
            cover the shape with the nearest aspect ratio, and cropped to it. A batch has one shape, the same on all
            processes.
        eval_shapes: use these shapes for evaluation too; false uses `image_size`.
        channels: channels of pictures: 3, or 1 for grey, or 4 for colour with opacity.
    """

    train: str | list[str] | None = None
    val: str | list[str] | None = None
    test: str | list[str] | None = None
    image_size: int | tuple[int, int] = 256
    batch_size: int = 64
    eval_batch_size: int | None = None
    num_workers: int = 2
    seed: int = 0
    augmentation: Augmentation | None = DEFAULT_AUGMENTATION
    shuffle_buffer: int = 2000
    drop_last: bool = True
    val_limit: int | None = None
    cache_in_memory: bool = False
    verify_checksums: bool = False
    pin_memory: bool | None = None
    train_weights: list[float] | None = None
    cache_dir: str | None = None
    fast_decode: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    max_skipped: int = 100
    lanes: int = 1
    labels: bool = True
    shapes: list[tuple[int, int]] | None = None
    eval_shapes: bool = False
    channels: int = 3

    def __post_init__(self) -> None:
        super().__init__()
        self.sources = {"train": self.train, "val": self.val, "test": self.test or self.val}
        self.image_size = checked_size(self.image_size)
        self._shapes = None if self.shapes is None else checked_shapes(self.shapes)
        if self.eval_shapes and self.shapes is None:
            raise ValueError("eval_shapes=true needs shapes, a list of [height, width]")
        check_channels(self.channels)
        minima = {"batch_size": 1, "eval_batch_size": 1, "lanes": 1}
        for name, least in {**minima, "num_workers": 0, "shuffle_buffer": 0, "max_skipped": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.val_limit is not None and self.val_limit < 1:
            raise ValueError(f"val_limit={self.val_limit} must be at least 1, or null for all samples")
        if self.train_weights is not None:
            entries = len(self.train) if isinstance(self.train, list) else int(self.train is not None)
            if len(self.train_weights) != entries or not all(weight > 0 for weight in self.train_weights):
                raise ValueError(
                    f"train_weights={self.train_weights} must be one positive number for each of the {entries} sets in "
                    "train"
                )
        if all(source is None for source in self.sources.values()):
            raise ValueError("give at least one of train, val and test: the folder of a shard set")
        if empty := [name for name, source in self.sources.items() if source == []]:
            raise ValueError(f"{empty[0]}=[] names no set: give the folder of a shard set, or null for none")
        self._used: tuple[Split, ...] = ("train", "val", "test")  # those of a stage, once it is set up
        self._sets: dict[str, ShardSet] = {}
        self._streams: dict[str, EpochStream] = {}
        self._skipped = torch.zeros(max(1, self.num_workers), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self.epoch = 0

    def shard_set(self, split: Split) -> ShardSet:
        """The shards of a split; checks them at the first call."""
        source = self.sources[split]
        if source is None:
            raise ValueError(f"this data module has no {split} set; give data.{split} the folder of a shard set")
        if split not in self._sets:
            with announced(f"reading the index of data.{split}"):
                data = self._load(split, source)
            for index in data.indices:
                self._check(index, split)
            for loaded in self._sets.values():
                require_same_origin(loaded.indices[0], data.indices[0])
            self._sets[split] = data
            if self._shapes_of(split) is not None:
                counts = (f"{bucket.name}: {sum(bucket.counts):,}" for bucket in data.buckets)
                say(f"samples of data.{split} by shape: {', '.join(counts)}")
        return self._sets[split]

    def _load(self, split: Split, source: str | list[str]) -> ShardSet:
        shapes = self._shapes_of(split)
        if split != "train" or self.train_weights is None:
            return ShardSet(load_indices(source, self.cache_dir, self.labels), shapes=shapes)
        indices: list[ShardIndex] = []
        weights: list[float] = []
        for entry, weight in zip(source if isinstance(source, list) else [source], self.train_weights, strict=True):
            found = load_indices(entry, self.cache_dir, self.labels)
            indices += found
            total = sum(index.num_samples for index in found)
            weights += [weight * index.num_samples / total for index in found]
        for other in indices[1:]:
            require_same_kind(indices[0], other)
        return ShardSet(indices, weights, shapes)

    def _shapes_of(self, split: Split) -> tuple[Shape, ...] | None:
        """The shapes of a split's samples; None for `image_size`."""
        return self._shapes if split == "train" or self.eval_shapes else None

    def _check(self, index: ShardIndex, split: Split) -> None:
        made_for, shapes = index.image_size, self._shapes_of(split)
        if "image" not in index.fields and shapes is None:
            if "shapes" in index.arguments and "tokens" not in index.fields:
                remedy = f"shapes={index.arguments.get('shapes')}" if self.shapes is None else "eval_shapes=true"
                raise ShardError(f"{index.where} was made in several shapes; set {remedy}, or write it again")
            if made_for is not None and made_for != self.image_size:
                raise ShardError(
                    f"{index.where} was made from images of {made_for} px, but image_size={self.image_size}; set "
                    f"image_size={made_for} or write it again"
                )
        if "image" in index.fields and made_for is not None:
            large = [each for each in shapes or [height_width(self.image_size)] if enlarges(made_for, each)]
            if large:
                option = f"image_size={self.image_size}" if shapes is None else f"shape {name_of(large[0])}"
                warnings.warn(f"{index.where} holds images of {made_for} px, which {option} enlarges", stacklevel=3)
        if (dtype := index.provenance.get("compute_dtype", "float32")) != "float32":
            say(
                f"{index.where} was computed in {dtype} (compute_dtype of flextok data); evaluations compute in float32"
            )
        if self.verify_checksums:
            index.verify()

    def num_samples(self, split: Split) -> int:
        """Number of samples in one pass over the split, over all processes; assert it before you report a metric."""
        total = self.shard_set(split).num_samples
        if split == "train" and self.drop_last:
            together = self.batch_size * self._position()[1]
            return sum(each.length // together * together for each in self.shard_set(split).mixtures())
        return min(total, self.val_limit or total) if split == "val" else total

    def data_hash(self, split: Split) -> str:
        """Hash of what a pass over the split sees: contents of the shards, picture shapes, number of samples."""
        shards = [shard.sha256 for index in self.shard_set(split).indices for shard in index.shards]
        weights = [self.train_weights] if split == "train" and self.train_weights else []
        shapes = self._shapes_of(split) or self.image_size
        channels = [] if self.channels == 3 else [{"channels": self.channels}]
        seen = [shards, shapes, self.num_samples(split), *weights, *channels]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    @property
    def crop(self) -> str:
        """The crop of evaluation pictures, in words."""
        if not self.eval_shapes or self._shapes is None:
            return crop_name(self.image_size)
        return f"largest centre window of the nearest of {', '.join(map(name_of, self._shapes))}, antialiased bicubic"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty for sets without classes."""
        return next((index.classes for index in self._first_indices()), ())

    def require_same_classes(self) -> None:
        """Check that the sets of a stage number the same classes alike, for a model of classes."""
        first, *others = self._first_indices()
        for other in others:
            require_same_classes(first, other)

    # Makers of the fields in a stage's sets, see `ShardIndex.maker`; None for sets without the field.
    autoencoder = property(lambda self: self._maker("latent"))
    teacher = property(lambda self: self._maker("teacher_features"))
    tokenizer = property(lambda self: self._maker("tokens"))
    text_encoder = property(lambda self: self._maker("text_states"))

    @property
    def skipped_samples(self) -> int | None:
        """Broken training samples that this process and its workers have left out; None if they raise."""
        return int(self._skipped.sum()) if self.on_error == "skip" else None

    def _maker(self, field: str) -> Mapping[str, Any] | None:
        return next((index.maker(field) for index in self._first_indices() if field in index.fields), None)

    def _first_indices(self) -> Iterator[ShardIndex]:
        return (self.shard_set(split).indices[0] for split in self._used if self.sources[split] is not None)

    def setup(self, stage: str) -> None:
        """Check the shards that a stage needs and use only these from then on; called by Lightning."""
        needed: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        self._used = needed.get(stage, ("test",))
        for split in self._used:
            if self.sources[split] is not None:
                self.shard_set(split)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass over the training set; needed, and used, only without a Trainer."""
        self.epoch = epoch

    def train_dataloader(self) -> DataLoader[Batch]:
        """Loader of the training set."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Loader of the validation set; an empty list if there is none."""
        return self._loader("val") if self.sources["val"] is not None else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Loader of the test set."""
        return self._loader("test")

    def predict_dataloader(self) -> Iterable[Batch]:
        """Loader of the test set, for predictions."""
        return _Batches(self._loader("test"))

    def _loader(self, split: Split) -> DataLoader[Batch]:
        # Lightning's advice does not apply: the stream itself splits over ranks and workers.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck")
        pin_memory = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        return EpochLoader(self, self._stream(split), self.num_workers, pin_memory)

    def _stream(self, split: Split) -> EpochStream:
        plan = self._plan(split)  # another one for a Trainer with other processes
        if split not in self._streams or self._streams[split].plan != plan:
            self._streams[split] = self._make_stream(split, plan)
        return self._streams[split]

    def _plan(self, split: Split) -> EpochPlan:
        train, (rank, world_size) = split == "train", self._position()
        return EpochPlan(
            batch_size=self.batch_size if train else self.eval_batch_size or self.batch_size,
            train=train,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            drop_last=self.drop_last,
            limit=self.val_limit if split == "val" else None,
            lanes=self.lanes,
        )

    def _make_stream(self, split: Split, plan: EpochPlan) -> EpochStream:
        data, train, world_size = self.shard_set(split), plan.train, plan.world_size
        if not train and (count := sum(map(len, data.chosen(plan.limit)))) < world_size:
            raise ValueError(
                f"data.{split} gives {count} samples to {world_size} processes, and each needs one: give more samples, "
                f"or fewer devices{'' if plan.limit is None else f', or raise val_limit={plan.limit}'}"
            )
        for bucket, mixture in zip(data.buckets, data.mixtures(), strict=True):
            if plan.train and plan.drop_last and mixture.length < plan.together:
                what = f"shape {bucket.name} of the training set" if bucket.name else "the training set"
                raise ValueError(
                    f"{what} has {mixture.length} samples, fewer than batch_size={self.batch_size} on {world_size} "
                    f"processes need; lower batch_size, {'leave the shape out, ' if bucket.name else ''}or set "
                    "drop_last=false"
                )
        collate = Collate(self.image_size, self.augmentation if train else None, self.seed)
        decoder = Decoder(channels=self.channels)
        if train:
            window = 1.0 if self.augmentation is None else self.augmentation.smallest_window
            decoder.smallest_window = window if self.fast_decode else None
            decoder.max_skipped = self.max_skipped if self.on_error == "skip" else None
            decoder.counts = self._skipped
        if self.cache_in_memory:
            with announced(f"reading the samples of data.{split} into memory"):
                return CachedBatches(data, collate, plan, decoder)
        return StreamedBatches(data, collate, plan, decoder, self.shuffle_buffer)

    def _position(self) -> tuple[int, int]:
        """(rank, world size)."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return rank(), world_size()


class _Batches:
    """A loader that Lightning uses unchanged: to predict, it would rebuild any `DataLoader`."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)
