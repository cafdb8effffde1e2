"""Read and write a configuration of named classes by a table of its modules, without importing any of them.

Each option of a module either states a fact of the model, or must have the value that our model implements, or does not
affect the function. Modules pass tensors under names (`..._key`) that differ between sources. If the order and kinds of
modules determine the computation, these names are ignored; otherwise (`Sequence.by_flow`) they are followed.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

REQUIRED = object()  # default of a required option
LAWS = ("uniform", "pow2", "uniform_pow2")  # laws of nested dropout in the official code


def _whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value < 2**31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list(value: Any, least: int) -> bool:
    return isinstance(value, list | tuple) and all(_whole(item, least) for item in value)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a positive integer", _whole),
    "size?": ("a positive integer or null", lambda v: v is None or _whole(v)),
    "sizes": ("a list of positive integers", lambda v: _list(v, 1)),
    "indices?": ("a list of integers", lambda v: v is None or _list(v, 0)),
    "even": ("a positive even integer", lambda v: _whole(v) and v % 2 == 0),
    "number": ("a number", _number),
    "positive": ("a positive number", lambda v: _number(v) and v > 0),
    "positive?": ("a positive number or null", lambda v: v is None or (_number(v) and v > 0)),
    "probability": ("a probability", lambda v: _number(v) and 0 <= v <= 1),
    "flag": ("true or false", lambda v: type(v) is bool),
    "text": ("a string", lambda v: type(v) is str),
    "law": (f"one of {LAWS}", lambda v: v in LAWS),
}


class Option(NamedTuple):
    """Allowed values of a module's option; made by `fact`, `fixed` or `training`."""

    wanted: str  # in words
    fits: Callable[[Any], bool]
    default: Any  # default in the official code
    written: Any  # value to write if it states no fact
    fact: str = ""  # fact of the model that it states; options that state the same fact must agree
    training: bool = False  # a wrong value affects training only


class Module:
    """One module of an official configuration, which may name only the class `target`.

    Each option to write is an `Option`, a `Module` within this one, or a value. A value is for an option that does not
    affect the function, and which may have any value when read.
    """

    def __init__(self, target: str, **options: Any) -> None:
        self.target, self.options = target, options
        self.also: dict[str, Any] = {}

    def taking(self, *ignored: str, **also: Any) -> Self:
        """Accept further options, which are not written: `ignored` ones without effect, and others; returns self."""
        self.also |= {**dict.fromkeys(ignored), **also}
        return self


@dataclass(frozen=True)
class Sequence:
    """Modules that work one after the other."""

    target: str  # the only class that it may name
    modules: Mapping[str, Module]
    aside: str = ""  # part of the name of modules that do not change what is decoded and may be missing
    aside_targets: tuple[str, ...] = ()  # classes that those modules may name
    by_flow: bool = False  # accept any order in which each module reads the output of the same modules

    def is_aside(self, name: str) -> bool:
        """Check that a module of this name does not change what is decoded."""
        return bool(self.aside) and self.aside in name


Part = Module | Sequence


def fact(name: str, kind: str, default: Any = REQUIRED) -> Option:
    """Make an option that states a fact of the model, of a kind in `_KINDS`."""
    wanted, fits = _KINDS[kind]
    return Option(wanted, fits, default, None, name)


def fixed(*values: Any, default: Any = ...) -> Option:
    """Make an option that must have one of these values; the first is written, and is the default of `default`."""

    def fits(value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in values)

    return Option(" or ".join(map(repr, values)), fits, values[0] if default is ... else default, values[0])


def training(neutral: Any) -> Option:
    """Make an option that affects training only, unless it has this value, the official default."""
    return Option(repr(neutral), lambda value: value == neutral, neutral, neutral, training=True)


def fact_names(parts: Mapping[str, Part]) -> set[str]:
    """The facts that a configuration states."""
    modules = [m for each in parts.values() for m in (each.modules.values() if isinstance(each, Sequence) else [each])]
    return {each.fact for m in modules for each in (m.options | m.also).values() if isinstance(each, Option)}


def entries_of(official: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The modules of a sequence, by name; empty if it is malformed, which `read` refuses."""
    values = official.get(part)
    entries = values.get("module_dict") if isinstance(values, dict) else None
    return entries if isinstance(entries, dict) else {}


def by_our_names(
    official: Mapping[str, Any], parts: Mapping[str, Part]
) -> tuple[dict[str, Any], dict[tuple[str, str], str]]:
    """Rename modules to our names; returns also their own names by part and our name.

    A module with another name is matched to the only one of its kind in the table that is still missing.
    """
    renamed, names = dict(official), dict[tuple[str, str], str]()
    for name, part in parts.items():
        entries = entries_of(official, name)
        if isinstance(part, Sequence) and entries:
            ours = {each: _our_name(each, entries, part) for each in entries}
            if len(set(ours.values())) == len(ours):
                renamed[name] = official[name] | {"module_dict": {ours[each]: entries[each] for each in entries}}
                names |= {(name, our): each for each, our in ours.items()}
    return renamed, names


def _our_name(name: str, entries: Mapping[str, Any], part: Sequence) -> str:
    if name in part.modules or part.is_aside(name):
        return name
    same = [
        each
        for each, module in part.modules.items()
        if each not in entries and _classes(_written(module, {})) == _classes(entries[name])
    ]
    return same[0] if len(same) == 1 else name


def _classes(entry: Any) -> list[Any]:
    """The class that an entry names, and then those of its options."""
    values = entry if isinstance(entry, dict) else {}
    return [each.get("_target_") for each in (values, *values.values()) if isinstance(each, dict)]


def read(official: Mapping[str, Any], target: str, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Read the facts that a configuration, plain data, states; null facts are left out."""
    unknown = sorted(set(official) - {"_target_", *parts})
    if unknown:
        raise ValueError(f"the configuration has an unknown part {unknown[0]!r}; the parts are {', '.join(parts)}")
    _check_target("the configuration", {"_target_": target, **official}, target)
    facts: dict[str, Any] = {}
    stated_by: dict[str, str] = {}
    for name, part in parts.items():
        for path, module, entry in _entries(name, official.get(name), part):
            for option, fact, value in _stated(path, entry, module):
                if facts.setdefault(fact, value) != value:
                    both = f"{stated_by[fact]}={facts[fact]} and {option}={value}"
                    raise ValueError(f"{both} differ; this model has one value for both")
                stated_by.setdefault(fact, option)
    return facts


def write(facts: Mapping[str, Any], target: str, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Write the configuration that states these facts."""
    official: dict[str, Any] = {"_target_": target}
    for name, part in parts.items():
        if isinstance(part, Module):
            official[name] = _written(part, facts)
        else:
            entries = {each: _written(module, facts) for each, module in part.modules.items()}
            official[name] = {"_target_": part.target, "module_dict": entries}
    return official


def _entries(name: str, values: Any, part: Part) -> list[tuple[str, Module, Any]]:
    """Path, module and entry of each module of a part, in our order, without those aside."""
    if isinstance(part, Module):
        return [(name, part, values)]
    _check_target(name, values, part.target)
    entries = values.get("module_dict")
    if set(values) - {"_target_", "module_dict"} or not isinstance(entries, dict):
        raise ValueError(f"{name} must consist of a mapping 'module_dict'; it has {sorted(values)}")
    for each, entry in entries.items():
        if part.is_aside(each):
            _check_target(f"{name}.{each}", entry, *part.aside_targets)
        elif each not in part.modules:
            raise ValueError(f"{name} has an unknown module {each!r}; the function may depend on it")
    found, wanted = ([each for each in names if not part.is_aside(each)] for names in (entries, part.modules))
    missing = [each for each in wanted if each not in found]
    if missing or (found != wanted and not part.by_flow):
        problem = f"lacks {missing[0]!r}" if missing else f"has its modules in another order: {', '.join(found)}"
        raise ValueError(f"{name} {problem}; they must be {', '.join(wanted)}")
    if part.by_flow:
        _check_flow(name, entries, {each: _written(part.modules[each], {}) for each in wanted})
    return [(f"{name}.{each}", part.modules[each], entries[each]) for each in wanted]


def _check_flow(path: str, entries: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Check that each module reads the output of the same modules as in our own order."""
    found = _writers(entries)
    for (module, option), wanted in _writers(ours).items():
        writers = found.get((module, option))
        if writers != wanted:
            where = f"{path}.{module}.{option}={_short(entries[module].get(option))}"
            said = "it is missing" if writers is None else f"that is written by {_listed(writers)}"
            raise ValueError(f"{where}: {said}; it must name the output of {_listed(wanted)}")


def _writers(entries: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """The modules that last wrote each input, by the reader's name and option; "" for inputs from outside."""
    last: dict[str, str] = {}
    found: dict[tuple[str, str], list[str]] = {}
    for name, entry in entries.items():
        passed = {
            option: [repr(key) for key in (value if isinstance(value, list | tuple) else [value])]
            for option, value in (entry if isinstance(entry, dict) else {}).items()
            if option.endswith(("_key", "_keys")) and value is not None
        }
        reads = {option: keys for option, keys in passed.items() if "read" in option}
        found |= {(name, option): sorted(last.get(key, "") for key in keys) for option, keys in reads.items()}
        for option, keys in passed.items():
            if "write" in option:
                last |= dict.fromkeys(keys, name)
    return found


def _listed(writers: list[str]) -> str:
    return " and ".join(each or "no module before it" for each in writers)


def _stated(path: str, values: Any, module: Module) -> list[tuple[str, str, Any]]:
    """Option, name and value of each fact that a module's entry states; checks all its options."""
    _check_target(path, values, module.target)
    options = module.also | module.options
    for key, value in values.items():
        if key not in options and key != "_target_" and not key.endswith(("_key", "_keys")):
            raise ValueError(f"{path} has an unknown option {key!r}={_short(value)}; the function may depend on it")
    stated = []
    for key, option in options.items():
        where = f"{path}.{key}"
        if isinstance(option, Module):
            stated += _stated(where, values.get(key), option)
        elif isinstance(option, Option):
            value = values.get(key, option.default)
            if value is REQUIRED:
                raise ValueError(f"{where} is missing; it must be {option.wanted}")
            if not option.fits(value):
                if not option.training:
                    raise ValueError(f"{where}={_short(value)} must be {option.wanted}")
                warnings.warn(f"{where}={value!r} is not reproduced; it only affects training", stacklevel=2)
            if option.fact and value is not None:
                stated.append((where, option.fact, tuple(value) if isinstance(value, list) else value))
    return stated


def _written(module: Module, facts: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"_target_": module.target}
    for key, option in module.options.items():
        if isinstance(option, Module):
            entry[key] = _written(option, facts)
        elif isinstance(option, Option):
            value = facts.get(option.fact, option.written)
            entry[key] = list(value) if isinstance(value, tuple) else value
        else:
            entry[key] = option
    return entry


def _check_target(path: str, values: Any, *targets: str) -> None:
    """Check the class that an entry names."""
    if not isinstance(values, dict):
        raise ValueError(f"{path} is a {type(values).__name__} instead of a mapping")
    named = values.get("_target_")
    if named not in targets:
        text = named if isinstance(named, str) else repr(named)
        raise ValueError(f"{path} names {text[:100]}; it must name {' or '.join(targets)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
