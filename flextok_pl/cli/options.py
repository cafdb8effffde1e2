"""Reads the options of a command from source code. Nothing is imported, so help and a misspelt name take no time.

Functions and classes are named `module:name`. The result is what jsonargparse finds by importing them: parameters,
those behind `**options` of functions that are called with them, fields of dataclasses, and their docstrings.
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from docstring_parser.google import parse

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign
"""The definitions that a name may stand for."""
Options = dict[str, "Option"]

PACKAGES = ("flextok_pl", "lightning")
"""Packages whose definitions are read."""

SCALARS = frozenset(
    {"int", "float", "str", "bool", "None", "Path", "Literal", "Union", "Optional", "timedelta"}
    | {"list", "List", "tuple", "Tuple", "Sequence", "Iterable"}
)
"""Names in the types of options that have no options below them."""

FREE = frozenset({"init_args", "class_path", "dict_kwargs"})
"""Names that any option with a class may have below it."""

REMOVED = {
    "budget_groups": "delete it, as a step now computes only the tokens that each image keeps",
    "init": "use init_from, as for tokenizers and priors",
}
"""Removed options -> what to do instead."""


@dataclass(frozen=True)
class Option:
    """One option, with type and default as text."""

    kind: str = ""
    default: str | None = "null"  # None for an option that must be given
    help: str = ""
    below: Options | None = None  # the options below it, as of a group; None if only its value decides
    positional: bool = False  # whether it may be given without its name

    @property
    def several(self) -> bool:
        """Whether it takes a list of values, and nothing else."""
        return self.kind.startswith("list[") and self.kind.removesuffix(" | null").endswith("]")


def options_of(target: str) -> Options:
    """Name -> option, of a function, a class, or a method `module:Class.method`."""
    return _options(*_definition(target))


def description_of(target: str) -> str:
    """The part of its docstring before the parameters."""
    found = parse(ast.get_docstring(_definition(target)[1]) or "")
    return "\n\n".join(text for text in (found.short_description, found.long_description) if text)


def unknown(name: str, options: Options) -> str | None:
    """Say what is wrong with the name of an option, such as `trainer.max_step`; None if it exists.

    Names below an option whose value decides are not checked.
    """
    level: Options | None = options
    parts = name.split(".")
    for i, part in enumerate(parts):
        if level is None or part in FREE:
            return None
        if part not in level:
            if part in REMOVED:
                return f"option {name} was removed: {REMOVED[part]}"
            guesses = [full for full in _full_names(options) if full.rpartition(".")[2] == part]
            for near in difflib.get_close_matches(part, level, n=1):
                guesses.append(".".join([*parts[:i], near, *parts[i + 1 :]]))
            return f"there is no option {name}" + (f"; did you mean {guesses[0]}?" if guesses else "")
        level = level[part].below
    return None


def describe(options: Options, prefix: str = "") -> list[str]:
    """Lines of help."""
    lines = []
    for name, option in options.items():
        default = "required" if option.default is None else f"default: {option.default}"
        facts = [option.kind] * bool(option.kind) + [default] * (not option.positional and option.kind != "")
        text = f"{option.help} ({'; '.join(facts)})" if facts else option.help
        lines.append("  " + (name.upper() if option.positional else f"--{prefix}{name}"))
        lines += textwrap.wrap(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
        if option.below:
            lines += describe(option.below, f"{prefix}{name}.")
    return lines


def _full_names(options: Options, prefix: str = "") -> Iterator[str]:
    for name, option in options.items():
        yield prefix + name
        yield from _full_names(option.below or {}, f"{prefix}{name}.")


@functools.cache
def _tree(module: str) -> ast.Module:
    """Parse the source of a module, without importing its packages."""
    root, *parts = module.split(".")
    spec = find_spec(root)
    assert spec is not None and spec.origin is not None, f"there is no package {root}"
    place = Path(spec.origin).parent.joinpath(*parts)
    file = place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _definition(target: str) -> tuple[str, ast.ClassDef | ast.FunctionDef]:
    """Module and node of a function, a class or a method."""
    module, _, path = target.partition(":")
    name, _, method = path.partition(".")
    found = _find(module, name)
    assert found is not None and not isinstance(found[1], ast.Assign), f"{target} is neither a function nor a class"
    if not method:
        return found[0], found[1]
    return found[0], next(n for n in found[1].body if isinstance(n, ast.FunctionDef) and n.name == method)


@functools.cache
def _names(module: str) -> dict[str, Definition | tuple[str, str]]:
    """Name -> its definition, or the module and name from which it is imported."""
    names: dict[str, Definition | tuple[str, str]] = {}
    body = _tree(module).body
    for node in [*(each for part in body if isinstance(part, ast.If) for each in part.body), *body]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGES):
            names |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names[ast.unparse(node.targets[0])] = node
    return names


def _find(module: str, name: str) -> tuple[str, Definition] | None:
    """Find a definition and the module that holds it, even if the given module only imports it."""
    found = _names(module).get(name)
    return _find(*found) if isinstance(found, tuple) else None if found is None else (module, found)


class _Spelled(ast.NodeTransformer):
    """Replaces this package's names for values by the values: `ImageFormat` -> `Literal["jpg", "png", "webp"]`."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Replace one name."""
        found = _find(self.module, node.id) if self.module.startswith("flextok_pl") else None
        return found[1].value if found is not None and isinstance(found[1], ast.Assign) else node


def _options(module: str, node: Definition) -> Options:
    """Parameters of a function, or of a class's constructor."""
    if isinstance(node, ast.Assign):
        return {}
    texts = _texts(node)
    if isinstance(node, ast.FunctionDef):
        return _parameters(module, node, texts)
    if _is_dataclass(node):
        fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        return _inherited(module, node) | {
            name: _option(module, field.annotation, field.value, texts.get(name, ""))
            for field in fields
            if "ClassVar" not in ast.unparse(field.annotation) and (name := ast.unparse(field.target))
        }
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            own = _parameters(module, method, texts | _texts(method))
            return own | _inherited(module, node) if method.args.kwarg else own
    return _inherited(module, node)


def _is_dataclass(node: Definition) -> bool:
    return isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list)


def _inherited(module: str, node: ast.ClassDef) -> Options:
    found: Options = {}
    for base in node.bases:
        above = _find(module, ast.unparse(base).split("[")[0])
        found |= _options(*above) if above is not None else {}
    return found


def _parameters(module: str, node: ast.FunctionDef, texts: Mapping[str, str]) -> Options:
    given = node.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
    options = {
        each.arg: _option(module, each.annotation, default, texts.get(each.arg, ""), positional=default is None)
        for each, default in zip(given.args, defaults, strict=True)
        if each.arg != "self"
    }
    for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        options[each.arg] = _option(module, each.annotation, default, texts.get(each.arg, ""))
    return options | (_handed_on(module, node, given.kwarg.arg) if given.kwarg else {})


def _handed_on(module: str, node: ast.FunctionDef, name: str) -> Options:
    """The options behind `**name`: those of functions that are called with them, except those set in the call."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and name in (ast.unparse(each.value) for each in call.keywords if not each.arg):
            called, given = _find(module, ast.unparse(call.func)), {each.arg for each in call.keywords}
            found = {} if called is None else _options(*called)
            return {each: option for each, option in found.items() if each not in given and not option.positional}
    return {}


def _option(
    module: str, annotation: ast.expr | None, default: ast.expr | None, text: str, positional: bool = False
) -> Option:
    kind = "" if annotation is None else ast.unparse(_Spelled(module).visit(copy.deepcopy(annotation)))
    below: Options | None = {} if kind else None
    for each in set(re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'", "", kind))) - SCALARS:
        found = _find(module, each)
        below = _options(*found) if found is not None and _is_dataclass(found[1]) else None
    if isinstance(default, ast.Call) and default.keywords[:1] and default.keywords[0].arg == "default_factory":
        factory = default.keywords[0].value
        default = factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
    value = None if default is None else ast.unparse(_Spelled(module).visit(copy.deepcopy(default)))
    default_text = None if value is None else value.replace("None", "null")
    return Option(kind.replace("None", "null"), default_text, text, below, positional)


def _texts(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """Parameter -> its text in the docstring."""
    found = parse(ast.get_docstring(node) or "").params
    return {each.arg_name: " ".join((each.description or "").split()) for each in found}
