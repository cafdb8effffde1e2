"""What a search space offers, and what it refuses."""

import optuna
import pytest

from flextok_pl.sweeps.space import Space

LAWS = {
    "law": {
        "options": {"nested": {"model.net.nested_dropout": "uniform"}, "fixed": {"model.net.nested_dropout": "none"}}
    },
    "model.net.null_dropout": {"choices": [0.1, 0.2], "when": {"law": "nested"}},
    "model.net.fsq_levels": [[8, 8], [5, 5, 5]],
}


def test_a_grid_has_each_point_once_and_respects_conditions():
    points = Space(LAWS).grid()
    assert points == [
        {"law": "nested", "model.net.null_dropout": 0.1, "model.net.fsq_levels": "[8, 8]"},
        {"law": "nested", "model.net.null_dropout": 0.1, "model.net.fsq_levels": "[5, 5, 5]"},
        {"law": "nested", "model.net.null_dropout": 0.2, "model.net.fsq_levels": "[8, 8]"},
        {"law": "nested", "model.net.null_dropout": 0.2, "model.net.fsq_levels": "[5, 5, 5]"},
        {"law": "fixed", "model.net.fsq_levels": "[8, 8]"},
        {"law": "fixed", "model.net.fsq_levels": "[5, 5, 5]"},
    ]


def test_a_point_sets_options():
    space = Space(LAWS)
    assert space.options({"law": "fixed", "model.net.fsq_levels": "[5, 5, 5]"}) == {
        "model.net.nested_dropout": "none",
        "model.net.fsq_levels": [5, 5, 5],
    }
    assert Space({"a": {"options": {"as_it_is": None, "more": {"x": 1}}}}).options({"a": "as_it_is"}) == {}


def test_corners_have_each_value_and_the_conditions_that_it_needs():
    corners = list(Space(LAWS).corners())
    for name, values in (("law", {"nested", "fixed"}), ("model.net.null_dropout", {0.1, 0.2})):
        assert {corner[name] for corner in corners if name in corner} == values
    assert all("model.net.null_dropout" not in corner for corner in corners if corner["law"] == "fixed")
    deep = Space(
        {"a": [1, 2], "b": {"choices": [3, 4], "when": {"a": 2}}, "c": {"low": 5, "high": 6, "when": {"b": 4}}}
    )
    assert {"a": 2, "b": 4, "c": 6} in list(deep.corners())


@pytest.mark.parametrize(
    "entry, values",
    [
        ({"low": 2, "high": 8, "step": 3}, [2, 5, 8]),
        ({"low": 2, "high": 8, "step": 3.0}, [2, 5, 8]),
        ({"low": 0.1, "high": 0.3, "step": 0.1}, pytest.approx([0.1, 0.2, 0.3])),
        ({"low": 0, "high": 1, "step": 0.25}, [0, 0.25, 0.5, 0.75, 1]),
        ({"low": 0, "high": 3, "step": 1.5}, [0, 1.5, 3]),
        ({"low": 1e-4, "high": 1e-2, "log": True}, [1e-4, 1e-2]),
    ],
)
def test_ranges(entry, values):
    parameter = Space({"x": entry}).parameters["x"]
    assert parameter.values() == values
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [Space({"x": entry}).suggest(study.ask())["x"] for _ in range(50)]
    assert all(entry["low"] <= value <= entry["high"] + 1e-12 for value in drawn) and len(set(drawn)) >= 3
    assert all(type(value) is type(parameter.values()[0]) for value in drawn)
    if "step" in entry:
        assert all(min(abs(value - each) for each in parameter.values()) < 1e-9 for value in drawn)
    if entry.get("log"):
        assert sum(value < 1e-3 for value in drawn) > 15


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "space is empty"),
        ({"x": 3}, "x=3 must be a list"),
        ({"x": []}, "not empty"),
        ({"x": {"options": {"a": 1}}}, "x.options.a=1 must be options"),
        ({"x": {"options": ["a"]}}, "label"),
        ({"x": {"low": 1}}, "x.high=None must be a number"),
        ({"x": {"low": "1", "high": 2}}, "x.low='1' must be a number"),
        ({"x": {"low": 3, "high": 2}}, "must not be above"),
        ({"x": {"low": 0, "high": 2, "log": True}}, "above 0"),
        ({"x": {"low": 0, "high": 2, "step": 0.7}}, "divide"),
        ({"x": {"low": 0, "high": 2, "lgo": True}}, "'lgo'"),
        ({"x": {"choices": [1], "when": {"y": 1}}}, "names 'y', which is no list of choices above it"),
        ({"y": [1, 2], "x": {"choices": [1], "when": {"y": 3}}}, r"y=3 is not among \[1, 2\]"),
        ({"x": {"choices": [1], "when": 3}}, "when=3 must be"),
    ],
)
def test_what_a_space_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Space(given)


def test_a_grid_needs_steps():
    with pytest.raises(ValueError, match="x needs a step, or choices"):
        Space({"x": {"low": 0.0, "high": 1.0}}).grid()
