"""The search space of a sweep: what each parameter may be, and what it sets in an experiment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isclose
from typing import Any

from optuna.trial import BaseTrial

Value = bool | int | float | str | None
"""What Optuna knows of a parameter: a number, or the label of a choice."""

Params = dict[str, Value]
"""A point of the space; parameters whose condition does not hold are not in it."""


@dataclass(frozen=True)
class Choice:
    """One of several values, or of several named sets of options.

    Args:
        overrides: label -> option of the experiment -> value.
        when: parameter -> values of it at which this one exists.
    """

    overrides: Mapping[Value, Mapping[str, Any]]
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def suggest(self, trial: BaseTrial, name: str) -> Value:
        """Let the search choose."""
        return trial.suggest_categorical(name, self.values())

    def values(self) -> list[Value]:
        """All labels."""
        return list(self.overrides)

    def options(self, name: str, value: Value) -> Mapping[str, Any]:
        """What a label sets."""
        return self.overrides[value]


@dataclass(frozen=True)
class Range:
    """A number between two others, both of which it can be.

    Args:
        low: the least; whole numbers only if both ends are, and the step.
        high: the greatest.
        log: search its logarithm.
        step: only low, low + step, ...
        when: as for `Choice`.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def suggest(self, trial: BaseTrial, name: str) -> Value:
        """Let the search choose."""
        step = 1 if self.step is None else self.step
        if isinstance(self.low, int) and isinstance(self.high, int) and isinstance(step, int):
            return trial.suggest_int(name, self.low, self.high, step=step, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def values(self) -> list[Value]:
        """All steps; without a step both ends."""
        if self.step is None:
            return [self.low, self.high]
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + i * self.step for i in range(count)]

    def options(self, name: str, value: Value) -> Mapping[str, Any]:
        """What a value sets: the option that the parameter is called after."""
        return {name: value}


class Space:
    """Several parameters.

    Args:
        given: as a sweep's file has them. Parameter -> a list of values; or a mapping with `choices` (a list of
            values), `options` (label -> option -> value) or `low` and `high` (with `log`, `step`); the mapping may have
            `when` (earlier parameter -> its value or values). Except with `options`, a parameter is called after the
            option of the experiment that it sets.

    Raises:
        ValueError: a parameter is none of these, or its condition cannot hold.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.parameters: dict[str, Choice | Range] = {}
        for name, entry in given.items():
            self.parameters[name] = self._parameter(name, entry)
        if not self.parameters:
            raise ValueError("space is empty; name an option of the experiment, such as model.lr: [1e-3, 3e-3]")

    @property
    def conditional(self) -> bool:
        """Whether some parameters only exist at some values of others."""
        return any(parameter.when for parameter in self.parameters.values())

    def suggest(self, trial: BaseTrial) -> Params:
        """A point that the search chooses."""
        point: Params = {}
        for name, parameter in self.parameters.items():
            if _holds(parameter.when, point):
                point[name] = parameter.suggest(trial, name)
        return point

    def options(self, point: Mapping[str, Value]) -> dict[str, Any]:
        """What a point sets: option of the experiment -> value."""
        result: dict[str, Any] = {}
        for name, value in point.items():
            result |= self.parameters[name].options(name, value)
        return result

    def grid(self) -> list[Params]:
        """All points, the last parameter varying fastest.

        Raises:
            ValueError: a range has no step.
        """
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Range) and parameter.step is None:
                raise ValueError(f"space: {name} needs a step, or choices, for search=grid")
        points: list[Params] = [{}]
        for name, parameter in self.parameters.items():
            longer: list[Params] = []
            for point in points:
                if _holds(parameter.when, point):
                    longer += [{**point, name: value} for value in parameter.values()]
                else:
                    longer.append(point)
            points = longer
        return points

    def corners(self) -> Iterator[Params]:
        """Points in which each value occurs (of a range without steps each end), with the others' first ones."""
        seen = []
        for name, parameter in self.parameters.items():
            for value in parameter.values():
                point = self._completed({name: value})
                if point not in seen:
                    seen.append(point)
                    yield point

    def _completed(self, wanted: Params) -> Params:
        """A point with these values, and what their conditions ask for."""
        for name in reversed(self.parameters):
            if name in wanted:
                conditions = self.parameters[name].when
                wanted = {**{parent: values[0] for parent, values in conditions.items()}, **wanted}
        point: Params = {}
        for name, parameter in self.parameters.items():
            if _holds(parameter.when, point):
                point[name] = wanted.get(name, parameter.values()[0])
        return point

    def _parameter(self, name: str, entry: Any) -> Choice | Range:
        if isinstance(entry, list):
            entry = {"choices": entry}
        kinds = {"choices": set(), "options": set(), "low": {"high", "log", "step"}}
        kind = next((kind for kind in kinds if isinstance(entry, Mapping) and kind in entry), None)
        if kind is None:
            raise ValueError(
                f"space: {name}={entry!r} must be a list of values, or have `choices`, `options`, or `low` and `high`"
            )
        unknown = sorted(set(entry) - kinds[kind] - {kind, "when"})
        if unknown:
            raise ValueError(f"space: {name} has {kind!r} and cannot have {unknown[0]!r} as well")
        when = self._condition(name, entry.get("when") or {})
        if kind == "low":
            return _range(name, entry, when)
        chosen: Any = entry[kind]
        expected: Any = Mapping if kind == "options" else list
        if not isinstance(chosen, expected) or not chosen:
            form = "label: {option: value}" if kind == "options" else "a list of values"
            raise ValueError(f"space: {name}.{kind}={chosen!r} must be {form}, and not empty")
        if kind == "choices":
            return Choice({_label(value): {name: value} for value in chosen}, when)
        for label, options in chosen.items():
            if not isinstance(options or {}, Mapping):
                raise ValueError(f"space: {name}.options.{label}={options!r} must be options with their values")
        return Choice({label: options or {} for label, options in chosen.items()}, when)

    def _condition(self, name: str, when: Any) -> dict[str, tuple[Value, ...]]:
        if not isinstance(when, Mapping):
            raise ValueError(f"space: {name}.when={when!r} must be parameters with their values")
        condition = {}
        for parent, values in when.items():
            found = self.parameters.get(parent)
            if not isinstance(found, Choice):
                raise ValueError(f"space: {name}.when names {parent!r}, which is no list of choices above it")
            labels = tuple(map(_label, values if isinstance(values, list) else [values]))
            for label in labels:
                if label not in found.values():
                    raise ValueError(f"space: {name}.when: {parent}={label!r} is not among {found.values()}")
            condition[parent] = labels
        return condition


def _range(name: str, entry: Mapping[str, Any], when: dict[str, tuple[Value, ...]]) -> Range:
    for key in ("low", "high", "step"):
        value = entry.get(key)
        if isinstance(value, bool) or (not isinstance(value, int | float) and (key, value) != ("step", None)):
            raise ValueError(f"space: {name}.{key}={value!r} must be a number")
    low, high, step, log = entry["low"], entry["high"], entry.get("step"), entry.get("log", False)
    if not low <= high:
        raise ValueError(f"space: {name}.low={low} must not be above high={high}")
    if log and (low <= 0 or step is not None):
        raise ValueError(f"space: {name}.log needs low={low} above 0 and no step={step}")
    if step is not None and (step <= 0 or not isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9)):
        raise ValueError(f"space: {name}.step={step} must be above 0 and divide high - low = {high - low:g}")
    if isinstance(step, float) and step.is_integer():
        step = int(step)
    return Range(low, high, bool(log), step, when)


def _label(value: Any) -> Value:
    """Optuna takes plain values only; anything else goes by its JSON."""
    return value if isinstance(value, Value) else json.dumps(value)


def _holds(when: Mapping[str, tuple[Value, ...]], point: Mapping[str, Any]) -> bool:
    return all(parent in point and point[parent] in values for parent, values in when.items())
