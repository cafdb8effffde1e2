"""Choose the verifiers of a search by plain options, and build them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from flextok_pl.backbones.aesthetic import AESTHETIC_CLIP, AestheticScore
from flextok_pl.backbones.classifier import TimmClassifier
from flextok_pl.backbones.clip_score import PICKSCORE, CLIPScore, PickScore
from flextok_pl.backbones.dreamsim import DreamSim, check_dreamsim
from flextok_pl.backbones.extractors import OFFLINE_EXTRACTOR, build_extractor, check_extractor
from flextok_pl.backbones.hpsv2 import HPSv2
from flextok_pl.backbones.image_reward import VOCABULARY, ImageReward
from flextok_pl.contracts import ImageSize, Reconstructor
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.evaluation.options import CACHE_DIR, PROBE, check_classifier
from flextok_pl.evaluation.probe import PROBE_SEED, tokenizer_probe
from flextok_pl.flow.decoding import Decoding
from flextok_pl.search.prompts import Conditions
from flextok_pl.search.verifier_ensemble import Combination, Ensemble, check_weights
from flextok_pl.search.verifiers import (
    BaseVerifier,
    ClassProbability,
    FunctionVerifier,
    ImageScore,
    Likelihood,
    Similarity,
    TextScore,
)

FUNCTION = re.compile(r"[\w.]+:[\w.]+")
"""The import path of a function: `my_module:score`."""

EXTRACTOR_OPTIONS = ("classifier_extractor", "classifier_extractor_weights")


@dataclass(frozen=True)
class VerifierOptions:
    """Verifiers that score candidates, and the places of their weights.

    Args:
        verifiers: the verifier's name (or `--verifier`, once or several times, for an ensemble): `likelihood`, `class`,
            `clip`, `dreamsim`, `aesthetic`, `image_reward`, `pickscore`, `hpsv2`, or a Python function of (images,
            prompts, context) by its import path, such as `my_module:score`.
        ensemble: combination of several verifiers: `rank` weights their ranks of a prompt's candidates, `weighted`
            their scores, each scaled from 0 to 1.
        verifier_weights: weights in the ensemble by name, such as `{"clip": 2}`; 1 for others.
        classifier: for the verifier `class`: `probe`, a linear classifier fitted to features of `classifier_data` and
            of its reconstructions, or a timm model with the prior's classes.
        classifier_data: shard set of real images with classes, for the probe.
        classifier_weights: local weights file of a timm classifier.
        classifier_extractor: feature network of the probe: `effnet-lite0` or `effnet-lite2` (offline),
            `inception-v3-compat`, `dinov2-*` or `clip-*`.
        classifier_extractor_weights: local weights file of that network.
        classifier_cache: folder that keeps a fitted probe between runs; null keeps none.
        clip: for the verifier `clip`: Hub id or folder of a CLIP model.
        dreamsim: for the verifier `dreamsim`: `ensemble` as in its paper, or another network of the package.
        dreamsim_weights: folder with its unpacked weights; null for the downloaded ones.
        dreamsim_reference: picture to compare with; null for the `reference` of each prompt.
        aesthetic_weights: for the verifier `aesthetic`: the file sac+logos+ava1-l14-linearMSE.pth.
        aesthetic_clip: Hub id or folder of its CLIP ViT-L/14.
        image_reward_weights: for the verifier `image_reward`: local ImageReward.pt; null to download it.
        image_reward_tokenizer: Hub id or folder with the vocabulary of bert-base-uncased.
        pickscore: for the verifier `pickscore`: Hub id, or folder with its processor's files in it.
        hpsv2_weights: for the verifier `hpsv2`: local HPS_v2.1_compressed.pt; null to download it.

    Raises:
        ValueError: an option is out of range, names something that does not exist, or belongs to an unused verifier.
    """

    verifiers: list[str] = field(default_factory=lambda: ["likelihood"])
    ensemble: Combination = "rank"
    verifier_weights: dict[str, float] | None = None
    classifier: str | None = None
    classifier_data: str | None = None
    classifier_weights: Path | str | None = None
    classifier_extractor: str = OFFLINE_EXTRACTOR
    classifier_extractor_weights: Path | str | None = None
    classifier_cache: Path | str | None = CACHE_DIR
    clip: str = "openai/clip-vit-base-patch16"
    dreamsim: str = "ensemble"
    dreamsim_weights: Path | str | None = None
    dreamsim_reference: Path | str | None = None
    aesthetic_weights: Path | str | None = None
    aesthetic_clip: str = AESTHETIC_CLIP
    image_reward_weights: Path | str | None = None
    image_reward_tokenizer: str = VOCABULARY
    pickscore: str = PICKSCORE
    hpsv2_weights: Path | str | None = None

    def __post_init__(self) -> None:
        if not self.verifiers:
            raise ValueError(f"verifiers=[] is empty; give one of {', '.join(MADE_BY)}, or MODULE:FUNCTION")
        for name in self.verifiers:
            if name not in MADE_BY and not FUNCTION.fullmatch(name):
                raise ValueError(f"verifier={name!r} is unknown; use one of {', '.join(MADE_BY)}, or MODULE:FUNCTION")
        if self.ensemble not in ("rank", "weighted"):
            raise ValueError(f"ensemble={self.ensemble!r} is unknown; use 'rank' or 'weighted'")
        check_weights(self.verifiers, self.verifier_weights or {})
        if len(self.verifiers) == 1 and (self.ensemble != "rank" or self.verifier_weights):
            raise ValueError(
                f"ensemble={self.ensemble!r} and verifier_weights={self.verifier_weights} combine several verifiers, "
                f"but there is only {self.verifiers[0]}: leave them out"
            )
        self._check_networks()

    def _check_networks(self) -> None:
        """Refuse wrong options before anything is loaded."""
        for each in fields(VerifierOptions)[3:]:
            value, owner = getattr(self, each.name), OWNERS[each.name.split("_")[0]]
            if str(value) != str(each.default) and owner not in self.verifiers:
                raise ValueError(
                    f"{each.name}={value!r} is for the verifier {owner}: add --verifier {owner}, or leave it out"
                )
        if "class" in self.verifiers:
            if self.classifier is None:
                raise ValueError(
                    "verifier='class' needs a classifier: give classifier='probe' with classifier_data, or timm's"
                )
            check_classifier(self.classifier, self.classifier_data, self.classifier_weights)
            check_extractor(self.classifier_extractor, self.classifier_extractor_weights, EXTRACTOR_OPTIONS)
        check_dreamsim(self.dreamsim, self.dreamsim_weights)


class Surroundings(NamedTuple):
    """Facts of a search that verifiers need, besides their options."""

    conditions: Conditions
    tokenizer: Reconstructor | None
    image_size: ImageSize | None
    decoding: Decoding
    device: torch.device | str


def build_verifiers(
    options: VerifierOptions,
    prompts: Sequence[Prompt] = (),
    conditions: Conditions | None = None,
    tokenizer: Reconstructor | None = None,
    image_size: ImageSize | None = None,
    decoding: Decoding | None = None,
    device: torch.device | str = "cpu",
) -> BaseVerifier:
    """Build the verifier of these options, or an ensemble of several. All processes must call it.

    Args:
        options: the verifiers, and the places of their weights.
        prompts: all prompts to judge; raises for those that cannot be judged.
        conditions: the classes of the prior.
        tokenizer: decodes the candidates; the probe learns from its images.
        image_size: size of its images in pixels.
        decoding: its steps and guidance.
        device: device of the networks, unless they follow the images.

    Raises:
        ValueError: a package, weights or classes are missing or wrong, or a prompt cannot be judged.
    """
    around = Surroundings(conditions or Conditions("none"), tokenizer, image_size, decoding or Decoding(), device)
    built = [
        MADE_BY[name](options, around) if name in MADE_BY else FunctionVerifier(name) for name in options.verifiers
    ]
    verifier = built[0] if len(built) == 1 else Ensemble(built, options.ensemble, options.verifier_weights)
    verifier.check(prompts)
    return verifier


def _class_verifier(options: VerifierOptions, around: Surroundings) -> BaseVerifier:
    assert options.classifier is not None
    known = around.conditions
    if options.classifier != PROBE:
        timm_classifier = TimmClassifier(options.classifier, options.classifier_weights)
        if known.num_classes not in (0, timm_classifier.num_classes):
            raise ValueError(
                f"classifier={options.classifier!r} has {timm_classifier.num_classes} classes, but the prior has "
                f"{known.num_classes}: their numbers mean different classes; give a classifier of the prior's"
            )
        return ClassProbability(timm_classifier)
    if around.tokenizer is None or around.image_size is None:
        raise ValueError("classifier='probe' learns from images of a tokenizer: give tokenizer and image_size")
    name, weights, cache = options.classifier_extractor, options.classifier_extractor_weights, options.classifier_cache
    extractor = build_extractor(name, weights, EXTRACTOR_OPTIONS).to(around.device)
    folder = None if cache is None else Path(cache).expanduser()
    where = (around.tokenizer, around.decoding, PROBE_SEED, folder, known.class_names)
    probe = tokenizer_probe(str(options.classifier_data), around.image_size, extractor, *where)
    return ClassProbability(probe, extractor)


MADE_BY: dict[str, Callable[[VerifierOptions, Surroundings], BaseVerifier]] = {
    "likelihood": lambda options, around: Likelihood(),
    "class": _class_verifier,
    "clip": lambda options, around: TextScore("clip", CLIPScore(options.clip)),
    "dreamsim": lambda options, around: Similarity(
        DreamSim(options.dreamsim, options.dreamsim_weights, around.device), options.dreamsim_reference
    ),
    "aesthetic": lambda options, around: ImageScore(
        "aesthetic", AestheticScore(options.aesthetic_weights, options.aesthetic_clip)
    ),
    "image_reward": lambda options, around: TextScore(
        "image_reward", ImageReward(options.image_reward_weights, options.image_reward_tokenizer)
    ),
    "pickscore": lambda options, around: TextScore("pickscore", PickScore(options.pickscore)),
    "hpsv2": lambda options, around: TextScore("hpsv2", HPSv2(options.hpsv2_weights)),
}
"""Verifiers by name."""

OWNERS = {"classifier": "class", "image": "image_reward"} | {name: name for name in MADE_BY if name != "class"}
"""First word of an option -> the verifier that uses it."""
