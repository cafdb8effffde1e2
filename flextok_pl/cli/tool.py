"""Runs commands that are one plain function, whose signature defines their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from flextok_pl.cli import load
from flextok_pl.cli.commands import COMMANDS
from flextok_pl.data.shards.index import ShardIndex


def run(command: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of a command, call its function, and print the shard sets that it wrote."""
    function = load(COMMANDS[command].options[0])
    made = function(**parsed(tool_parser(command, function), arguments))
    for index in made.values() if isinstance(made, dict) else [made]:
        if isinstance(index, ShardIndex):
            print(f"{index.folder}: samples: {index.num_samples:,}, shards: {len(index.shards):,}")


def tool_parser(command: str, function: Callable[..., Any]) -> ArgumentParser:
    """Make a parser of a function's parameters, each by its name."""
    parser = ArgumentParser(prog=f"flextok {command}")
    parser.add_function_arguments(function, as_positional=False)
    return parser


def instances(command: str, arguments: Sequence[str], *kinds: type) -> tuple[list[Any], set[str]]:
    """Parse a command line into instances of the dataclasses that have its options; also return the names given.

    For an option below another one, that is the last part of its name.
    """
    parser = ArgumentParser(prog=f"flextok {command}")
    for kind in kinds:
        parser.add_class_arguments(kind, None)
    values = parsed(parser, arguments)
    made = [kind(**{each.name: values[each.name] for each in dataclasses.fields(kind)}) for kind in kinds]
    given = parser.parse_args(list(arguments), defaults=False)
    return made, {name.rpartition(".")[2] for name in given.keys()}  # noqa: SIM118 - of a Namespace


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """Parse the options of a command line."""
    return parser.instantiate_classes(parser.parse_args(list(arguments))).as_dict()  # type: ignore[no-any-return]
