"""What a search space offers, and what it refuses."""

import math

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


@pytest.mark.parametrize(
    "values, labels",
    [
        ([1, 1.0, 2], ["1", "1.0", 2]),
        ([1, True], ["1", "true"]),
        ([0, False, None], ["0", "false", None]),
        ([0.99999, 0.999999], [0.99999, 0.999999]),
        ([None, "None"], ["null", "None"]),
        (["3", 3.0], ["3", "3.0"]),
    ],
)
def test_values_that_python_or_optuna_takes_for_one_stay_apart(values, labels):
    space = Space({"x": values, "y": {"choices": [3], "when": {"x": values[1]}}})
    points = space.grid()
    assert [point["x"] for point in points] == labels and [len(point) for point in points[:2]] == [1, 2]
    assert [str(space.options(point)["x"]) for point in points] == list(map(str, values))
    assert len({space.shown(point)["x"] for point in points}) == len(values)
    assert [point["x"] for point in space.corners()][: len(values)] == labels


def test_two_parameters_do_not_set_one_option():
    space = Space({"x": {"options": {"a": {"m": 1}, "b": {"n": 2}}}, "m": {"choices": [3, 4], "when": {"x": "b"}}})
    assert [space.options(point) for point in space.grid()] == [{"m": 1}, {"n": 2, "m": 3}, {"n": 2, "m": 4}]
    space = Space({"x": {"options": {"a": {"m": 1}, "b": {"n": 2}}}, "m": [3, 4]})
    with pytest.raises(ValueError, match="m=3 and an earlier parameter both set m; leave it in one of them"):
        space.options(space.grid()[0])


def test_a_grid_without_end_is_refused():
    with pytest.raises(ValueError, match="with f a grid has more than 100,000 points; leave"):
        Space({name: list(range(10)) for name in "abcdefghij"}).grid()


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
        ({"low": 0.1, "high": 0.7, "step": 0.1}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ({"low": 0, "high": 1, "step": 0.25}, [0, 0.25, 0.5, 0.75, 1]),
        ({"low": 0, "high": 3, "step": 1.5}, [0, 1.5, 3]),
        ({"low": 1e-4, "high": 1e-2, "log": True}, [1e-4, 1e-2]),
    ],
)
def test_ranges(entry, values):
    parameter = Space({"x": entry}).parameters["x"]
    assert list(parameter.values) == values
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [Space({"x": entry}).suggest(study.ask())["x"] for _ in range(50)]
    assert all(entry["low"] <= value <= entry["high"] + 1e-12 for value in drawn) and len(set(drawn)) >= 3
    assert all(type(value) is type(parameter.values[0]) for value in drawn)
    if "step" in entry:
        assert set(drawn) <= set(parameter.values), "no 0.30000000000000004 for 0.3"
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
        ({"x": {"low": 1}}, "x.high=None must be a finite number"),
        ({"x": {"low": "1", "high": 2}}, "x.low='1' must be a finite number"),
        ({"x": {"low": 1, "high": math.inf, "step": 1}}, "x.high=inf must be a finite number"),
        ({"x": {"low": 1, "high": 2, "step": math.nan}}, "x.step=nan must be a finite number"),
        ({"x": {"low": 0, "high": 1, "step": -0.5}}, "x.step=-0.5 must be above 0"),
        ({"x": {"low": 0, "high": 1e9, "step": 1e-3}}, "x.step=0.001 makes more than 100,000 steps"),
        ({"x": {"low": 1, "high": 2, "log": "no"}}, "x.log='no' must be true or false"),
        ({"x": [1, math.inf]}, r"x=\[1, inf\] must be a finite number"),
        ({"x": {"options": {"a": {"y": [math.nan]}}}}, r"x.options.a: y=\[nan\] must be a finite number"),
        ({"x": [[8, 8], "[8, 8]"]}, r"x has \[8, 8\] and '\[8, 8\]', which are both given as \[8, 8\]; keep one"),
        ({"x": [True, "true"]}, "x has True and 'true', which are both given as true; keep one"),
        ({"x": [1e-4, 1, 1e-4]}, "x has 0.0001 and 0.0001, which are both given as 0.0001; keep one"),
        ({"x": {"options": {None: {}, "null": {}}}}, "x has None and 'null', which are both given as null"),
        ({3: [1, 2]}, "3 must be a text, the name of an option"),
        ({"x": {"low": 3, "high": 2}}, "x: `low <= high` must hold"),
        ({"x": {"low": 0, "high": 2, "log": True}}, "x: `low >= 1` must hold"),
        ({"x": {"low": 0, "high": 2, "step": 0.7}}, "divide"),
        ({"x": {"low": 0, "high": 2, "lgo": True}}, "'lgo'"),
        ({"x": {"choices": [1], "when": {"y": 1}}}, "names 'y', which is not a list of choices above it"),
        ({"y": [1, 2], "x": {"choices": [1], "when": {"y": 3}}}, "y=3 is not among 1, 2"),
        ({"y": [1, 2], "x": {"choices": [1], "when": {"y": []}}}, r"y=\[\] never holds"),
        ({"x": {"choices": [1], "when": 3}}, "when=3 must be"),
    ],
)
def test_what_a_space_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Space(given)


def test_a_grid_needs_steps():
    with pytest.raises(ValueError, match="x needs a step, or choices"):
        Space({"x": {"low": 0.0, "high": 1.0}}).grid()
