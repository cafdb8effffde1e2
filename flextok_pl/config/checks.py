"""Check configurations, find presets by name, and read configurations from plain JSON types."""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ValueT = TypeVar("ValueT")
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def as_tuples(config: object, *names: str) -> None:
    """Turn list options of a configuration into tuples."""
    for name in names:
        object.__setattr__(config, name, tuple(getattr(config, name)))


def at_least(config: object, **minima: int) -> None:
    """Check a configuration's options against their least values."""
    for name, least in minima.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")


def one_of(config: object, **choices: Any) -> None:
    """Check a configuration's options against the `Literal` of their choices."""
    for name, known in choices.items():
        if getattr(config, name) not in get_args(known):
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; use one of {get_args(known)}")


def nearest_multiples(number: int, step: int) -> str:
    """The multiples of `step` around a number, such as `96 or 112`; the number itself if it is a multiple."""
    below = number // step * step
    return " or ".join(str(each) for each in dict.fromkeys((below, below + step * (below != number))) if each > 0)


def preset_of(presets: Mapping[str, ValueT], name: str) -> ValueT:
    """Find a preset by name; a ValueError lists the known names."""
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; use one of {sorted(presets)}")
    return presets[name]


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a config from plain JSON types; ValueError for an unknown key or a wrong type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no option {unknown[0]!r}; its options are {sorted(fields)}")
    hints = get_type_hints(cls)
    return cls(**{name: _checked(name, value, hints[name]) for name, value in values.items()})


def _checked(name: str, value: Any, hint: Any) -> Any:
    """Return `value` if it fits `hint`, with lists converted to tuples and mappings to configs."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        origin = get_origin(option)
        if origin is Literal and value in get_args(option):
            return value
        if origin is tuple and isinstance(value, list | tuple):
            arguments = get_args(option)
            items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(items) == len(value):
                return tuple(_checked(f"{name}[{i}]", v, t) for i, (v, t) in enumerate(zip(value, items, strict=True)))
        if dataclasses.is_dataclass(option) and isinstance(option, type) and isinstance(value, Mapping):
            return config_from_dict(option, value)
        if option is float and type(value) in (int, float):
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    raise ValueError(f"{name}={value!r} has the wrong type; it must be {hint}")
