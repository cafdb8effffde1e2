"""Evaluate generated images at several token budgets: distances to real ones, scores, agreement with the condition.

All K tokens of a sample are generated once. Its image at a budget is decoded from the first of them, because a prefix
of a sample is a sample. Tokens and noise depend on the seed and the sample's key only, so results do not depend on
batch size or ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor
from tqdm import trange

from flextok_pl.backbones.classifier import TimmClassifier
from flextok_pl.backbones.clip_score import CLIPScore
from flextok_pl.contracts import GenerationModule, ImageSize, PositionScale
from flextok_pl.data.conditions import class_index
from flextok_pl.distributed import all_agree, rank, world_size
from flextok_pl.evaluation.budget_evaluation import BudgetEvaluation, Context, stacked
from flextok_pl.evaluation.generation_statistics import Classifier, GenerationStatistics
from flextok_pl.evaluation.image_set import ImageSet
from flextok_pl.evaluation.options import PROBE, GenerationOptions
from flextok_pl.evaluation.pictures import image_grid, save_png
from flextok_pl.evaluation.probe import tokenizer_probe
from flextok_pl.keys import sample_generators
from flextok_pl.metrics.feature_set import POOL_SIZE, FeatureSet
from flextok_pl.metrics.images import to_uint8


class Prompt(NamedTuple):
    """The condition and the key of one generated image."""

    key: str  # seeds the sample
    label: int = -1  # class of the condition, -1 for none
    text: str = ""  # caption of the condition
    metadata: Mapping[str, Any] = MappingProxyType({})  # other facts of its source; not used here


class GenerationEvaluation(BudgetEvaluation):
    """An evaluation of generated images; see `BudgetEvaluation`."""

    heading: ClassVar[str] = "generated images"
    picture: ClassVar[str] = "gfid_grid.png"
    tag: ClassVar[str] = "generated/"
    saved: ClassVar[tuple[str, ...]] = ("ids", "rows", "prompts")

    options: GenerationOptions
    statistics: GenerationStatistics[int]
    prompts: list[tuple[str, int, str]]  # those still to generate, except those that come with the batches

    def __init__(self, options: GenerationOptions, device: torch.device | str = "cpu") -> None:
        super().__init__(options, device)
        self.classifier: Classifier | None = None  # a probe is fitted by the first start, and for another tokenizer
        self._probe_of: tuple[Any, ...] | None = None
        if options.classifier not in (None, PROBE):
            self.classifier = TimmClassifier(options.classifier, options.classifier_weights)
        self.clip = None if options.clip is None else CLIPScore(options.clip)
        self.reference = None if options.reference is None else ImageSet(str(options.reference), self.extractor)

    def start(self, model: GenerationModule, context: Context) -> None:
        """See `BudgetEvaluation`; the model is a prior with the tokenizer that decodes its tokens."""
        options, module = self.options, model
        self.module = module
        if self.clip is not None and module.condition_kind != "text":
            raise ValueError(
                f"clip={str(options.clip)!r} scores images against captions, but the prior's condition is "
                f"{module.condition_kind!r}: leave clip out, or evaluate a prior of texts"
            )
        self._has_classes = module.condition_kind == "class"
        self._asks_for_data = module.condition_kind == "text" or (self._has_classes and options.conditions == "data")
        num_made = self._number_to_make(context)
        if self._has_classes:
            self._shown({})  # raises for unknown classes
        if options.classifier_data is not None:
            learns_from = (module.reconstructor, context.image_size, tuple(module.class_names))
            if learns_from != self._probe_of:
                self.classifier = self._fitted_probe(options.classifier_data, context.image_size)
                self._probe_of = learns_from
        judge, clip = self.classifier, self.clip
        if judge is not None and self._has_classes and judge.num_classes != module.num_classes:
            raise ValueError(
                f"classifier={options.classifier!r} has {judge.num_classes} classes, but the prior has "
                f"{module.num_classes}: their numbers mean different classes; give a classifier of the prior's classes"
            )
        reference, reference_facts = self._reference_features
        facts = {
            "conditions": options.conditions,
            "cfg_scale": options.cfg_scale,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "classifier": None if judge is None else judge.name,
            "classifier_data": options.classifier_data,
            "classifier_weights_hash": getattr(judge, "weights_hash", None),
            "clip": None if clip is None else str(options.clip),
            "clip_weights_hash": None if clip is None else clip.weights_hash,
            **reference_facts,
        }
        mine = range(rank(), num_made or 0, world_size())
        self.prompts = [balanced_prompt(i, module.num_classes)[:3] for i in mine]
        self._start(module.reconstructor, context, facts, num_made, reference)
        if reference is not None:
            self.statistics.check_size(reference_facts["reference"]["image_size"])
        self._folder = None if options.images_dir is None or context.in_fit else Path(options.images_dir).expanduser()
        # All processes ask, though not each has finished samples of the evaluation that it resumes.
        if self._folder is not None and all_agree(not self.ids):
            written = any(self._folder.glob("k=*/*.png"))
            if not all_agree(not written):
                raise ValueError(
                    f"images_dir={str(self._folder)!r} holds images of an earlier evaluation, which would mix with the "
                    "new ones: name another folder, or remove it"
                )

    def _number_to_make(self, context: Context) -> int | None:
        """How many images to generate over all processes; None for one for each real one."""
        options, expected = self.options, context.num_samples
        if self._asks_for_data:
            if options.num_samples is not None:
                raise ValueError(
                    f"num_samples={options.num_samples} is for balanced classes; conditions of the data give one image "
                    "for each real one: leave it out"
                )
            return None
        if expected < world_size():
            raise ValueError(
                f"the {context.split} set has {expected} samples, but each of the {world_size()} processes needs one "
                "to start: use fewer devices, or a larger set"
            )
        total = options.num_samples or expected
        return min(total, options.max_samples) if context.in_fit and options.max_samples else total

    def _fitted_probe(self, source: str, image_size: ImageSize | None) -> Classifier:
        """The probe, which has learnt the look of the tokenizer's images, decoded like generated ones."""
        if image_size is None:
            raise ValueError("classifier='probe' needs images of one size, but the context states none")
        options, tokenizer, names = self.options, self.module.reconstructor, self.module.class_names
        where = (options.decoding_of(tokenizer), options.seed, options.cache_folder, names)
        return tokenizer_probe(source, image_size, self.extractor, tokenizer, *where)

    @cached_property
    def _reference_features(self) -> tuple[FeatureSet | None, dict[str, Any]]:
        """Features of the reference, if there is one, and its facts for records."""
        if self.reference is None:
            return None, {}
        share = min(1.0, POOL_SIZE / max(1, self.reference.num_pictures))
        statistics = GenerationStatistics[int]([], self.extractor, real_pool_fraction=share)
        facts = self.reference.add_to(statistics, "reference")
        return statistics.real, {"reference": {**facts, "image_size": statistics.image_size}}

    def _statistics(self, pool_fraction: float, real: FeatureSet | None) -> GenerationStatistics[int]:
        num_made = self.num_made or self.context.num_samples * self.fraction
        pool = min(1.0, POOL_SIZE / num_made)
        return GenerationStatistics(
            self.budgets, self.extractor, pool, self.classifier, real, self.clip, real_pool_fraction=pool_fraction
        )

    def _measure(self, batch: Mapping[str, Any]) -> None:
        if batch["key"]:
            self.statistics.update_real(to_uint8(batch["image"]), batch["key"])
        if self._asks_for_data:
            self.prompts += self._prompts_of(batch)
        if rank() == 0 and not self.rows and (shown := self._shown(batch)):
            images_of = self._images([prompt for _, prompt in shown], self.columns)
            drawn = {budget: pixels.cpu() for budget, pixels in images_of}
            for i, (name, _) in enumerate(shown):
                self.rows.append((i, name, {budget: pixels[i] for budget, pixels in drawn.items()}))
        size = self.options.batch_size
        parts = -(-len(self.prompts) // size)
        for _ in trange(parts, desc="generating", unit="batch", leave=False, disable=parts < 2 or rank() > 0):
            part = [Prompt(*entry) for entry in self.prompts[:size]]
            keys, labels = [prompt.key for prompt in part], torch.tensor([prompt.label for prompt in part])
            texts = [prompt.text for prompt in part] if self.module.condition_kind == "text" else None
            for budget, images in self._images(part, self.budgets):
                self.statistics.update_generated(budget, images, keys, labels, texts)
                if self._folder is not None:
                    for key, pixels in zip(keys, images.cpu(), strict=True):
                        save_png(pixels, self._folder / f"k={budget:03d}" / f"{quote(key, safe=' ')}.png")
            self.prompts = self.prompts[size:]
            self._save_if_due()
            self.context.pause()

    def _images(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Generate tokens once and decode them at each budget: yields the budget and (B, 3, H, W) uint8."""
        options, keys = self.options, [prompt.key for prompt in prompts]
        sampling = (options.cfg_scale, options.temperature, options.top_k, options.top_p)
        tokens = generate_tokens(self.module, prompts, options.seed, *sampling)
        return self._decoded(tokens, keys, budgets, options.seed)

    def _prompts_of(self, batch: Mapping[str, Any]) -> list[tuple[str, int, str]]:
        """One prompt for each real sample of a batch, of its class or its caption."""
        kind = self.module.condition_kind
        needed = "label" if kind == "class" else "text"
        if needed not in batch:
            raise ValueError(
                f"conditions of the data need a {needed} in each sample; these shards hold {sorted(batch)}"
            )
        keys = batch["key"]
        labels = batch["label"].tolist() if "label" in batch else [-1] * len(keys)
        texts = batch["text"] if kind == "text" else [""] * len(keys)
        return list(zip(keys, labels, texts, strict=True))

    def _shown(self, batch: Mapping[str, Any]) -> list[tuple[str, Prompt]]:
        """Name and prompt of the grid picture's rows, which are the same at every validation."""
        options, module = self.options, self.module
        if module.condition_kind == "none":
            return [("", Prompt(f"row {i}")) for i in range(options.grid_samples)]
        if module.condition_kind == "text":
            captions = options.shown or [text for *_, text in self._prompts_of(batch)][: options.grid_samples]
            return [(str(text), Prompt(f"row {i}", text=str(text))) for i, text in enumerate(captions)]
        classes, names = module.num_classes, module.class_names
        rows = min(options.grid_samples, classes)
        try:
            shown = options.shown or [i * classes // rows for i in range(rows)]
            labels = [class_index(entry, names, classes) for entry in shown]
        except ValueError as error:
            raise ValueError(f"gfid.shown={options.shown}: {error}") from error
        return [(names[n] if names else f"class {n}", Prompt(f"row {i}", n)) for i, n in enumerate(labels)]

    def _pictures(self) -> dict[str, Tensor]:
        rows = self._rows_of_all(len(self.rows) or 1)
        return {self.picture: image_grid(stacked(rows, self.columns), [name for _, name, _ in rows])}

    def _measured(self) -> str:
        real = f"{self.statistics.real.statistics.count} real ones of {self.context.split}"
        reference = real if self.options.reference is None else f"reference {self.options.reference}"
        return f"{self.statistics.num_images} generated images, {reference}, cfg {self.options.cfg_scale}"


def generate_tokens(
    module: GenerationModule,
    prompts: Sequence[Prompt],
    seed: int,
    cfg_scale: PositionScale = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """All K tokens for each prompt, (B, K), drawn by its key and the seed."""
    generators = sample_generators([prompt.key for prompt in prompts], seed, "tokens")
    condition = as_condition(module.condition_kind, prompts)
    return module.generate_tokens(condition, cfg_scale, temperature, top_k, top_p, generators)


def as_condition(kind: Literal["class", "text", "none"], prompts: Sequence[Prompt]) -> Tensor | list[str] | None:
    """The condition for a prior of this kind: (B,) classes, or B texts."""
    if kind == "class":
        return torch.tensor([prompt.label for prompt in prompts])
    return [prompt.text for prompt in prompts] if kind == "text" else None


def balanced_prompt(number: int, num_classes: int) -> Prompt:
    """The prompt of the image of this number, with classes in turn; without a class if there are none."""
    classes = max(1, num_classes)
    key = f"class {number % classes} sample {number // classes}"
    return Prompt(key, number % classes if num_classes else -1)
