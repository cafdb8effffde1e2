"""Checks a command line before anything heavy is imported: help, misspelt options, missing files.

The parser of a command decides in the end. It may still refuse what passes here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from glob import has_magic
from pathlib import Path
from typing import Any, NoReturn

import yaml

from flextok_pl.cli import base_config
from flextok_pl.cli.commands import COMMANDS, GIVEN_BY_THE_SUITE, GROUPS, TRAINER
from flextok_pl.cli.options import Option, Options, describe, description_of, options_of, unknown
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.errors import UserError

MODELS = ("VAEModule", "TokenizerModule", "PriorModule", "DistillationModule")
"""The classes of `flextok_pl.modules` that `model.class_path` can name."""

GENERAL = {
    "config": Option("FILE", help="experiment file; may be given several times, later files override earlier ones"),
    "print_config": Option("", help="print the whole configuration, and stop"),
    "seed_everything": Option("int | bool", "0", "seed of all random draws"),
    "ckpt_path": Option("str | null", help="checkpoint to resume from, or `last` for the experiment's newest"),
}
"""Options of all trainings; Lightning describes them at length or not at all."""

SUFFIXES = (".yaml", ".yml", ".json", ".safetensors", ".ckpt", ".npz")
"""Endings of values that name a file to read, except in `OUTPUTS`."""

OUTPUTS = ("json", "out", "dst")

MODEL_FILES = ("tokenizer", "prior", "vae", "ckpt_path", "weights", "teacher_weights", "init_from")
"""Options that name a file or folder if their value looks like a path; else it may be the id of a model."""


Named = list[tuple[str, str | None]]
"""Options and values in their order; None for an option without a value."""


def read(arguments: Sequence[str]) -> tuple[Named, list[str]]:
    """Separate options with their values from arguments without a name; each option takes one value.

    A `~` that begins a value becomes the home folder; the shell leaves the one in `--dst=~/shards`.
    """
    named: Named = []
    free, rest = [], list(arguments)
    while rest:
        first = rest.pop(0)
        if not first.startswith("-") or not first.lstrip("-")[:1].isalpha():
            free.append(os.path.expanduser(first))
            continue
        name, equals, value = first.lstrip("-").partition("=")
        name = {"c": "config", "h": "help"}.get(name, name)
        takes_next = not equals and name != "print_config" and rest and not rest[0].startswith("--")
        given = value if equals else rest.pop(0) if takes_next else None
        named.append((name, given and os.path.expanduser(given)))
    return named, free


def given_files(named: Named) -> list[Path]:
    """The files given by `--config`."""
    return [Path(value) for name, value in named if name == "config" and value is not None]


def answer(name: str, arguments: Sequence[str]) -> list[str]:
    """Answer a request for help, and check the names of options (with underscores), files and folders.

    Returns:
        The arguments under their current names; first what a training or a sweep takes without a name.
    """
    command = COMMANDS[name]
    named, free = read(arguments)
    paths = [Path(each) for each in free[:1]] if command.is_sweep else given_files(named)
    base = base_config(paths[0]) if paths and command.groups else None
    files = [(path, _content(path)) for path in ([] if base is None else [base]) + paths]
    options = options_for(name, _model_class(named, files))
    for given, value in named:
        if given == "help" or given.endswith(".help"):
            print("\n".join(_help(name, options, given.removesuffix("help").rstrip("."), value)))
            raise SystemExit(0)
    named = [(command.former.get(given, given), value) for given, value in named]
    for given, _ in named:
        if wrong := unknown(given.rstrip("+"), options):
            _refuse(name, wrong)
    if command.is_sweep and not free:
        _refuse(name, "FILE is missing")
    if not (command.groups or command.is_sweep):
        named, free = _all_named(name, named, free, options), []
    for file, content in files:
        _check_names(file, content, options, options)
    if not any(given in ("print_config", "smoke") for given, _ in named):  # which read nothing, and what they write
        _check_inputs(named, command.inputs)
        _check_shards(name, named, files)
    return free + [_spelled(given, value, options) for given, value in named]


def options_for(name: str, model: str | None = None) -> Options:
    """The options of a command; those of a class of `flextok_pl.modules` are below `model`."""
    command = COMMANDS[name]
    own: Options = {}
    for target in command.options:
        own |= {each: option for each, option in options_of(target).items() if each not in GIVEN_BY_THE_SUITE}
    if command.is_sweep:
        file = Option("FILE", None, "sweep file", {}, positional=True)
        return {"file": file, "config": Option("FILE"), "print_config": GENERAL["print_config"]} | own
    if not command.groups:
        return own
    callbacks = {
        group: Option(help=description_of(target).split("\n\n")[0], below=options_of(target))
        for group, target in GROUPS.items()
    }
    below = options_of(f"flextok_pl.modules:{model}") if model else None
    groups = {
        "model": Option(help=f"the model; {', '.join(MODELS)}", below=below),
        "data": Option(help="the shard sets", below=options_of("flextok_pl.data:ShardDataModule")),
        "trainer": Option(help="Lightning's Trainer", below=options_of(TRAINER)),
    }
    return own | GENERAL | groups | callbacks


def overview(group: str = "") -> str:
    """List the commands, or those of a group such as `data`."""
    names = [name for name in COMMANDS if name.startswith(f"{group} " * bool(group))]
    width = max(map(len, names))
    return "\n".join(
        [
            f"usage: flextok {group or 'COMMAND'} ...",
            "",
            *([] if group else ["Train, evaluate and use FlexTok image tokenizers and their priors.", ""]),
            *(f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names),
            "",
            "flextok COMMAND --help lists a command's options. --debug shows the traceback of an error.",
        ]
    )


def unknown_command(arguments: Sequence[str]) -> str:
    """Say what is wrong with a command line that names no command, and list the commands."""
    is_group = any(name.startswith(f"{arguments[0]} ") for name in COMMANDS)
    given = " ".join(arguments[: 1 + is_group])
    near = get_close_matches(given, COMMANDS, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    commands = overview(arguments[0] if is_group else "")
    return f"{commands}\n\nflextok: error: {given!r} is not one of the commands above{guess}"


def _help(name: str, options: Options, group: str, value: str | None) -> list[str]:
    """Help for a command, or for a group of its options."""
    if group:
        shown: Options | None = options_for(name, value)["model"].below if group == "model" and value else options
        for part in [] if group == "model" and value else group.split("."):
            shown = None if shown is None or part not in shown else shown[part].below
        if shown is None:
            some = f": {', '.join(MODELS)}" if group == "model" else ", see the documentation of Lightning"
            return [f"the options of {group} depend on its class{some}"]
        return [f"Options of {value or group}:", "", *describe(shown, f"{group}.")]
    command = COMMANDS[name]
    words = [each.upper() + " ..." * option.several for each, option in options.items() if option.positional]
    lines = [f"usage: flextok {' '.join([name, *words])} [--OPTION VALUE ...]", ""]
    if command.groups:
        lines += [
            f"{command.summary[0].upper()}{command.summary[1:]}.",
            "",
            f"flextok {name} --GROUP.help lists the options of a group, such as rfid; --GROUP null leaves it out.",
            f"flextok {name} --model.help CLASS lists those of a model: {', '.join(MODELS)}.",
            "",
        ]
    else:
        lines += [description_of(command.options[0]), ""]
    closed = set(options) - {"trainer", "data"} if command.groups else set()
    lines += describe({each: replace(o, below=None) if each in closed else o for each, o in options.items()})
    more = [each for each in COMMANDS if each.startswith(f"{name} ")]
    return lines + [""] * bool(more) + [f"flextok {each}: {COMMANDS[each].summary}" for each in more]


def _model_class(named: Named, files: Sequence[tuple[Path, Any]]) -> str | None:
    """Name of the model's class, if it is one of ours."""
    found = [content["model"].get("class_path") for _, content in files if isinstance(content.get("model"), dict)]
    found += [value for name, value in named if name in ("model", "model.class_path")]
    last = next((str(each) for each in reversed(found) if each is not None), "")
    module, _, name = last.rpartition(".")
    return name if name in MODELS and module in ("", "flextok_pl", "flextok_pl.modules") else None


def _all_named(name: str, named: Named, free: list[str], options: Options) -> Named:
    """Name the unnamed arguments by the options that allow it, in order; several values of a list become one."""
    rest, free = list(named), list(free)
    for each, option in options.items():
        values = [value for given, value in rest if given == each and value is not None]
        if option.positional and (option.several or not values):
            values, free = (values + free, []) if option.several else (free[:1], free[1:])
        if option.default is None and not values:
            _refuse(name, f"{each.upper() if option.positional else f'--{each}'} is missing")
        if values and (option.positional or option.several):
            is_list = option.several and not values[0].startswith("[")
            whole = json.dumps(values, separators=(",", ":")) if is_list else values[-1]
            rest = [pair for pair in rest if pair[0] != each] + [(each, whole)]
    if free:
        _refuse(name, f"{free[0]!r} is one argument too many")
    return rest


def _refuse(name: str, wrong: str) -> NoReturn:
    print(f"flextok {name}: error: {wrong}\n`flextok {name} --help` lists the options", file=sys.stderr)
    raise SystemExit(2)


def _spelled(name: str, value: str | None, options: Options) -> str:
    """Format one argument; a true-or-false option without a value is true."""
    if value is None and name in options and options[name].kind == "bool":
        value = "true"
    return f"--{name}" if value is None else f"--{name}={value}"


def _content(file: Path) -> dict[str, Any]:
    """Read a YAML file."""
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise UserError(f"{file} holds {type(content).__name__}; it must hold options, as `name: value`")
    return content or {}


def _check_names(file: Path, content: Mapping[str, Any], level: Options, options: Options, path: str = "") -> None:
    """Check the names in a file, and in the files that it names in place of a group."""
    for name, value in content.items():
        if name in ("class_path", "dict_kwargs"):
            continue
        if name == "init_args" and isinstance(value, dict):
            _check_names(file, value, level, options, path)
            continue
        if wrong := unknown(f"{path}{name}", options):
            raise UserError(f"{file}: {wrong}")
        below = level[name].below
        if below and isinstance(value, dict):
            _check_names(file, value, below, options, f"{path}{name}.")
        elif below and isinstance(value, str) and value.endswith(SUFFIXES[:3]):
            nested = file.parent / value
            _check_names(nested, _content(nested), below, options, f"{path}{name}.")


def _check_inputs(named: Named, inputs: Sequence[str]) -> None:
    """Check that inputs exist, except those that a checkpoint replaces, and that outputs can be written."""
    goes_on = any(name == "ckpt_path" and value not in (None, "null") for name, value in named)
    for name, value in named:
        last = name.rpartition(".")[2]
        if goes_on and last == "init_from":
            continue
        for place in _places(value):
            is_file = str(place).endswith(SUFFIXES) and last not in OUTPUTS
            is_model = str(place).startswith(("/", "./", "../", "~")) and last in MODEL_FILES
            if (name in inputs or is_file or is_model) and _is_missing(place):
                raise UserError(f"{name}={place}: there is no such file or folder")
            if last in OUTPUTS and isinstance(place, str) and not _is_writable(Path(place)):
                raise UserError(f"{name}={place}: it cannot be written; choose a folder that you may write to")


def _check_shards(name: str, named: Named, files: Sequence[tuple[Path, Any]]) -> None:
    """Check that the shard sets of a training exist."""
    given: dict[str, Any] = {}
    for file, content in files:
        data = content.get("data") or {}
        given |= _content(file.parent / data) if isinstance(data, str) else data
    for each, value in named:
        if each == "data" and value is not None:
            whole = _content(Path(value)) if value.endswith(SUFFIXES[:3]) else yaml.safe_load(value)
            given |= whole if isinstance(whole, dict) else {}
        elif each.startswith("data."):
            given[each.removeprefix("data.")] = None if value == "null" else value
    wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test" if given.get("test") else "val",)}
    for split in wanted.get(name, ()):
        for place in _places(given.get(split)):
            if _is_missing(place):
                try:
                    ShardIndex.load(place)
                except ShardError as error:
                    raise UserError(f"data.{split}: {error}") from error


def _places(value: Any) -> list[Any]:
    """The places that a value names; a list may be written as text, which may also be the name of one folder."""
    if isinstance(value, str) and value.startswith("[") and not Path(value).expanduser().exists():
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return [value]
    return value if isinstance(value, list) else [value]


def _is_missing(place: Any) -> bool:
    """Whether a local place does not exist; patterns, URLs and commands may name anything."""
    here = isinstance(place, str) and not has_magic(place) and "{" not in place and ":" not in place
    return here and not Path(place).expanduser().exists()


def _is_writable(place: Path) -> bool:
    """Whether a file or folder can be made there, with the folders above it."""
    there = next(folder for folder in place.absolute().parents if os.path.lexists(folder))
    return there.is_dir() and os.access(there, os.W_OK)
