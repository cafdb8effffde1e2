"""Verifiers: each scores candidates by one measure, higher is better.

An error in a verifier stops the search: no candidate is ranked by fewer verifiers than you asked for. Networks compute
in float32 outside autocast, in parts of a fixed size. B candidates.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.backbones.dreamsim import DreamSim
from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.data.pictures import read_picture
from flextok_pl.data.transforms import to_tensor
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.evaluation.generation_statistics import Classifier
from flextok_pl.metrics.images import to_uint8
from flextok_pl.search.verifier import Context, checked_scores

PART = 32
"""Images per call of a network."""


class BaseVerifier(ABC):
    """A `Verifier` that refuses, in advance, prompts that it cannot judge, and checks its scores."""

    needs_images: bool = True

    def __init__(self, name: str, network: object = None) -> None:
        self.name, self._network = name, network

    @property
    def facts(self) -> dict[str, Any]:
        """Its entries in a record: its name, and the facts of its network."""
        known = {"network": "name", "weights_hash": "weights_hash"}
        return {"verifier": self.name} | {
            fact: getattr(self._network, of) for fact, of in known.items() if hasattr(self._network, of)
        }

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt that cannot be judged."""
        for prompt in prompts:
            if lack := self._lack(prompt):
                raise ValueError(
                    f"verifier={self.name!r} cannot judge the prompt {prompt.key!r}, which has {lack}: give it one, or "
                    "use another verifier"
                )

    def _lack(self, prompt: Prompt) -> str | None:
        """What the prompt lacks, such as `no text`; None if nothing is missing."""
        return None

    def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        """Score of each candidate, higher is better.

        Args:
            images: (B, 3, H, W) uint8; None if `needs_images` is False.
            prompts: the prompt of each candidate.
            context: tokens of the candidates and their log-probabilities.

        Returns:
            (B,) float64 on the CPU.

        Raises:
            ValueError: a score is missing or not a number, or the candidates cannot be judged.
        """
        return checked_scores(self._scores(images, prompts, context), self.name, prompts)

    @abstractmethod
    def _scores(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        """Compute the scores for `score`, in any type and on any device."""


class Likelihood(BaseVerifier):
    """log p(tokens | prompt) / number of tokens, under the distribution that they were drawn from.

    This is the guided, tempered and filtered distribution. The published verifier of this name (FlexAR's search, April
    2026) differs in beam search: it divides the log-probability of only the newest tokens by the number of all, so it
    forgets how likely the prefix was. In best-of-N it sums without dividing, which gives the same ranking.
    """

    needs_images = False

    def __init__(self) -> None:
        super().__init__("likelihood")

    def _scores(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        if context.log_probs is None:
            raise ValueError(
                "verifier='likelihood' needs the log-probabilities of tokens, which only a search has: use another "
                "verifier for other images"
            )
        return context.log_probs / context.tokens.shape[1]


class NetworkVerifier(BaseVerifier):
    """A verifier that scores each image separately; its network gets `PART` images at a time."""

    def _scores(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        assert images is not None, f"{self.name} needs images"
        starts = range(0, len(images), PART)
        return torch.cat([self._judged(images[i : i + PART], prompts[i : i + PART]) for i in starts])

    @abstractmethod
    def _judged(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3, H, W) uint8 -> (B,) scores."""


class ClassProbability(NetworkVerifier):
    """Scores an image by the probability that a classifier gives to the prompt's class.

    The classifier is a probe on the features of `extractor`, or sees the image itself.
    """

    def __init__(self, classifier: Classifier, extractor: FeatureExtractor | None = None) -> None:
        super().__init__("class", classifier)
        self.classifier, self._extractor = classifier, extractor

    def _lack(self, prompt: Prompt) -> str | None:
        classes = self.classifier.num_classes
        if 0 <= prompt.label < classes:
            return None
        return "no class" if prompt.label < 0 else f"class {prompt.label}, which is not among its {classes} classes"

    def _judged(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        features = images.new_empty(len(images), 0) if self._extractor is None else self._extractor(images)
        probabilities = self.classifier.probabilities(images, features)
        labels = torch.tensor([prompt.label for prompt in prompts], device=probabilities.device)
        return probabilities.gather(1, labels[:, None])[:, 0]


class TextScore(NetworkVerifier):
    """Scores how well an image fits the prompt's text: CLIP score, PickScore, HPSv2 or ImageReward."""

    def __init__(self, name: str, network: Callable[[Tensor, Sequence[str]], Tensor]) -> None:
        super().__init__(name, network)
        self._judge = network

    def _lack(self, prompt: Prompt) -> str | None:
        return None if prompt.text.strip() else "no text"

    def _judged(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self._judge(images, [prompt.text for prompt in prompts])


class ImageScore(NetworkVerifier):
    """Rates an image, whatever the prompt."""

    def __init__(self, name: str, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__(name, network)
        self._judge = network

    def _judged(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self._judge(images)


class Similarity(NetworkVerifier):
    """1 - the DreamSim distance from a reference picture.

    The picture is `reference`, or if that is None the file that a prompt's metadata name as `reference`.
    """

    def __init__(self, network: DreamSim, reference: Path | str | None = None) -> None:
        super().__init__("dreamsim", network)
        self._embed, self._reference = network.embeddings, reference
        self._embeddings: dict[Path, Tensor] = {}  # (1, D) of each reference
        if reference is not None:
            self._embedding(_file(reference))

    def _lack(self, prompt: Prompt) -> str | None:
        if self._reference is not None:
            return None
        named = prompt.metadata.get("reference")
        if not isinstance(named, str):
            return "no reference picture in its metadata"
        return None if _file(named).is_file() else f"no reference picture at {named}"

    def _embedding(self, file: Path) -> Tensor:
        if file not in self._embeddings:
            self._embeddings[file] = self._embed(to_uint8(to_tensor([read_picture(file)])))
        return self._embeddings[file]

    def _judged(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        files = [_file(self._reference or prompt.metadata["reference"]) for prompt in prompts]
        references = torch.cat([self._embedding(file) for file in files])  # (B, D)
        return F.cosine_similarity(self._embed(images), references)


class FunctionVerifier(BaseVerifier):
    """A Python function of (images, prompts, context), such as `my_module:score`, which is imported.

    The folder in which the command runs is searched last. The function returns (B,) scores, of any type and device. It
    gets images unless it has an attribute `needs_images = False`.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        module, _, name = path.partition(":")
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        remedy = "give MODULE:FUNCTION of a module in this folder or on PYTHONPATH"
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"verifier={path!r}: there is no module {error.name}; {remedy}") from error
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise ValueError(f"verifier={path!r}: {module} has no function {name}; {remedy}")
        self._function: Callable[..., Tensor] = found
        self.needs_images = bool(getattr(found, "needs_images", True))

    def _scores(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        return self._function(images, prompts, context)


def _file(name: Path | str) -> Path:
    return Path(name).expanduser()
