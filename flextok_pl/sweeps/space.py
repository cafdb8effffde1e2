"""The search space of a sweep: what each parameter may be, and what it sets in an experiment."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from math import isclose
from typing import Any

from optuna.trial import BaseTrial

Value = bool | int | float | str | None
"""What Optuna knows of a parameter: a number, or the label of a choice."""

Params = dict[str, Value]
"""A point of the space; parameters whose condition does not hold are not in it."""

MOST_POINTS = 100_000
"""Points of a grid, or steps of a range, above which a space is taken for a mistake."""


def as_text(value: Any) -> str:
    """A value as the command line takes it: a text as it is, anything else as JSON.

    Raises:
        ValueError: it has no JSON, as infinity and NaN have none.
    """
    try:
        return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} must be a finite number, a text, true, false, null, or made of these") from None


def require_plain(where: str, options: Mapping[Any, Any]) -> None:
    """Check that the command line can take options with these values.

    Raises:
        ValueError: it cannot; names the option.
    """
    for name, value in options.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}: {name!r} must be the name of an option, such as model.lr")
        try:
            as_text(value)
        except ValueError as error:
            raise ValueError(f"{where}: {name}={error}") from None


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

    def exact(self, value: Value) -> Value:
        """The label."""
        return value

    def shown(self, value: Value) -> str:
        """A label for people."""
        return _shown(value)


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
        return self.exact(trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log))

    def values(self) -> list[Value]:
        """All steps; without a step both ends."""
        if self.step is None:
            return [self.low, self.high]
        return [self._value(number) for number in range(round((self.high - self.low) / self.step) + 1)]

    def options(self, name: str, value: Value) -> Mapping[str, Any]:
        """What a value sets: the option that the parameter is called after."""
        return {name: value}

    def exact(self, value: Value) -> Value:
        """The step that Optuna means: adding up binary fractions, it comes to 0.30000000000000004 for 0.3."""
        if self.step is None or not isinstance(value, float):
            return value
        return self._value(round((value - self.low) / self.step))

    def shown(self, value: Value) -> str:
        """A number for people; without steps, four digits of it."""
        return f"{value:.4g}" if isinstance(value, float) and self.step is None else _shown(value)

    def _value(self, number: int) -> int | float:
        assert self.step is not None
        value = Decimal(str(self.low)) + number * Decimal(str(self.step))
        whole = isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int)
        return int(value) if whole else float(value)


class Space:
    """Several parameters.

    Args:
        given: as a sweep's file has them. Parameter -> a list of values; or a mapping with `choices` (a list of
            values), `options` (label -> option -> value) or `low` and `high` (with `log`, `step`); the mapping may have
            `when` (earlier parameter -> its value or values). Except with `options`, a parameter is called after the
            option of the experiment that it sets.

    Raises:
        ValueError: a parameter is none of these, has a value twice or one that is not finite, or its condition cannot
            hold.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.parameters: dict[str, Choice | Range] = {}
        for name, entry in given.items():
            if not isinstance(name, str):
                raise ValueError(f"space: {name!r} must be a text, the name of an option")
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
        """What a point sets: option of the experiment -> value.

        Raises:
            ValueError: two parameters set the same option.
        """
        result: dict[str, Any] = {}
        for name, value in point.items():
            options = self.parameters[name].options(name, value)
            if both := sorted(result.keys() & options):
                raise ValueError(
                    f"space: {name}={value} and an earlier parameter both set {both[0]}; leave it in one of them, or "
                    "keep them apart by `when`"
                )
            result |= options
        return result

    def exact(self, point: Mapping[str, Value]) -> Params:
        """A point as it was asked for, of what Optuna keeps of it."""
        return {name: self.parameters[name].exact(value) for name, value in point.items()}

    def shown(self, point: Mapping[str, Value]) -> dict[str, str]:
        """The values of a point for people."""
        return {name: self.parameters[name].shown(value) for name, value in self.exact(point).items()}

    def grid(self) -> list[Params]:
        """All points, the last parameter varying fastest.

        Raises:
            ValueError: a range has no step, or there are more than `MOST_POINTS`.
        """
        for name, parameter in self.parameters.items():
            if isinstance(parameter, Range) and parameter.step is None:
                raise ValueError(f"space: {name} needs a step, or choices, for search=grid")
        points: list[Params] = [{}]
        for name, parameter in self.parameters.items():
            values = parameter.values()
            if len(points) * len(values) > MOST_POINTS:
                raise ValueError(
                    f"space: with {name} a grid has more than {MOST_POINTS:,} points; leave values out, or draw some "
                    "by search=random"
                )
            longer: list[Params] = []
            for point in points:
                if _holds(parameter.when, point):
                    longer += [{**point, name: value} for value in values]
                else:
                    longer.append(point)
            points = longer
        return points

    def corners(self) -> Iterator[Params]:
        """Points in which each value occurs (of a range without steps each end), with the others' first ones."""
        seen = set()
        for name, parameter in self.parameters.items():
            for value in parameter.values():
                point = self._completed({name: value})
                if frozenset(point.items()) not in seen:
                    seen.add(frozenset(point.items()))
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
            require_plain("space", {name: chosen})
            return Choice(dict(zip(_labels(name, chosen), ({name: value} for value in chosen), strict=True)), when)
        for label, options in chosen.items():
            if not isinstance(options or {}, Mapping):
                raise ValueError(f"space: {name}.options.{label}={options!r} must be options with their values")
            require_plain(f"space: {name}.options.{label}", options or {})
        return Choice(
            dict(zip(_labels(name, chosen), (options or {} for options in chosen.values()), strict=True)), when
        )

    def _condition(self, name: str, when: Any) -> dict[str, tuple[Value, ...]]:
        if not isinstance(when, Mapping):
            raise ValueError(f"space: {name}.when={when!r} must be parameters with their values")
        condition = {}
        for parent, values in when.items():
            found = self.parameters.get(parent)
            if not isinstance(found, Choice):
                raise ValueError(f"space: {name}.when names {parent!r}, which is no list of choices above it")
            known = {as_text(label): label for label in found.values()}
            wanted = [as_text(value) for value in (values if isinstance(values, list) else [values])]
            for text in wanted:
                if text not in known:
                    raise ValueError(f"space: {name}.when: {parent}={text} is not among {', '.join(known)}")
            if not wanted:
                raise ValueError(f"space: {name}.when: {parent}=[] never holds; name a value of {parent}")
            condition[parent] = tuple(known[text] for text in wanted)
        return condition


def _range(name: str, entry: Mapping[str, Any], when: dict[str, tuple[Value, ...]]) -> Range:
    for key in ("low", "high", "step"):
        value = entry.get(key)
        if (key, value) == ("step", None):
            continue
        # Half of the largest, so that high - low is finite, too.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max / 2:
            raise ValueError(f"space: {name}.{key}={value!r} must be a finite number")
    if not isinstance(entry.get("log", False), bool):
        raise ValueError(f"space: {name}.log={entry['log']!r} must be true or false")
    low, high, step, log = entry["low"], entry["high"], entry.get("step"), entry.get("log", False)
    if not low <= high:
        raise ValueError(f"space: {name}.low={low} must not be above high={high}")
    if log and (low <= 0 or step is not None):
        raise ValueError(f"space: {name}.log needs low={low} above 0 and no step={step}")
    if step is not None and (step <= 0 or not isclose((high - low) / step, round((high - low) / step), abs_tol=1e-9)):
        raise ValueError(f"space: {name}.step={step} must be above 0 and divide high - low = {high - low:g}")
    if step is not None and (high - low) / step > MOST_POINTS:
        raise ValueError(
            f"space: {name}.step={step} makes more than {MOST_POINTS:,} steps; enlarge it, or leave it out"
        )
    if isinstance(step, float) and step.is_integer():
        step = int(step)
    return Range(low, high, log, step, when)


def _labels(name: str, values: Iterable[Any]) -> list[Value]:
    """What Optuna knows values by: plain ones as they are, unless they equal or look like another, as 1 and true do.

    Raises:
        ValueError: two are the same to the command line.
    """
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
    """A value in few characters, but never as another one."""
    short = f"{value:.4g}" if isinstance(value, float) else str(value)
    return str(value) if isinstance(value, float) and float(short) != value else short


def _holds(when: Mapping[str, tuple[Value, ...]], point: Mapping[str, Any]) -> bool:
    return all(parent in point and point[parent] in values for parent, values in when.items())
