"""Quality of generated images at every token budget, during a fit and in a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from urllib.parse import quote

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from tqdm import trange

from flextok_pl.backbones.classifier import TimmClassifier
from flextok_pl.backbones.clip_score import CLIPScore
from flextok_pl.backbones.extractors import OFFLINE_EXTRACTOR, FeatureExtractor
from flextok_pl.callbacks.budget_evaluation import BudgetEvaluation
from flextok_pl.callbacks.evaluation import split_size
from flextok_pl.contracts import GenerationModule, check_sampling, weights_hash
from flextok_pl.data.conditions import class_index
from flextok_pl.distributed import all_agree, gather_objects
from flextok_pl.evaluation.generation import Classifier, GenerationStatistics
from flextok_pl.evaluation.image_set import ImageSet, open_image_set
from flextok_pl.evaluation.pictures import image_grid, save_png
from flextok_pl.evaluation.probe import fitted_probe, probe_data
from flextok_pl.evaluation.running import Pass, first_rows
from flextok_pl.keys import sample_generators
from flextok_pl.metrics.feature_set import POOL_SIZE, FeatureSet
from flextok_pl.metrics.images import to_uint8
from flextok_pl.runtime import stop_if_preempted

PROBE = "probe"


class Wish(NamedTuple):
    """One image to generate.

    Attributes:
        key: seeds the sample.
        label: class that is asked for, -1 for none.
        text: caption that is asked for.
    """

    key: str
    label: int = -1
    text: str = ""


class GenerationFID(BudgetEvaluation[GenerationStatistics]):
    """Measure generated images at several token budgets: distances to real ones, scores, agreement with the condition.

    Works on any module with a prior that generates tokens and a tokenizer that decodes them. All K tokens of a sample
    are generated once; its image at a budget is decoded from the first of them, as a prefix of a sample is a sample.
    Tokens and noise depend on `seed` and the sample's key only, so results do not depend on batch size or ranks.

    `trainer.validate` and `trainer.test` measure the full grid and leave `gfid.json` (one record per number, with its
    protocol), `gfid.csv`, `gfid.png` and `gfid_grid.png`: fixed conditions and seeds, one row each, one column per
    budget. Validations of a fit measure less, for the logger and `gfid_fit/`.

    Args:
        budgets: numbers of tokens of the full grid: a list, `all` for 1 to K, or null for the powers of two up to K.
        fit_budgets: those measured during a fit; null for the smallest, the middle and the largest of `budgets`.
        extractor: feature network: `effnet-lite0` (offline), `inception-v3-compat` (gFID), `dinov2-*` or `clip-*`.
        weights: a local file with the extractor's weights; null for the packaged or downloaded ones. CLIP's is OpenAI's
            own file and no other, since it is a program.
        reference: a `.npz` file with `mu` and `sigma` of real images, or with pictures as `arr_0`, or both, as guided
            diffusion publishes for ImageNet; null for the real images of the split. Statistics serve the Frechet
            distance, pictures all else.
        conditions: `balanced`: class i, i + 1, ... in turn; `data`: for each real image one with its class or caption.
            Captions are always those of the data.
        num_samples: images to generate for balanced classes or without conditions; null for as many as are real.
        batch_size: images generated at a time.
        cfg_scale: guidance of the prior, 1 for none: a number, or numbers to interpolate over the token positions.
        temperature: of the prior's distribution.
        top_k: draw from the k most likely tokens; null for all.
        top_p: draw from the fewest most likely tokens that have this probability together; null for all.
        num_steps: steps of the decoder's solver.
        guidance: of the decoder: `none`, `cfg` or `apg`.
        guidance_scale: its scale; 1 is no guidance.
        classifier: judges whether an image shows its class: `probe`, a linear classifier that is fitted to the
            extractor's features of `classifier_data` and of its reconstructions, or a timm model whose classes are the
            data's; null for none.
        classifier_data: shard set of real images with classes, for the probe.
        classifier_weights: local weights file of a timm classifier.
        clip: Hub id or folder of a CLIP model, to score images against captions; null for none.
        shown: conditions of the picture's rows: class numbers, class names, or texts; null for classes evenly spread,
            or for the first captions.
        every_n_validations: during a fit, measure in every n-th validation; 0 for never.
        max_samples: during a fit, measure about this many samples; null for all.
        seed: of tokens, noise and the kernel distance's subsets.
        grid_samples: rows of the picture where `shown` does not say.
        output_dir: where files go; null for the trainer's log directory.
        images_dir: outside a fit, write each generated image there, into a folder for each budget: PNG files named
            after their keys, which `flextok fid` and other evaluators read; null for nowhere.
        cache_dir: where statistics of real images and probes are kept between runs; null for nowhere.
        save_every_minutes: how often a test, or a validation outside a fit, stores its state in `cache_dir`, where it
            goes on when it was killed and is started again; null for never.
        every_n_epochs: the former name of `every_n_validations`.

    Raises:
        ValueError: an option is out of range, or names what is not there.
    """

    stem: ClassVar[str] = "gfid"
    picture: ClassVar[str] = "gfid_grid.png"
    heading: ClassVar[str] = "generated images"
    tag: ClassVar[str] = "generated/"

    def __init__(
        self,
        budgets: list[int] | Literal["all"] | None = None,
        fit_budgets: list[int] | None = None,
        extractor: str = OFFLINE_EXTRACTOR,
        weights: Path | str | None = None,
        reference: Path | str | None = None,
        conditions: Literal["balanced", "data"] = "balanced",
        num_samples: int | None = None,
        batch_size: int = 64,
        cfg_scale: float | list[float] = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_steps: int = 25,
        guidance: Literal["none", "cfg", "apg"] = "none",
        guidance_scale: float = 1.0,
        classifier: str | None = None,
        classifier_data: str | None = None,
        classifier_weights: Path | str | None = None,
        clip: Path | str | None = None,
        shown: list[int | str] | None = None,
        every_n_validations: int = 1,
        max_samples: int | None = 256,
        seed: int = 0,
        grid_samples: int = 8,
        output_dir: Path | str | None = None,
        images_dir: Path | str | None = None,
        cache_dir: Path | str | None = "~/.cache/flextok_pl/statistics",
        save_every_minutes: float | None = 5.0,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(
            budgets,
            fit_budgets,
            extractor,
            weights,
            num_steps,
            guidance,
            guidance_scale,
            every_n_validations,
            max_samples,
            seed,
            grid_samples,
            output_dir,
            cache_dir,
            save_every_minutes,
            every_n_epochs,
        )
        if conditions not in ("balanced", "data"):
            raise ValueError(f"conditions={conditions!r} must be 'balanced' or 'data'")
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_sampling(temperature, top_k, top_p)
        if (classifier == PROBE) != (classifier_data is not None):
            raise ValueError(
                f"classifier={classifier!r} and classifier_data={classifier_data!r}: a probe needs real images with "
                "classes, another classifier none"
            )
        if reference is not None and Path(reference).suffix != ".npz":
            raise ValueError(
                f"reference={str(reference)!r} must be a .npz file; evaluate a split of other images to measure "
                "against those, and leave it out"
            )
        self.reference = reference
        self.images_dir = None if images_dir is None else Path(images_dir).expanduser()
        self.conditions, self.num_samples, self.batch_size = conditions, num_samples, batch_size
        self.cfg_scale, self.temperature, self.top_k, self.top_p = cfg_scale, temperature, top_k, top_p
        self.classifier, self.classifier_data = classifier, classifier_data
        self.classifier_weights, self.clip, self.shown = classifier_weights, clip, shown
        self._classifier: Classifier | None = None
        self._clip: CLIPScore | None = None
        self._reference_set: ImageSet | None = None
        self._reference: tuple[FeatureSet, dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks that measure, so that missing weights stop a run before it starts."""
        super().setup(trainer, pl_module, stage)
        if self._network is None:
            return
        if self.reference is not None and self._reference_set is None:
            self._reference_set = open_image_set(str(self.reference), self._network)
        if self.classifier is not None and self.classifier != PROBE and self._classifier is None:
            self._classifier = TimmClassifier(self.classifier, self.classifier_weights)
        if self.clip is not None and self._clip is None:
            self._clip = CLIPScore(self.clip)

    def _check_module(self, pl_module: LightningModule) -> None:
        _generator(pl_module)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse conditions, classes and processes, too, with which no images can be generated or judged."""
        super().check(trainer, pl_module)
        module, expected = _generator(pl_module), split_size(trainer, "val")
        if self._num_made(pl_module, expected, in_fit=True) is not None and expected < trainer.world_size:
            raise MisconfigurationException(
                f"the val set has {expected} samples, with which the {trainer.world_size} processes start to generate: "
                "use fewer devices, or a larger set"
            )
        if module.condition_kind == "class":
            try:
                self._shown(module, {})
            except ValueError as error:
                raise ValueError(f"gfid.shown={self.shown}: {error}") from error
        if self.classifier_data is not None:
            size = trainer.datamodule.image_size  # type: ignore[attr-defined]
            probe_data(self.classifier_data, size, module.class_names)
        self._check_classes(module)

    def _check_classes(self, module: GenerationModule) -> None:
        judge = self._classifier
        if judge is not None and module.condition_kind == "class" and judge.num_classes != module.num_classes:
            raise MisconfigurationException(
                f"classifier={self.classifier!r} tells {judge.num_classes} classes apart, and the prior knows "
                f"{module.num_classes}: their numbers mean different classes; give a classifier of the prior's classes"
            )

    def _start(
        self, trainer: Trainer, pl_module: LightningModule, split: Literal["val", "test"]
    ) -> Pass[GenerationStatistics]:
        module = _generator(pl_module)
        if self.classifier_data is not None and self._classifier is None:
            assert self._network is not None
            size = trainer.datamodule.image_size  # type: ignore[attr-defined]
            network = self._network.to(pl_module.device)
            reconstruct = partial(self._reconstruct, module, pl_module.device)
            self._classifier = fitted_probe(
                self.classifier_data, size, network, reconstruct, self._look(module), self.cache_dir, module.class_names
            )
        self._check_classes(module)
        running = super()._start(trainer, pl_module, split)
        if self.images_dir is not None and not running.in_fit and not running.resumed:
            written = any(self.images_dir.glob("k=*/*.png"))
            if not all_agree(not written, trainer.strategy.root_device):
                raise MisconfigurationException(
                    f"images_dir={str(self.images_dir)!r} holds images of an earlier evaluation, which would be taken "
                    "for this one's: name another folder, or remove it"
                )
        return running

    def _num_made(self, pl_module: LightningModule, chosen: float, in_fit: bool) -> int | None:
        if self._of_data(_generator(pl_module)):
            if self.num_samples is not None:
                raise MisconfigurationException(
                    f"num_samples={self.num_samples} is for balanced classes; with conditions of the data one image is "
                    "generated for each real one: leave it out"
                )
            return None
        total = self.num_samples or round(chosen)
        return min(total, self.max_samples) if in_fit and self.max_samples else total

    def _of_data(self, module: GenerationModule) -> bool:
        """Whether conditions are those of the real images."""
        return module.condition_kind == "text" or (module.condition_kind == "class" and self.conditions == "data")

    def _given_reference(self, network: FeatureExtractor) -> FeatureSet | None:
        images = self._reference_set
        if images is None:
            return None
        if self._reference is None:
            share = min(1.0, POOL_SIZE / max(1, images.num_pictures))
            statistics = GenerationStatistics([], network, real_pool_fraction=share)
            facts = images.add_to(statistics, "reference")
            self._reference = statistics.real, {**facts, "image_size": statistics.image_size}
        return self._reference[0]

    def _planned(self, trainer: Trainer, pl_module: LightningModule, running: Pass[GenerationStatistics]) -> list[Wish]:
        mine = range(trainer.global_rank, running.num_made or 0, trainer.world_size)
        return [balanced_wish(i, _generator(pl_module).num_classes) for i in mine]

    def _statistics(
        self,
        budgets: list[int],
        network: FeatureExtractor,
        num_made: float,
        real_pool_fraction: float,
        real: FeatureSet | None,
    ) -> GenerationStatistics:
        statistics = GenerationStatistics(
            budgets,
            network,
            min(1.0, POOL_SIZE / num_made),
            self._classifier,
            real,
            self._clip,
            real_pool_fraction=real_pool_fraction,
        )
        if self._reference is not None:
            statistics.check_size(self._reference[1]["image_size"])
        return statistics

    def _reconstruct(self, module: GenerationModule, device: torch.device, images: Tensor, keys: list[str]) -> Tensor:
        """The images after all tokens, decoded as generated ones are."""
        tokens = module.reconstructor.tokenize(images.to(device))
        return self._decode(module, tokens, module.reconstructor.num_registers, keys)

    def _look(self, module: GenerationModule) -> list[object]:
        """What decides how the tokenizer's images look."""
        network = module.reconstructor
        digest = weights_hash(network) if isinstance(network, nn.Module) else type(network).__name__
        return [digest, self.num_steps, self.guidance, self.guidance_scale, self.seed]

    def _decode(self, module: GenerationModule, tokens: Tensor, budget: int, keys: Sequence[str]) -> Tensor:
        return module.reconstructor.detokenize(
            tokens,
            num_tokens=budget,
            num_steps=self.num_steps,
            guidance=self.guidance,
            guidance_scale=self.guidance_scale,
            generator=sample_generators(keys, self.seed),
        )

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Mapping[str, Any],
        running: Pass[GenerationStatistics],
    ) -> None:
        module, keys = _generator(pl_module), batch["key"]
        if keys:
            running.statistics.update_real(to_uint8(batch["image"]), keys)
        if self._of_data(module):
            running.pending += _wishes_of(batch, module.condition_kind)
        if trainer.is_global_zero and not running.grid:
            self._draw_rows(module, batch, running)
        parts = -(-len(running.pending) // self.batch_size)
        quiet = parts < 2 or not trainer.is_global_zero
        for _ in trange(parts, desc="generating", unit="batch", leave=False, disable=quiet):
            part = [Wish(*entry) for entry in running.pending[: self.batch_size]]
            labels = torch.tensor([wish.label for wish in part])
            texts = [wish.text for wish in part] if module.condition_kind == "text" else None
            for budget, images in self._images(module, part, running.budgets).items():
                running.statistics.update_generated(budget, images, [w.key for w in part], labels, texts)
                if self.images_dir is not None and not running.in_fit:
                    _save(images, part, self.images_dir / f"k={budget:03d}")
            running.pending = running.pending[self.batch_size :]
            running.save_if_due()
            stop_if_preempted(trainer)

    def _images(self, module: GenerationModule, wishes: Sequence[Wish], budgets: Sequence[int]) -> dict[int, Tensor]:
        """One rollout, decoded at each budget: (B, 3, H, W) uint8."""
        keys = [wish.key for wish in wishes]
        condition: Tensor | list[str] | None = None
        if module.condition_kind == "class":
            condition = torch.tensor([wish.label for wish in wishes])
        elif module.condition_kind == "text":
            condition = [wish.text for wish in wishes]
        tokens = module.generate_tokens(
            condition,
            self.cfg_scale,
            self.temperature,
            self.top_k,
            self.top_p,
            sample_generators(keys, self.seed, "tokens"),
        )
        return {budget: to_uint8(self._decode(module, tokens, budget, keys)) for budget in budgets}

    def _draw_rows(
        self, module: GenerationModule, batch: Mapping[str, Any], running: Pass[GenerationStatistics]
    ) -> None:
        """The picture's rows, whose conditions and seeds are the same at every validation."""
        wishes = [Wish(f"row {i}", w.label, w.text) for i, w in enumerate(self._shown(module, batch))]
        if not wishes:
            return
        images = self._images(module, wishes, running.columns)
        for i, wish in enumerate(wishes):
            name = wish.text
            if module.condition_kind == "class":
                name = module.class_names[wish.label] if module.class_names else f"class {wish.label}"
            running.grid.append((i, name, {budget: pixels[i].cpu() for budget, pixels in images.items()}))

    def _shown(self, module: GenerationModule, batch: Mapping[str, Any]) -> list[Wish]:
        if module.condition_kind == "none":
            return [Wish("")] * self.grid_samples
        if module.condition_kind == "text":
            if self.shown is not None:
                return [Wish("", text=str(text)) for text in self.shown]
            return _wishes_of(batch, "text")[: self.grid_samples]
        classes = module.num_classes
        rows = min(self.grid_samples, classes)
        shown = self.shown or [i * classes // rows for i in range(rows)]
        return [Wish("", class_index(entry, module.class_names, classes)) for entry in shown]

    def _grid(self, done: Pass[GenerationStatistics]) -> Tensor:
        rows = first_rows([row for part in gather_objects(done.grid) for row in part], len(done.grid) or 1)
        columns = [(budget, torch.stack([shown[budget] for *_, shown in rows])) for budget in done.columns]
        return image_grid(columns, [name for _, name, _ in rows])

    def _protocol(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "cfg_scale": self.cfg_scale,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "classifier": None if self._classifier is None else self._classifier.name,
            "classifier_data": self.classifier_data,
            "classifier_weights_hash": getattr(self._classifier, "weights_hash", None),
            "clip": None if self._clip is None else str(self.clip),
            "clip_weights_hash": None if self._clip is None else self._clip.weights_hash,
            **({} if self._reference is None else {"reference": self._reference[1]}),
        }

    def _notes(self, done: Pass[GenerationStatistics]) -> tuple[str, dict[str, dict[str, Any]]]:
        real = f"{done.statistics.real.statistics.count} real ones of {done.split}"
        reference = real if self.reference is None else f"reference {self.reference}"
        measured = f"{done.statistics.num_images} generated images, {reference}"
        return f"{measured}, cfg {self.cfg_scale}", {}


def _save(images: Tensor, wishes: Sequence[Wish], folder: Path) -> None:
    """Write (B, 3, H, W) uint8 images, each under its key."""
    folder.mkdir(parents=True, exist_ok=True)
    for wish, pixels in zip(wishes, images, strict=True):
        save_png(pixels, folder / f"{quote(wish.key, safe=' ')}.png")


def balanced_wish(number: int, num_classes: int) -> Wish:
    """The image of this number when each class has its turn; without a class where there are none."""
    classes = max(1, num_classes)
    key = f"class {number % classes} sample {number // classes}"
    return Wish(key, number % classes if num_classes else -1)


def _generator(pl_module: LightningModule) -> GenerationModule:
    if not isinstance(pl_module, GenerationModule):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} generates no tokens, so it has no generated images to evaluate: use this "
            "callback with a PriorModule, and remove it otherwise (gfid: null)"
        )
    return pl_module


def _wishes_of(batch: Mapping[str, Any], kind: Literal["class", "text", "none"]) -> list[Wish]:
    """One wish per real sample of a batch.

    Raises:
        MisconfigurationException: it has no classes or captions.
    """
    needed = "label" if kind == "class" else "text"
    if needed not in batch:
        raise MisconfigurationException(
            f"conditions of the data need a {needed} in each sample; these shards hold {sorted(batch)}"
        )
    keys = batch["key"]
    labels = batch["label"].tolist() if "label" in batch else [-1] * len(keys)
    texts = batch["text"] if kind == "text" else [""] * len(keys)
    return [Wish(*entry) for entry in zip(keys, labels, texts, strict=True)]
