"""The options of an evaluation by token budget: those of any, and those of reconstructions and of generated images.

The callbacks `ReconstructionFID` and `GenerationFID` inherit them, so that the fields here are the keys of `rfid` and
`gfid` in an experiment.
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
"""Where statistics of real images and fitted probes are kept between runs."""

PROBE = "probe"
"""The classifier that is fitted to the data's own classes."""


@dataclass(eq=False)
class EvaluationOptions:
    """What every evaluation by token budget takes.

    Args:
        budgets: numbers of tokens of the full grid: a list, `all` for 1 to K, or null for the powers of two up to K.
        fit_budgets: those measured during a fit; null for the smallest, the middle and the largest of `budgets`.
        extractor: feature network: `effnet-lite0` or `effnet-lite2` (offline), `inception-v3-compat` (FID), `dinov2-*`
            or `clip-*`.
        weights: a local file with the extractor's weights; null for the packaged or downloaded ones. CLIP's is OpenAI's
            own file and no other, since it is a program.
        num_steps: steps of the decoder's solver; null for those that the tokenizer was made for, or else 25.
        guidance: of the decoder: `none`, `cfg` or `apg`; null for the tokenizer's own, or else none.
        guidance_scale: its scale; 1 is no guidance; null for the tokenizer's own, or else 1.
        guidance_interval: (low, high]: flow times at which to guide, 1 being noise; null for all of them, [0, 1].
        decode_batch_size: images decoded at a time, of several budgets together; fewer need less memory. Null for a
            batch of one budget on a CPU, and on a GPU for as many images as have two million pixels, if that is more.
        every_n_validations: during a fit, measure in every n-th validation; 0 for never.
        max_samples: during a fit, measure about this many samples, a fixed choice by key; null for all.
        seed: of tokens, noise and the kernel distance's subsets.
        grid_samples: rows of the grid picture, a fixed choice.
        output_dir: where files go; null for the trainer's log directory.
        cache_dir: where statistics of real images are kept between runs, under a hash of data and extractor; null for
            nowhere. Needs a data module with `data_hash(split)`.
        save_every_minutes: how often a test, or a validation outside a fit, stores its state in `cache_dir`, where it
            goes on when it was killed and is started again; null for never.
        every_n_epochs: the former name of `every_n_validations`.

    Raises:
        ValueError: an option is out of range, or names what is not there.
    """

    name: ClassVar[str]
    """Of the group of options, and of the files of results."""
    free: ClassVar[tuple[str, ...]] = ("output_dir", "save_every_minutes", "decode_batch_size")
    """Options with which a killed evaluation may go on differently."""

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
        """Refuse numbers below 1 where they are given."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def decoding_of(self, tokenizer: Any) -> Decoding:
        """How a tokenizer decodes its tokens: as these options say, or else as it was made for."""
        given = {each.name: getattr(self, each.name) for each in fields(Decoding) if each.name != "solver"}
        return chosen_decoding(getattr(tokenizer, "config", None), UNGUIDED, **given)

    @property
    def cache_folder(self) -> Path | None:
        """The folder of `cache_dir`."""
        return None if self.cache_dir is None else Path(self.cache_dir).expanduser()

    @property
    def identity(self) -> dict[str, Any]:
        """The options on which a killed evaluation depends."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in self.free}

    def budgets_up_to(self, num_registers: int, in_fit: bool) -> list[int]:
        """The budgets to measure of a tokenizer with K registers, in ascending order."""
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
    """What an evaluation of reconstructions takes.

    Args:
        lpips: true for LPIPS with downloaded AlexNet weights, or a path to them; needs images of 32 px or more.
        dreamsim: `ensemble` for DreamSim as in its paper, or another network of the package `dreamsim`; null for none.
        dreamsim_weights: the folder with its unpacked weights; null for the downloaded ones.
        num_seeds: outside a fit, decode from this many seeds; above 1 the pixels' mean variance over them is measured,
            all else on the first.
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
    """What an evaluation of generated images takes.

    Args:
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
        classifier: judges whether an image shows its class: `probe`, a linear classifier that is fitted to the
            extractor's features of `classifier_data` and of its reconstructions, or a timm model whose classes are the
            data's; null for none.
        classifier_data: shard set of real images with classes, for the probe.
        classifier_weights: local weights file of a timm classifier.
        clip: Hub id or folder of a CLIP model, to score images against captions; null for none.
        shown: conditions of the grid picture's rows: class numbers, class names, or texts; null for classes evenly
            spread, or for the first captions.
        images_dir: outside a fit, write each generated image there, into a folder for each budget: PNG files named
            after their keys, which `flextok fid` and other evaluators read; null for nowhere.
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
        check_probe(self.classifier, self.classifier_data)
        if self.reference is not None and Path(self.reference).suffix != ".npz":
            raise ValueError(
                f"reference={str(self.reference)!r} must be a .npz file; evaluate a split of other images to measure "
                "against those, and leave it out"
            )


def check_probe(classifier: str | None, classifier_data: str | None) -> None:
    """Refuse a probe without data, and data without a probe."""
    if (classifier == PROBE) != (classifier_data is not None):
        raise ValueError(
            f"classifier={classifier!r} and classifier_data={classifier_data!r}: a probe needs real images with "
            "classes, another classifier none"
        )


def validations_between(every_n_validations: int, every_n_epochs: int | None) -> int:
    """The number given as `every_n_validations`, or by its former name."""
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
