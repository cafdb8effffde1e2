"""The checks of `flextok doctor`: numbers in, findings out; and the guide that they link to."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest

from flextok_pl.diagnosis import latents, tokens, training
from flextok_pl.diagnosis.finding import Finding
from flextok_pl.diagnosis.logged import Facts, of_logged
from flextok_pl.diagnosis.tokens import Paired

ROOT = Path(__file__).parents[2]


def falling(steps=400, start=2.0, end=1.0, every=20):
    return [(s, start + (end - start) * s / steps + 0.02 * (-1) ** (s // every)) for s in range(every, steps, every)]


def flat(value=1.5):
    return falling(start=value, end=value)


GAPS = {(1, 1): Paired(0.3, 0.01), (2, 2): Paired(0.1, 0.01), (3, 4): Paired(0.001, 0.002)}
RATES = [(step, 0.1 * min(1, (step + 1) / 101)) for step in range(0, 400, 20)]

# Check -> verdict -> a call that finds it.
CASES = {
    "token-use": {
        "ok": lambda: tokens.token_use(0.5, Paired(0.2, 0.01)),
        "look": lambda: tokens.token_use(0.5, Paired(0.02, 0.001)),
        "wrong": lambda: tokens.token_use(0.5, Paired(0.02, 0.02)),
    },
    "token-positions": {
        "ok": lambda: tokens.token_positions({k: GAPS[k] for k in ((1, 1), (2, 2))}),
        "look": lambda: tokens.token_positions(GAPS),
        "wrong": lambda: tokens.token_positions({(3, 4): GAPS[3, 4]}),
    },
    "budgets": {
        "ok": lambda: tokens.budgets_of_means({1: 1.0, 2: 0.8, 4: 0.7}, None, "loss"),
        "look": lambda: tokens.budgets(
            {1: 1.0, 2: 0.8, 4: 0.79}, {2: Paired(0.2), 4: Paired(0.01, 0.02)}, None, "loss"
        ),
        "wrong": lambda: tokens.budgets_of_means({1: 1.0, 2: 1.0, 4: 1.01}, None, "loss"),
    },
    "codebook-use": {
        "ok": lambda: tokens.codebook_use([6.0, 7.0], 192, 4375),
        "look": lambda: tokens.codebook_use([6.0, 0.1], 192, 4375),
        "wrong": lambda: tokens.codebook_use([0.3, 0.0], 192, 4375),
    },
    "fsq-levels": {
        "ok": lambda: tokens.fsq_levels([[0.2, 0.3, 0.5], [0.5, 0.5]], 1000),
        "look": lambda: tokens.fsq_levels([[0.4, 0.0, 0.6], [0.5, 0.5]], 1000),
        "wrong": lambda: tokens.fsq_levels([[0.2, 0.3, 0.5], [1.0, 0.0]], 1000),
    },
    "null-condition": {
        "ok": lambda: tokens.null_condition(0.5, 0.7, Paired(0.2, 0.01)),
        "look": lambda: tokens.null_condition(0.5, 0.9, Paired(-0.2, 0.01)),
    },
    "null-rate": {
        "ok": lambda: tokens.null_rate(0.1, "model.net.null_dropout"),
        "look": lambda: tokens.null_rate(0.0, "model.net.null_dropout"),
    },
    "condition-use": {
        "ok": lambda: tokens.condition_use(0.05, 5.0),
        "look": lambda: tokens.condition_use(0.005, 5.0),
        "wrong": lambda: tokens.condition_use(-0.01, 5.0),
    },
    "prior-bits": {
        "ok": lambda: tokens.prior_bits(8.0, 4375),
        "look": lambda: tokens.prior_bits(12.05, 4375),
        "wrong": lambda: tokens.prior_bits(14.0, 4375),
    },
    "latent-scale": {
        "ok": lambda: latents.latent_scale([0.1, -0.1], [0.9, 1.1], 1.0),
        "look": lambda: latents.latent_scale([0.1, -1.4], [0.9, 1.1], 1.0),
        "wrong": lambda: latents.latent_scale([0.1, -0.1], [4.5, 5.5], 5.0),
    },
    "reconstruction": {
        "ok": lambda: latents.reconstruction(0.08),
        "look": lambda: latents.reconstruction(0.3),
        "wrong": lambda: latents.reconstruction(0.8),
    },
    "loss-falls": {
        "ok": lambda: training.loss_falls(falling(), 50, None),
        "look": lambda: training.loss_falls(flat(), 50, None, started=True),
        "wrong": lambda: training.loss_falls(flat(), 50, None),
    },
    "overfitting": {
        "ok": lambda: training.overfitting([(1, 2.0), (2, 1.5), (3, 1.4), (4, 1.42)]),
        "look": lambda: training.overfitting([(1, 2.0), (2, 1.5), (3, 1.6), (4, 1.7)]),
    },
    "finite": {
        "ok": lambda: training.finite({"train/loss": 1.0}),
        "wrong": lambda: training.finite({"train/loss": 1.0, "val/loss": math.nan}),
    },
    "gradient-norm": {
        "ok": lambda: training.gradient_norm([(i, 1.0 + 0.1 * (i % 3)) for i in range(100)], 1.0),
        "look": lambda: training.gradient_norm([(i, 50.0 if i % 20 == 19 else 1.0) for i in range(100)], None),
        "wrong": lambda: training.gradient_norm([(i, 0.0) for i in range(100)], None),
    },
    "learning-rate": {
        "ok": lambda: training.learning_rate(RATES, 0.1, 100, 1000),
        "look": lambda: training.learning_rate(RATES[:3], 0.1, 100, 1000),
    },
    "ema-lag": {
        "ok": lambda: training.ema_lag(0.998, 1, 3000),
        "look": lambda: training.ema_lag(0.999, 1, 2000),
        "wrong": lambda: training.ema_lag(0.9999, 1, 3000),
    },
    "ema-distance": {
        "ok": lambda: training.ema_distance(0.02, (0.5, 0.51)),
        "look": lambda: training.ema_distance(0.2, (0.6, 0.5)),
    },
    "data-share": {
        "ok": lambda: training.data_share(0.01),
        "look": lambda: training.data_share(0.2),
        "wrong": lambda: training.data_share(0.6),
    },
    "throughput": {
        "ok": lambda: training.throughput(90.0, 100.0),
        "look": lambda: training.throughput(50.0, 100.0),
        "wrong": lambda: training.throughput(10.0, 100.0),
    },
}


@pytest.mark.parametrize(("check", "verdict"), [(check, verdict) for check in CASES for verdict in CASES[check]])
def test_a_check_finds_what_it_should(check, verdict):
    finding = CASES[check][verdict]()
    assert isinstance(finding, Finding)
    assert (finding.check, finding.verdict) == (check, verdict), finding.says
    assert bool(finding.remedy) == (verdict != "ok"), "something to do, or nothing"
    assert finding.says in finding.text and finding.link in finding.text


def headings():
    """Anchors of the guide, as GitHub makes them."""
    lines = (ROOT / "docs" / "doctor.md").read_text().splitlines()
    titles = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_to_its_explanation():
    package = ROOT / "flextok_pl"
    named = set()
    for file in (package / "diagnosis").glob("*.py"):
        named |= set(re.findall(r'(?:graded|Finding)\(\s*"([\w-]+)"', file.read_text()))
    assert named == set(CASES) | {"reference"}, "each check has its cases here"
    assert named <= headings()
    assert all((ROOT / finding.split("#")[0]).is_file() for finding in (CASES["finite"]["ok"]().link,))
    guide = (ROOT / "docs" / "doctor.md").read_text()
    assert set(re.findall(r"\]\(#([\w-]+)\)", guide)) <= headings()


def test_nothing_is_wrong_with_what_is_still_to_be_learned():
    unused = Paired(0.0, 0.01)
    assert tokens.token_use(0.5, unused, progress=0.1).verdict == "look"
    assert tokens.token_use(0.5, unused, progress=0.5).verdict == "wrong"
    assert training.loss_falls(flat(), 50, 0.1).verdict == "look"


def test_numbers_are_in_what_is_said():
    said = tokens.token_use(0.5, Paired(0.2, 0.01)).says
    assert "0.5" in said and "0.2 ± 0.01" in said and "+40.0%" in said
    assert tokens.null_condition(1.4, 1.4, Paired(-1e-6, 1e-8)).verdict == "ok", "clear, and nothing that matters"
    said = tokens.budgets({1: 1.0, 2: 0.8, 4: 0.9}, {2: Paired(0.2), 4: Paired(-0.1)}, None, "loss").says
    assert "no gain beyond 2" in said and "worse at 4" in said
    remedy = latents.latent_scale([0.0], [5.0], 5.0).remedy
    assert "scaling_factor by 0.2" in remedy
    assert "ema.decay 0.9977" in training.ema_lag(0.9999, 1, 3000).remedy


def test_too_few_values_say_nothing():
    assert training.loss_falls(falling()[:3], 0, None) is None
    assert training.overfitting([(1, 2.0), (2, 3.0)]) is None
    assert training.gradient_norm([(1, 1.0)], None) is None
    assert training.learning_rate([], 0.1, 10, 100) is None


def test_what_is_logged_is_looked_at():
    values = {
        **{"val/loss": 0.8, "val/loss_other_tokens": 0.8, "val/codes/entropy": 5.0, "train/data_share": 0.5},
        **{"val/mse/k=001": 0.2, "val/mse/k=064": 0.1, "val/mse_over_variance": math.nan, "unknown": 3.0},
    }
    facts = Facts(1000, 1000, 4375, 192, (("model.net.null_dropout", 0.1),), (0.998, 1))
    found = {each.check: each.verdict for each in of_logged(values, facts)}
    assert found == {
        "token-use": "wrong",
        "codebook-use": "ok",
        "budgets": "ok",
        "data-share": "wrong",
        "null-rate": "ok",
        "ema-lag": "look",
    }
    prior = {"val/loss": 5.0, "val/condition_gap": 0.1, "val/bits_per_token": 7.2}
    assert {each.check for each in of_logged(prior, Facts(vocab_size=4375))} == {"condition-use", "prior-bits"}
    assert not list(of_logged({}, Facts()))


def test_checks_are_pure():
    """They take numbers and give findings, and import nothing but numbers."""
    assert dataclasses.is_dataclass(Finding) and Finding.__dataclass_params__.frozen
    for module in (tokens, latents, training):
        assert "torch" not in inspect.getsource(module)
