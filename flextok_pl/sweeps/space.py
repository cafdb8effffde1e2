"""The search space of a sweep: the values of each parameter, and the options that they set in an experiment.

Optuna draws the values. It knows a choice by a label, so that lists, and values that Python takes for equal, can be
searched. A parameter may exist only at some values of an earlier one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import isclose
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

Value = bool | int | float | str | None
"""A parameter's value for Optuna: a number, or the label of a choice."""

Params = dict[str, Value]
"""A point of the space, without the parameters whose condition does not hold."""

Condition = Mapping[str, tuple[Value, ...]]
"""Earlier parameter -> its values at which a parameter exists."""

MOST_POINTS = 100_000
"""Largest number of points of a grid, or of steps of a range; more count as a mistake."""

KEYS = {"choices": {"choices"}, "options": {"options"}, "low": {"low", "high", "log", "step"}}
"""The key that marks a kind of parameter -> all keys that it may have, beside `when`."""


def as_text(value: Any) -> str:
    """A value as the command line takes it: a text as it is, anything else as JSON, which has no infinity or NaN."""
    try:
        return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} must be a finite number, a text, true, false, null, or made of these") from None


def require_plain(where: str, options: Mapping[Any, Any]) -> None:
    """Check that the command line can take options with these values."""
    for name, value in options.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}: {name!r} must be the name of an option, such as model.lr")
        try:
            as_text(value)
        except ValueError as error:
            raise ValueError(f"{where}: {name}={error}") from None


@dataclass(frozen=True)
class Parameter:
    """One parameter of a space.

    `overrides` belong to a choice: label -> option of the experiment -> value. A range sets the option of its name.
    """

    law: CategoricalDistribution | FloatDistribution | IntDistribution  # which Optuna draws from
    values: Sequence[Value]  # all of them; of a range without a step, both ends
    when: Condition
    overrides: Mapping[Value, Mapping[str, Any]] | None = None
    stepped: bool = True  # whether there are no other values

    def exists(self, point: Mapping[str, Any]) -> bool:
        """Whether its condition holds, given the values of earlier parameters."""
        return all(parent in point and point[parent] in values for parent, values in self.when.items())

    def suggest(self, trial: BaseTrial, name: str) -> Value:
        """Let the search choose a value."""
        law = self.law
        if isinstance(law, CategoricalDistribution):
            return trial.suggest_categorical(name, law.choices)
        if isinstance(law, IntDistribution):
            return trial.suggest_int(name, law.low, law.high, step=law.step, log=law.log)
        return self.exact(trial.suggest_float(name, law.low, law.high, step=law.step, log=law.log))

    def exact(self, value: Value) -> Value:
        """The step that Optuna means: adding up binary fractions, it gets 0.30000000000000004 for 0.3."""
        if isinstance(self.law, FloatDistribution) and self.law.step is not None:
            assert isinstance(value, int | float)
            return self.values[round((value - self.law.low) / self.law.step)]
        return value

    def shown(self, value: Value) -> str:
        """A value as text for people; with four digits in a range without steps."""
        return f"{value:.4g}" if isinstance(value, float) and not self.stepped else _shown(value)


class Space:
    """The parameters of a search.

    Args:
        given: the space in a sweep's file: parameter -> a list of values, or a mapping. The mapping has `choices` (a
            list of values), `options` (label -> option -> value) or `low` and `high` (with `log`, `step`). It may have
            `when` (earlier parameter -> its value or values). Except with `options`, a parameter has the name of the
            option that it sets.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.parameters: dict[str, Parameter] = {}
        for name, entry in given.items():
            if not isinstance(name, str):
                raise ValueError(f"space: {name!r} must be a text, the name of an option")
            self.parameters[name] = self._parameter(name, entry)
        if not self.parameters:
            raise ValueError("space is empty; name an option of the experiment, such as model.lr: [1e-3, 3e-3]")

    def suggest(self, trial: BaseTrial) -> Params:
        """Let the search choose a point."""
        point: Params = {}
        for name, parameter in self.parameters.items():
            if parameter.exists(point):
                point[name] = parameter.suggest(trial, name)
        return point

    def options(self, point: Mapping[str, Value]) -> dict[str, Any]:
        """The options that a point sets: name -> value. No two parameters may set the same."""
        result: dict[str, Any] = {}
        for name, value in point.items():
            overrides = self.parameters[name].overrides
            options = {name: value} if overrides is None else overrides[value]
            if both := sorted(result.keys() & options):
                raise ValueError(
                    f"space: {name}={value} and an earlier parameter both set {both[0]}; leave it in one of them, or "
                    "keep them apart by `when`"
                )
            result |= options
        return result

    def exact(self, point: Mapping[str, Value]) -> Params:
        """A point as it was given, from Optuna's copy of it."""
        return {name: self.parameters[name].exact(value) for name, value in point.items()}

    def shown(self, point: Mapping[str, Value]) -> dict[str, str]:
        """The values of a point as text for people."""
        return {name: self.parameters[name].shown(value) for name, value in self.exact(point).items()}

    def grid(self) -> list[Params]:
        """All points, at most `MOST_POINTS`, the last parameter varying fastest; each range must have a step."""
        points: list[Params] = [{}]
        for name, parameter in self.parameters.items():
            if not parameter.stepped:
                raise ValueError(f"space: {name} needs a step, or choices, for search=grid")
            if len(points) * len(parameter.values) > MOST_POINTS:
                raise ValueError(
                    f"space: with {name} a grid has more than {MOST_POINTS:,} points; leave values out, or draw some "
                    "by search=random"
                )
            points = [
                point | added
                for point in points
                for added in ([{name: value} for value in parameter.values] if parameter.exists(point) else [{}])
            ]
        return points

    def corners(self) -> Iterator[Params]:
        """Points in which each value occurs (both ends of a range without steps), with the others' first ones."""
        seen = set()
        for name, parameter in self.parameters.items():
            for value in parameter.values:
                point = self._completed({name: value})
                if frozenset(point.items()) not in seen:
                    seen.add(frozenset(point.items()))
                    yield point

    def _completed(self, wanted: Params) -> Params:
        """A point with these values, and with those that their conditions need."""
        for name in reversed(self.parameters):
            if name in wanted:
                wanted = {parent: values[0] for parent, values in self.parameters[name].when.items()} | wanted
        point: Params = {}
        for name, parameter in self.parameters.items():
            if parameter.exists(point):
                point[name] = wanted.get(name, parameter.values[0])
        return point

    def _parameter(self, name: str, entry: Any) -> Parameter:
        if isinstance(entry, list):
            entry = {"choices": entry}
        kind = next((kind for kind in KEYS if isinstance(entry, Mapping) and kind in entry), None)
        if kind is None:
            raise ValueError(
                f"space: {name}={entry!r} must be a list of values, or have `choices`, `options`, or `low` and `high`"
            )
        unknown = sorted(set(entry) - KEYS[kind] - {"when"})
        if unknown:
            raise ValueError(f"space: {name} has {kind!r} and cannot have {unknown[0]!r} as well")
        when = self._condition(name, entry.get("when") or {})
        if kind == "low":
            return _range(name, entry, when)
        given: Any = entry[kind]
        expected: Any = Mapping if kind == "options" else list
        if not isinstance(given, expected) or not given:
            form = "label: {option: value}" if kind == "options" else "a list of values"
            raise ValueError(f"space: {name}.{kind}={given!r} must be {form}, and not empty")
        if kind == "choices":
            require_plain("space", {name: given})
            overrides = [{name: value} for value in given]
        else:
            overrides = [options or {} for options in given.values()]
            for label, options in zip(given, overrides, strict=True):
                if not isinstance(options, Mapping):
                    raise ValueError(f"space: {name}.options.{label}={options!r} must be options with their values")
                require_plain(f"space: {name}.options.{label}", options)
        labels = _labels(name, given)
        return Parameter(CategoricalDistribution(labels), labels, when, dict(zip(labels, overrides, strict=True)))

    def _condition(self, name: str, when: Any) -> Condition:
        if not isinstance(when, Mapping):
            raise ValueError(f"space: {name}.when={when!r} must be parameters with their values")
        condition = {}
        for parent, values in when.items():
            found = self.parameters.get(parent)
            if found is None or found.overrides is None:
                raise ValueError(f"space: {name}.when names {parent!r}, which is not a list of choices above it")
            known = {as_text(label): label for label in found.values}
            wanted = [as_text(value) for value in (values if isinstance(values, list) else [values])]
            for text in wanted:
                if text not in known:
                    raise ValueError(f"space: {name}.when: {parent}={text} is not among {', '.join(known)}")
            if not wanted:
                raise ValueError(f"space: {name}.when: {parent}=[] never holds; name a value of {parent}")
            condition[parent] = tuple(known[text] for text in wanted)
        return condition


def _range(name: str, entry: Mapping[str, Any], when: Condition) -> Parameter:
    for key in ("low", "high", "step"):
        value = entry.get(key)
        if (key, value) == ("step", None):
            continue
        # Half of the largest, so that high - low is finite, too.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max / 2:
            raise ValueError(f"space: {name}.{key}={value!r} must be a finite number")
    low, high, step, log = entry["low"], entry["high"], entry.get("step"), entry.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"space: {name}.log={log!r} must be true or false")
    if isinstance(step, float) and step.is_integer():
        step = int(step)
    if step is not None and (step <= 0 or not isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9)):
        raise ValueError(f"space: {name}.step={step} must be above 0 and divide high - low = {high - low:g}")
    if step is not None and (high - low) / step > MOST_POINTS:
        raise ValueError(
            f"space: {name}.step={step} makes more than {MOST_POINTS:,} steps; enlarge it, or leave it out"
        )
    whole = all(isinstance(value, int) for value in (low, high, step or 1))
    try:
        law = IntDistribution(low, high, log, step or 1) if whole else FloatDistribution(low, high, log, step)
    except ValueError as error:
        raise ValueError(f"space: {name}: {error}") from None
    if step is None:
        return Parameter(law, (low, high), when, stepped=False)
    values = [Decimal(str(low)) + number * Decimal(str(step)) for number in range(round((high - low) / step) + 1)]
    return Parameter(law, [int(value) if whole else float(value) for value in values], when)


def _labels(name: str, values: Iterable[Any]) -> list[Value]:
    """Optuna's names of values: plain ones as they are, unless they equal or look like another, as 1 and true do."""
    texts: dict[str, Any] = {}
    for value in values:
        text = as_text(value)
        if text in texts:
            raise ValueError(
                f"space: {name} has {texts[text]!r} and {value!r}, which are both given as {text}; keep one"
            )
        texts[text] = value
    plain = [value for value in texts.values() if isinstance(value, Value)]
    equal, alike = Counter(plain), Counter(map(_shown, plain))
    return [
        value if isinstance(value, Value) and equal[value] == alike[_shown(value)] == 1 else text
        for text, value in texts.items()
    ]


def _shown(value: Value) -> str:
    """A value in few characters, distinct from any other."""
    short = f"{value:.4g}" if isinstance(value, float) else str(value)
    return str(value) if isinstance(value, float) and float(short) != value else short
