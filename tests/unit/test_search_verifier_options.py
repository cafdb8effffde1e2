"""Options of verifiers: refused where they are wrong, and ensembles by hand-computed ranks."""

import dataclasses

import pytest
import torch
from jsonargparse import ArgumentParser

from flextok_pl.cli.options import options_of
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.search.verifier import Context
from flextok_pl.search.verifier_ensemble import Ensemble, mean_ranks
from flextok_pl.search.verifier_options import MADE_BY, VerifierOptions, build_verifiers
from flextok_pl.search.verifiers import BaseVerifier


class Given(BaseVerifier):
    """Scores that are known."""

    def __init__(self, name, scores, needs_images=False):
        super().__init__(name)
        self.scores, self.needs_images = torch.tensor(scores), needs_images

    def _scores(self, images, prompts, context):
        assert (images is not None) == self.needs_images
        return self.scores[context.tokens[:, 0]]


def scores_of(ensemble, keys="aaaa"):
    tokens = torch.arange(len(keys))[:, None]
    images = torch.zeros(len(keys), 3, 2, 2, dtype=torch.uint8) if ensemble.needs_images else None
    return ensemble.score(images, [Prompt(key) for key in keys], Context(tokens)).tolist()


def test_ranks_share_the_places_of_equal_scores():
    assert mean_ranks(torch.tensor([0.3, 0.9, 0.1, 0.5])).tolist() == [2, 0, 3, 1]
    assert mean_ranks(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])).tolist() == [2, 0, 2, 2, 4]
    assert mean_ranks(torch.tensor([5.0])).tolist() == [0]


def test_rank_ensemble():
    one, two = Given("one", [0.3, 0.9, 0.1, 0.5]), Given("two", [10.0, 10.0, 30.0, 20.0], needs_images=True)
    # Ranks: 2 0 3 1 and 2.5 2.5 0 1; the largest sum is 2 x 3.
    expected = [1 - 4.5 / 6, 1 - 2.5 / 6, 1 - 3 / 6, 1 - 2 / 6]
    assert scores_of(Ensemble([one, two])) == pytest.approx(expected, abs=1e-12)
    # With weights 1 and 3 the largest is 4 x 3.
    expected = [1 - 9.5 / 12, 1 - 7.5 / 12, 1 - 3 / 12, 1 - 4 / 12]
    ensemble = Ensemble([one, two], weights={"two": 3})
    assert scores_of(ensemble) == pytest.approx(expected, abs=1e-12)
    assert ensemble.needs_images and ensemble.name == "rank of one, two"
    assert ensemble.facts["weights"] == {"one": 1, "two": 3}
    assert [each["verifier"] for each in ensemble.facts["verifiers"]] == ["one", "two"]
    assert not Ensemble([one, Given("three", [0.0] * 4)]).needs_images


def test_weighted_ensemble():
    one, two = Given("one", [0.3, 0.9, 0.1, 0.5]), Given("two", [10.0, 10.0, 30.0, 20.0])
    three = Given("three", [7.0, 7.0, 7.0, 7.0])
    ensemble = Ensemble([one, two, three], "weighted", {"one": 2})
    expected = [2 * 0.25 + 0, 2 * 1 + 0, 2 * 0 + 1, 2 * 0.5 + 0.5]
    assert scores_of(ensemble) == pytest.approx(expected, abs=1e-6)
    endless = Ensemble([one, Given("two", [0.0, float("-inf"), 1.0, 2.0])], "weighted")
    with pytest.raises(ValueError, match="verifier='two' gave an infinite score, which cannot be weighted: use rank"):
        scores_of(endless)
    assert scores_of(Ensemble(endless.verifiers))[1] == pytest.approx(1 - (0 + 3) / 6)


@pytest.mark.parametrize("combination", ["rank", "weighted"])
def test_only_candidates_of_the_same_prompt_are_compared(combination):
    one, two = Given("one", [0.3, 0.9, 0.1, 0.5]), Given("two", [10.0, 10.0, 30.0, 20.0])
    mixed = scores_of(Ensemble([one, two], combination), "abab")
    halves = [
        scores_of(Ensemble([Given("one", [a, b]), Given("two", [c, d])], combination), "xx")
        for a, b, c, d in ((0.3, 0.1, 10.0, 30.0), (0.9, 0.5, 10.0, 20.0))
    ]
    assert mixed == pytest.approx([halves[0][0], halves[1][0], halves[0][1], halves[1][1]])
    assert scores_of(Ensemble([one, two], "rank"), "abcd") == [1] * 4, "each is the best of its prompt"


def test_options_of_a_command():
    found = options_of("flextok_pl.search.verifier_options:VerifierOptions")
    assert list(found) == [each.name for each in dataclasses.fields(VerifierOptions)]
    assert all(option.help for option in found.values()) and found["verifiers"].several
    parser = ArgumentParser()
    parser.add_class_arguments(VerifierOptions)
    arguments = ["--verifiers", '["likelihood","a:b"]', "--ensemble", "weighted", "--verifier_weights", '{"a:b": 2}']
    made = VerifierOptions(**parser.parse_args(arguments).as_dict())
    assert (made.verifiers, made.ensemble, made.verifier_weights) == (["likelihood", "a:b"], "weighted", {"a:b": 2.0})


def test_options_make_an_ensemble(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "first_token.py").write_text("def score(images, prompts, context):\n    return context.tokens[:, 0]\n")
    options = VerifierOptions(["likelihood", "first_token:score"], verifier_weights={"first_token:score": 2.0})
    verifier = build_verifiers(options)
    tokens = torch.tensor([[0, 0], [1, 0], [2, 0]])
    context = Context(tokens, torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64))
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    assert verifier.score(images, [Prompt("a")] * 3, context).tolist() == pytest.approx([1 - 4 / 6, 0.5, 1 - 2 / 6])


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"verifiers": []}, r"verifiers=\[\] is empty; give one of likelihood, class, clip"),
        ({"verifiers": ["clop"]}, "verifier='clop' is unknown; use one of likelihood, .*hpsv2, or MODULE:FUNCTION"),
        ({"verifiers": [":score"]}, "verifier=':score' is unknown"),
        ({"verifiers": ["clip", "clip"]}, r"verifiers=\['clip', 'clip'\] names clip twice: give each once"),
        ({"ensemble": "mean"}, "ensemble='mean' is unknown; use 'rank' or 'weighted'"),
        ({"ensemble": "weighted"}, "ensemble='weighted' .* combine several verifiers, but there is only likelihood"),
        ({"verifier_weights": {"likelihood": 2.0}}, "combine several verifiers, but there is only"),
        (
            {"verifier_weights": {"clip": 2.0}},
            r"verifier_weights has 'clip', which is not among verifiers=\['likelihood'\]",
        ),
        (
            {"verifiers": ["clip", "likelihood"], "verifier_weights": {"clip": 0.0}},
            "verifier_weights has clip=0.0, which must be positive: leave the verifier out",
        ),
        ({"verifiers": ["class"]}, "verifier='class' needs a classifier: give classifier='probe' with classifier_data"),
        ({"verifiers": ["class"], "classifier": "probe"}, "a probe needs real images with classes"),
        ({"verifiers": ["class"], "classifier": "resnet18", "classifier_data": "x"}, "other classifiers take none"),
        (
            {
                "verifiers": ["class"],
                "classifier": "probe",
                "classifier_data": "x",
                "classifier_extractor": "inception",
            },
            "^classifier_extractor='inception' is unknown; use one of effnet-lite0, effnet-lite2",
        ),
        (
            {
                "verifiers": ["class"],
                "classifier": "probe",
                "classifier_data": "x",
                "classifier_extractor_weights": "nowhere.pth",
            },
            "^classifier_extractor_weights='nowhere.pth' is not a file",
        ),
        (
            {"classifier": "probe"},
            "classifier='probe' is for the verifier class: add --verifier class, or leave it out",
        ),
        ({"clip": "x"}, "clip='x' is for the verifier clip: add --verifier clip"),
        ({"image_reward_tokenizer": "x"}, "image_reward_tokenizer='x' is for the verifier image_reward"),
        ({"verifiers": ["clip"], "pickscore": "x"}, "pickscore='x' is for the verifier pickscore"),
        ({"verifiers": ["dreamsim"], "dreamsim": "vgg"}, r"dreamsim='vgg' is unknown; use one of \('ensemble'"),
        ({"dreamsim_reference": "x.png"}, "dreamsim_reference='x.png' is for the verifier dreamsim"),
        ({"aesthetic_clip": "x"}, "aesthetic_clip='x' is for the verifier aesthetic"),
        ({"hpsv2_weights": "x"}, "hpsv2_weights='x' is for the verifier hpsv2"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        VerifierOptions(**options)


@pytest.mark.parametrize("name", sorted(set(MADE_BY) - {"likelihood", "class", "dreamsim", "aesthetic"}))
def test_weights_that_cannot_be_had(name):
    option = {"clip": "clip", "pickscore": "pickscore"}.get(name, "verifier")
    with pytest.raises(ValueError, match=rf"(?s){option}='.*' cannot be loaded .*; (give|download)"):
        build_verifiers(VerifierOptions([name]))
