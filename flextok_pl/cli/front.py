"""What can be said of a command line before anything heavy is imported: help, misspelt options, missing files.

The parser of a command has the last word. What is let through here it may still refuse.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from glob import has_magic
from pathlib import Path
from typing import Any, NoReturn

import yaml

from flextok_pl.cli import base_config
from flextok_pl.cli.commands import COMMANDS, GIVEN_BY_THE_SUITE, TRAINER
from flextok_pl.cli.options import (
    Option,
    Options,
    added_options,
    describe,
    description_of,
    options_of,
    table_of,
    unknown,
)
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.errors import UserError

MODELS = ("VAEModule", "TokenizerModule", "PriorModule")
"""The classes of `flextok_pl.modules` that `model.class_path` names."""

GENERAL = {
    "config": Option("FILE", help="the experiment's file; may be given several times, the last has the last word"),
    "print_config": Option("", help="print the whole configuration, and stop"),
    "seed_everything": Option("int | bool", "0", "seed of all that draws at random"),
    "run": Option("str | null", help="name of the run and its folder; the next number if there is none"),
    "global_batch_size": Option(
        "int | null", help="samples of an optimizer step that a fit is meant for, over all devices"
    ),
    "ckpt_path": Option(
        "str | null", help="checkpoint to go on from, or `last` for the newest of the experiment's runs"
    ),
}
"""Options of all trainings, which Lightning describes at length or not at all."""

SUFFIXES = (".yaml", ".yml", ".json", ".safetensors", ".ckpt", ".npz")
"""A value that ends so is a file that is read, but for `OUTPUTS`."""

OUTPUTS = ("json", "out")

MODEL_FILES = ("tokenizer", "prior", "vae", "ckpt_path", "weights", "teacher_weights")
"""Options that name a file or folder, where their value looks like a path; else it may be the id of a model."""


@dataclass
class Line:
    """The arguments of a command.

    Args:
        named: option and value, in their order; no value for an option that stands alone.
        free: what has no name.
    """

    named: list[tuple[str, str | None]] = field(default_factory=list)
    free: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Line:
        """Tell options and their values from what has no name; each option takes one value."""
        line = cls()
        rest = list(arguments)
        while rest:
            first = rest.pop(0)
            if not first.startswith("-") or not first.lstrip("-")[:1].isalpha():
                line.free.append(first)
                continue
            name, equals, value = first.lstrip("-").partition("=")
            name = {"c": "config", "h": "help"}.get(name, name)
            takes_next = not equals and name != "print_config" and rest and not rest[0].startswith("--")
            line.named.append((name, value if equals else rest.pop(0) if takes_next else None))
        return line

    def last(self, name: str) -> str | None:
        """The value of an option that was given last."""
        return next((value for given, value in reversed(self.named) if given == name), None)


def answer(name: str, arguments: Sequence[str]) -> list[str]:
    """Answer what needs no command, and check what does.

    Args:
        name: of the command.
        arguments: of the command, with underscores.

    Returns:
        The arguments, former names replaced.

    Raises:
        SystemExit: help was asked for (0), or there is no such option (2).
        UserError: a file or a folder is missing, or a file holds an option that does not exist.
    """
    command, line = COMMANDS[name], Line.read(arguments)
    files = _files(name, line)
    options = options_for(name, _model_class(line, files))
    is_dry = any(given == "print_config" for given, _ in line.named)
    for given, value in line.named:
        if given == "help" or given.endswith(".help"):
            print("\n".join(_help(name, options, given.removesuffix("help").rstrip("."), value)))
            raise SystemExit(0)
    line = _renamed(line, command.former, options)
    for given, _ in line.named:
        wrong = unknown(given.rstrip("+"), options)
        if wrong is not None:
            _refuse(name, wrong)
    if not command.groups:
        _check_complete(name, line, options)
    for file, content in files:
        _check_names(file, content, options, options)
    if not is_dry:
        _check_inputs(line, options, command.inputs)
    if command.groups and not is_dry:
        _check_shards(name, line, files)
    return line.free + [_spelled(given, value, options) for given, value in line.named]


def options_for(name: str, model: str | None = None) -> Options:
    """The options of a command, below `model` those of a class of `flextok_pl.modules`."""
    command = COMMANDS[name]
    own: Options = {}
    for target in command.options:
        own |= {each: option for each, option in options_of(target).items() if each not in GIVEN_BY_THE_SUITE}
    for target in command.added:
        own |= added_options(target)
    own |= {command.repeated[each]: replace(own.pop(each), kind="str") for each in command.repeated}
    if not command.groups:
        is_sweep = command.run.startswith("sweep:")
        file = Option("FILE", None, "the sweep's file", {}, positional=True)
        of_file = {"file": file, "config": Option("FILE"), "print_config": GENERAL["print_config"]}
        return of_file | own if is_sweep else own
    callbacks = {
        group: Option(help=description_of(target).split("\n\n")[0], below=options_of(target))
        for group, target in table_of("flextok_pl.cli.training:CALLBACKS").items()
    }
    groups = {
        "model": Option(
            help=f"the model; {', '.join(MODELS)}", below=options_of(f"flextok_pl.modules:{model}") if model else None
        ),
        "data": Option(help="the shard sets", below=options_of("flextok_pl.data:ShardDataModule")),
        "trainer": Option(help="Lightning's Trainer", below=options_of(TRAINER)),
    }
    return own | GENERAL | groups | callbacks


def overview(group: str = "") -> str:
    """The commands, or those of a group such as `data`."""
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
    """What is wrong with a command line that names no command, and the commands that there are."""
    is_group = any(name.startswith(f"{arguments[0]} ") for name in COMMANDS)
    given = " ".join(arguments[: 1 + is_group])
    near = get_close_matches(given, COMMANDS, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    commands = overview(arguments[0] if is_group else "")
    return f"{commands}\n\nflextok: error: {given!r} is none of the commands above{guess}"


def _help(name: str, options: Options, group: str, value: str | None) -> list[str]:
    """Help of a command, or of a group of its options."""
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
    lines += _about_training(name) if command.groups else [description_of(command.options[0]), ""]
    closed = set(options) - {"trainer", "data"} if command.groups else set()
    lines += describe({each: replace(o, below=None) if each in closed else o for each, o in options.items()})
    more = [each for each in COMMANDS if each.startswith(f"{name} ")]
    return lines + [""] * bool(more) + [f"flextok {each}: {COMMANDS[each].summary}" for each in more]


def _about_training(name: str) -> list[str]:
    summary = COMMANDS[name].summary
    return [
        f"{summary[0].upper()}{summary[1:]}.",
        "",
        f"flextok {name} --GROUP.help lists the options of a group, such as rfid; null in its place leaves it out.",
        f"flextok {name} --model.help CLASS lists those of a model: {', '.join(MODELS)}.",
        "",
    ]


def _model_class(line: Line, files: Sequence[tuple[Path, Any]]) -> str | None:
    """Name of the model's class, if it is one of ours."""
    found = [content["model"].get("class_path") for _, content in files if isinstance(content.get("model"), dict)]
    found += [value for name, value in line.named if name in ("model", "model.class_path")]
    last = next((str(each) for each in reversed(found) if each is not None), "")
    module, _, name = last.rpartition(".")
    return name if name in MODELS and module in ("", "flextok_pl", "flextok_pl.modules") else None


def _renamed(line: Line, former: Mapping[str, str], options: Options) -> Line:
    """Present names for former ones; what need not be named loses its name, and comes in order."""
    named = [(former.get(name, name), value) for name, value in line.named]
    positional = {name for name, option in options.items() if option.positional}
    by_name = {name: value for name, value in named if name in positional and value is not None}
    if not by_name:
        return Line(named, line.free)
    free = list(line.free)
    ordered = [
        by_name[name] if name in by_name else free.pop(0)
        for name in options
        if name in by_name or (name in positional and free)
    ]
    return Line([each for each in named if each[0] not in by_name], ordered + free)


def _check_complete(name: str, line: Line, options: Options) -> None:
    """Check that everything is given that must be, and nothing in vain."""
    positional = [each for each, option in options.items() if option.positional]
    if len(line.free) < len(positional):
        _refuse(name, f"{positional[len(line.free)].upper()} is missing")
    if len(line.free) > len(positional) and not any(options[each].several for each in positional):
        _refuse(name, f"{line.free[len(positional)]!r} is one argument too many")
    in_file = COMMANDS[name].run.startswith("sweep:")
    for each, option in options.items():
        if option.default is None and not option.positional and not in_file and line.last(each) is None:
            _refuse(name, f"--{each} is missing")


def _refuse(name: str, wrong: str) -> NoReturn:
    print(f"flextok {name}: error: {wrong}\n`flextok {name} --help` lists what there is", file=sys.stderr)
    raise SystemExit(2)


def _spelled(name: str, value: str | None, options: Options) -> str:
    """One argument; what is true or false is true where it only is named."""
    if value is None and name in options and options[name].kind == "bool":
        value = "true"
    return f"--{name}" if value is None else f"--{name}={value}"


def _files(name: str, line: Line) -> list[tuple[Path, Any]]:
    """The files that hold options, and what they hold."""
    if COMMANDS[name].run.startswith("sweep:"):
        given = line.free[:1]
    else:
        given = [value for each, value in line.named if each == "config" and value is not None]
    paths = [Path(each).expanduser() for each in given]
    base = base_config(paths[0]) if paths and COMMANDS[name].groups else None
    return [(path, _content(path)) for path in ([base] if base is not None else []) + paths]


def _content(file: Path) -> dict[str, Any]:
    """What a YAML file holds.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no YAML: {error}") from error
    if not isinstance(content or {}, dict):
        raise UserError(f"{file} holds {type(content).__name__}; it must hold options, as `name: value`")
    return content or {}


def _check_names(file: Path, content: Mapping[str, Any], level: Options, options: Options, path: str = "") -> None:
    """Check the names in a file, and in those that it names in place of a group.

    Raises:
        UserError: an option does not exist, or such a file.
    """
    for name, value in content.items():
        if name in ("class_path", "dict_kwargs"):
            continue
        if name == "init_args" and isinstance(value, dict):
            _check_names(file, value, level, options, path)
            continue
        wrong = unknown(f"{path}{name}", options)
        if wrong is not None:
            raise UserError(f"{file}: {wrong}")
        below = level[name].below
        if below and isinstance(value, dict):
            _check_names(file, value, below, options, f"{path}{name}.")
        elif below and isinstance(value, str) and value.endswith(SUFFIXES[:3]):
            nested = file.parent / value
            _check_names(nested, _content(nested), below, options, f"{path}{name}.")


def _check_inputs(line: Line, options: Options, inputs: Sequence[str]) -> None:
    """Check that files and folders are there.

    Raises:
        UserError: one is not.
    """
    positional = [name for name, option in options.items() if option.positional]
    several = [name for name in positional if options[name].several]
    names = several * len(line.free) if several else positional
    for name, value in [*zip(names, line.free, strict=False), *line.named]:
        last = name.rpartition(".")[2]
        is_file = value is not None and value.endswith(SUFFIXES) and last not in OUTPUTS
        is_model = value is not None and value.startswith(("/", "./", "../", "~")) and last in MODEL_FILES
        if (name in inputs or is_file or is_model) and value is not None and _is_missing(value):
            raise UserError(f"{name}={value}: there is no such file or folder")


def _places(source: Any) -> list[Any]:
    """The sets that are named; a list may be written as a text, which may also be the name of one folder."""
    if isinstance(source, str) and source.startswith("[") and not Path(source).expanduser().exists():
        try:
            source = yaml.safe_load(source)
        except yaml.YAMLError:
            return [source]
    return source if isinstance(source, list) else [source]


def _is_missing(value: str) -> bool:
    """Whether a value names a place here that is not there; patterns, URLs and commands may name anything."""
    if has_magic(value) or "{" in value or ":" in value:
        return False
    return not Path(value).expanduser().exists()


def _check_shards(name: str, line: Line, files: Sequence[tuple[Path, Any]]) -> None:
    """Check that the shard sets that a command reads are there.

    Raises:
        UserError: one is not.
    """
    given: dict[str, Any] = {}
    for file, content in files:
        data = content.get("data") or {}
        given |= _content(file.parent / data) if isinstance(data, str) else data
    for each, value in line.named:
        if each == "data" and value is not None:
            whole = _content(Path(value).expanduser()) if value.endswith(SUFFIXES[:3]) else yaml.safe_load(value)
            given |= whole if isinstance(whole, dict) else {}
        elif each.startswith("data."):
            given[each.removeprefix("data.")] = None if value == "null" else value
    wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test" if given.get("test") else "val",)}
    for split in wanted.get(name, ()):
        for place in _places(given.get(split)):
            if isinstance(place, str) and _is_missing(place):
                try:
                    ShardIndex.load(place)
                except ShardError as error:
                    raise UserError(f"data.{split}: {error}") from error
