"""Options of evaluations by token budget: common ones, and those of reconstructions and of generated images.

The callbacks `ReconstructionFID` and `GenerationFID` inherit them, so the fields here are the keys of `rfid` and `gfid`
in an experiment.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from flextok_pl.backbones.dreamsim import check_dreamsim
from flextok_pl.backbones.extractors import OFFLINE_EXTRACTOR, check_extractor
from flextok_pl.contracts import check_sampling, default_budgets
from flextok_pl.flow.decoding import UNGUIDED, Decoding, chosen_decoding

CACHE_DIR = "~/.cache/flextok_pl/statistics"
"""Folder that keeps statistics of real images and fitted probes between runs."""

PROBE = "probe"
"""Name of the classifier that is fitted to the data's own classes."""


@dataclass(eq=False)
class EvaluationOptions:
    """Options of every evaluation by token budget.

    Args:
        budgets: numbers of tokens to measure: a list, `all` for 1 to K, or null for the powers of two up to K.
        fit_budgets: budgets during a fit; null for the smallest, the middle and the largest of `budgets`.
        extractor: feature network: `effnet-lite0` or `effnet-lite2` (offline), `inception-v3-compat` (FID), `dinov2-*`
            or `clip-*`.
        weights: local file with the extractor's weights; null for the packaged or downloaded ones. For CLIP it must be
            OpenAI's own file, because it is a program.
        num_steps: steps of the decoder's solver; null for the tokenizer's own, or else 25.
        guidance: guidance of the decoder: `none`, `cfg` or `apg`; null for the tokenizer's own, or else none.
        guidance_scale: strength of the guidance, 1 for none; null for the tokenizer's own, or else 1.
        guidance_interval: (low, high]: flow times at which to guide, 1 being noise; null for all, [0, 1].
        decode_batch_size: images decoded at a time, of several budgets together; fewer need less memory. Null for a
            batch of one budget on a CPU, and on a GPU for at least two million pixels.
        every_n_validations: during a fit, measure in every n-th validation; 0 for never.
        max_samples: during a fit, measure about this many samples, a fixed choice by key; null for all.
        seed: seed of tokens, noise and the kernel distance's subsets.
        grid_samples: rows of the grid picture, a fixed choice.
        output_dir: folder for the results; null for the trainer's log directory.
        cache_dir: folder that keeps statistics of real images between runs, under a hash of data and extractor; null
            keeps none. Needs a data module with `data_hash(split)`.
        save_every_minutes: how often a test, or a validation outside a fit, saves its state in `cache_dir`. A killed
            one resumes from there when started again. Null for never.
        every_n_epochs: the former name of `every_n_validations`.

    Raises:
        ValueError: an option is out of range, or names something that does not exist.
    """

    name: ClassVar[str]
    """Name of the group of options, and of the files of results."""
    free: ClassVar[tuple[str, ...]] = ("output_dir", "save_every_minutes", "decode_batch_size")
    """Options that may change when a killed evaluation resumes."""

    budgets: list[int] | Literal["all"] | None = None
    fit_budgets: list[int] | None = None
    extractor: str = OFFLINE_EXTRACTOR
    weights: Path | str | None = None
    num_steps: int | None = None
    guidance: Literal["none", "cfg", "apg"] | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    decode_batch_size: int | None = None
    every_n_validations: int = 1
    max_samples: int | None = 256
    seed: int = 0
    grid_samples: int = 8
    output_dir: Path | str | None = None
    cache_dir: Path | str | None = CACHE_DIR
    save_every_minutes: float | None = 5.0
    every_n_epochs: int | None = None

    def __post_init__(self) -> None:
        check_extractor(self.extractor, self.weights)
        for name, given in (("budgets", self.budgets), ("fit_budgets", self.fit_budgets)):
            if isinstance(given, list) and (not given or min(given) < 1 or len(set(given)) < len(given)):
                raise ValueError(f"{name}={given} must be different positive numbers of tokens")
        if isinstance(self.budgets, str) and self.budgets != "all":
            raise ValueError(f"budgets={self.budgets!r} must be a list of numbers, 'all' or null")
        self.require_positive("max_samples", "grid_samples", "decode_batch_size")
        if self.save_every_minutes is not None and not self.save_every_minutes >= 0:
            raise ValueError(f"save_every_minutes={self.save_every_minutes} must be at least 0, or null for never")
        if self.decoding_of(None).guidance == "none" and self.guidance_scale not in (None, 1.0):
            raise ValueError(
                f"guidance_scale={self.guidance_scale} has no effect with guidance='none'; choose cfg or apg"
            )
        self.every_n_validations = validations_between(self.every_n_validations, self.every_n_epochs)

    def require_positive(self, *names: str) -> None:
        """Refuse given numbers below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def decoding_of(self, tokenizer: Any) -> Decoding:
        """The decoding of a tokenizer: by these options, or else the tokenizer's own."""
        given = {each.name: getattr(self, each.name) for each in fields(Decoding) if each.name != "solver"}
        return chosen_decoding(getattr(tokenizer, "config", None), UNGUIDED, **given)

    @property
    def cache_folder(self) -> Path | None:
        """The folder of `cache_dir`."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """The options that must not change when a killed evaluation resumes."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in self.free}

    def budgets_up_to(self, num_registers: int, in_fit: bool) -> list[int]:
        """The budgets to measure for a tokenizer with K registers, in ascending order."""
        all_budgets = list(range(1, num_registers + 1)) if self.budgets == "all" else self.budgets
        grid = sorted(all_budgets or default_budgets(num_registers))
        for_fit = sorted(self.fit_budgets or {grid[0], grid[len(grid) // 2], grid[-1]})
        for option, chosen in (("budgets", grid), ("fit_budgets", for_fit if in_fit else [0])):
            if chosen[-1] > num_registers:
                raise ValueError(
                    f"{self.name}.{option} holds {chosen[-1]}, but the tokenizer has {num_registers} tokens; choose "
                    "from 1 to that"
                )
        return for_fit if in_fit else grid


@dataclass(eq=False)
class ReconstructionOptions(EvaluationOptions):
    """Options of an evaluation of reconstructions.

    Args:
        lpips: true for LPIPS with downloaded AlexNet weights, or a path to them; needs images of 32 px or more.
        dreamsim: `ensemble` for DreamSim as in its paper, or another network of the package `dreamsim`; null for none.
        dreamsim_weights: folder with its unpacked weights; null for the downloaded ones.
        num_seeds: number of seeds to decode from outside a fit. Above 1 the pixels' mean variance over them is
            measured; all other metrics use the first.
    """

    name: ClassVar[str] = "rfid"

    lpips: bool | Path | str = False
    dreamsim: str | None = None
    dreamsim_weights: Path | str | None = None
    num_seeds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_seeds")
        check_dreamsim(self.dreamsim, self.dreamsim_weights)


@dataclass(eq=False)
class GenerationOptions(EvaluationOptions):
    """Options of an evaluation of generated images.

    Args:
        reference: `.npz` file with `mu` and `sigma` of real images, or with pictures as `arr_0`, or both, as guided
            diffusion publishes for ImageNet; null for the real images of the split. Statistics are for the Frechet
            distance, pictures for all other metrics.
        conditions: `balanced` takes class i, i + 1, ... in turn; `data` takes each real image's class or caption.
            Captions always come from the data.
        num_samples: images to generate for balanced classes or without conditions; null for as many as there are real
            ones.
        batch_size: images generated at a time.
        cfg_scale: guidance of the prior, 1 for none: a number, or numbers to interpolate over the token positions.
        temperature: temperature of the prior.
        top_k: draw from the k most likely tokens; null for all.
        top_p: draw from the fewest most likely tokens that together have this probability; null for all.
        classifier: judge of whether an image shows its class: `probe`, a linear classifier fitted to the extractor's
            features of `classifier_data` and of its reconstructions, or a timm model with the data's classes; null for
            none.
        classifier_data: shard set of real images with classes, for the probe.
        classifier_weights: local weights file of a timm classifier.
        clip: Hub id or folder of a CLIP model, to score images against captions; null for none.
        shown: conditions of the grid picture's rows: class numbers, class names, or texts; null for evenly spread
            classes, or for the first captions.
        images_dir: folder for the generated images outside a fit, with a subfolder for each budget; null for none. They
            are PNG files named after their keys, which `flextok fid` and other evaluators read.
    """

    name: ClassVar[str] = "gfid"

    reference: Path | str | None = None
    conditions: Literal["balanced", "data"] = "balanced"
    num_samples: int | None = None
    batch_size: int = 64
    cfg_scale: float | list[float] = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    classifier: str | None = None
    classifier_data: str | None = None
    classifier_weights: Path | str | None = None
    clip: Path | str | None = None
    shown: list[int | str] | None = None
    images_dir: Path | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditions not in ("balanced", "data"):
            raise ValueError(f"conditions={self.conditions!r} must be 'balanced' or 'data'")
        self.require_positive("num_samples", "batch_size")
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_classifier(self.classifier, self.classifier_data, self.classifier_weights)
        if self.reference is not None and Path(self.reference).suffix != ".npz":
            raise ValueError(
                f"reference={str(self.reference)!r} must be a .npz file; to measure against other images, evaluate a "
                "split of them and leave reference out"
            )


def check_classifier(classifier: str | None, classifier_data: str | None, weights: Path | str | None) -> None:
    """Refuse a probe without data, data without a probe, and weights without a timm classifier."""
    if (classifier == PROBE) != (classifier_data is not None):
        raise ValueError(
            f"classifier={classifier!r} and classifier_data={classifier_data!r}: a probe needs real images with "
            "classes, and other classifiers take none"
        )
    if weights is not None and classifier in (None, PROBE):
        raise ValueError(
            f"classifier_weights={str(weights)!r} has no effect with classifier={classifier!r}: name the timm model of "
            "the weights as classifier, or leave classifier_weights out"
        )


def validations_between(every_n_validations: int, every_n_epochs: int | None) -> int:
    """The value of `every_n_validations`, or of its former name."""
    if every_n_epochs is not None:
        warnings.warn(
            f"every_n_epochs={every_n_epochs} is now called every_n_validations, and counts validations; rename it",
            FutureWarning,
            stacklevel=3,
        )
        every_n_validations = every_n_epochs
    if every_n_validations < 0:
        raise ValueError(f"every_n_validations={every_n_validations} must be at least 0")
    return every_n_validations
