"""Quality of generated images at several token budgets, accumulated over batches and summed over processes.

B images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flextok_pl.backbones.classifier import TimmClassifier
from flextok_pl.backbones.clip_score import CLIPScore
from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.evaluation.statistics import BudgetStatistics, BudgetT, add_features
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.inception_score import InceptionScore
from flextok_pl.metrics.kernel import KernelReference
from flextok_pl.metrics.linear_probe import LinearProbe
from flextok_pl.metrics.manifold import DENSITY_NEIGHBOURS, NEIGHBOURS, manifold_scores
from flextok_pl.precision import as_float64

Classifier = LinearProbe | TimmClassifier
"""Finds the class that an image shows, from the image or from the extractor's features."""


class GenerationStatistics(BudgetStatistics[BudgetT]):
    """Statistics for all per-budget metrics of generated images; see `BudgetStatistics`.

    The pools of features are for the kernel distance and the manifolds. Without a classifier there is no agreement with
    the class asked for, without `clip` no score against captions. An inception score is the mean over its splits.
    """

    def __init__(
        self,
        budgets: Sequence[BudgetT],
        extractor: FeatureExtractor,
        pool_fraction: float = 1.0,
        classifier: Classifier | None = None,
        real: FeatureSet | None = None,
        clip: CLIPScore | None = None,
        inception_splits: int = 10,
        real_pool_fraction: float | None = None,
    ) -> None:
        self._probe = classifier if isinstance(classifier, LinearProbe) else None
        names = {"class_agreement": classifier, "class_mean_agreement": self._probe, "clip_score": clip}
        measured = [name for name, source in names.items() if source is not None]
        self._classifier, self._clip = classifier, clip
        logits = extractor.class_logits(torch.zeros(0, extractor.dim))  # (0, C) or None
        self._score_name, num_classes = "", 0
        if logits is not None:
            self._score_name, num_classes = "inception_score", logits.shape[1]
        elif classifier is not None:
            self._score_name, num_classes = f"score_{classifier.name}", classifier.num_classes
        super().__init__(budgets, extractor, pool_fraction, real_pool_fraction, real, measured)
        scored = budgets if num_classes else ()
        self._scores = {budget: InceptionScore(num_classes, inception_splits, self.home) for budget in scored}
        self._further |= {f"score {budget}": score for budget, score in self._scores.items()}

    @property
    def how(self) -> dict[str, dict[str, Any]]:
        """See `BudgetStatistics`."""
        near = {name: {"neighbours": NEIGHBOURS} for name in ("precision", "recall")}
        near |= {name: {"neighbours": DENSITY_NEIGHBOURS} for name in ("density", "coverage")}
        return super().how | near

    def update_generated(
        self,
        budget: BudgetT,
        images: Tensor,
        keys: Sequence[str],
        labels: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Add (B, 3, H, W) uint8 images generated at one budget, whose keys are unique among those of the budget.

        `labels` (B,) int64, -1 for none, and `captions` are the conditions.
        """
        self.check_size(list(images.shape[2:]))
        features = self._extractor(images)
        ids = add_features(self.made[budget], features, keys, self._pool_fraction)
        logits = self._extractor.class_logits(features)
        if logits is not None:
            self._scores[budget].update(as_float64(logits).softmax(1), ids)
        if self._classifier is not None:
            probabilities = self._classifier.probabilities(images, features)
            if logits is None:
                self._scores[budget].update(probabilities, ids)
            if labels is not None:
                self._add_agreement(budget, probabilities, features, labels)
        if self._clip is not None and captions is not None:
            self._add_values(budget, "clip_score", self._clip(images, captions))

    def _values_at(self, budget: BudgetT, real: KernelReference, kernel_seed: int) -> dict[str, float]:
        """Compute each metric that has enough samples.

        The metrics are the Frechet and the kernel distance; the inception score if the extractor has class logits, or
        else the same score of the classifier under its own name; precision, recall, density and coverage. For images
        with a class as condition they are also the share whose most probable class, and the share whose nearest class
        mean, is that class. For captions it is the mean CLIP score.
        """
        result = self._distances(budget, real, kernel_seed, paired=False)
        if self._scores and self._scores[budget].count:
            result[self._score_name], _ = self._scores[budget].compute()
        pool = self.made[budget].pool()
        if min(len(real.features), len(pool)) > DENSITY_NEIGHBOURS:
            result |= manifold_scores(real.features, pool)
        return result | self._means(budget)

    def _add_agreement(self, budget: BudgetT, probabilities: Tensor, features: Tensor, labels: Tensor) -> None:
        if len(labels) and int(labels.max()) >= probabilities.shape[1]:
            raise ValueError(
                f"label {int(labels.max())} is not among the {probabilities.shape[1]} classes of the classifier; use "
                "one of the data's own classes, such as a probe"
            )
        judged = {"class_agreement": probabilities.argmax(1)}
        if self._probe is not None:
            judged["class_mean_agreement"] = self._probe.nearest_class(features)
        for name, classes in judged.items():
            self._add_values(budget, name, classes == labels.to(classes.device), int((labels >= 0).sum()))
