"""The `flextok` command: `fit`, `validate`, `test` and `predict` by LightningCLI, and the tools.

Nothing heavy is imported before the command and its options are checked: `front` reports mistakes at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flextok_pl.cli.commands import COMMANDS
from flextok_pl.errors import UserError, told_to_the_user
from flextok_pl.progress import say

OPTIONAL = {"optuna": "sweep", "gradio": "app"}
"""Package that a whole command needs -> the extra that installs it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one `flextok` command, by default that of `sys.argv[1:]`.

    Raises:
        SystemExit: the arguments are wrong (2), or the command cannot do what they ask for (1).
    """
    arguments = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments or bool(os.environ.get("FLEXTOK_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    front = load("flextok_pl.cli.front")
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(front.overview())
        return
    if arguments[0] == "--version":
        print(version("flextok_pl"))
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    command = " ".join(arguments[:words])
    if command not in COMMANDS:
        if arguments[1:] in (["-h"], ["--help"]) and any(name.startswith(f"{command} ") for name in COMMANDS):
            print(front.overview(command))
            return
        print(front.unknown_command(arguments), file=sys.stderr)
        raise SystemExit(2)
    # jsonargparse warns about its next major version, which our version range excludes.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds; a log keeps every state of a bar
    try:
        with told_to_the_user():
            arguments = front.answer(command, arguments[words:])
            if "torch" not in sys.modules:
                say(f"flextok {command}: loading ...")
            load(f"flextok_pl.cli.{COMMANDS[command].run}")(command, arguments)
    except UserError as error:
        if debug:
            raise
        raise SystemExit(f"flextok {command}: error: {error}") from None


def load(target: str) -> Any:
    """Import what a command needs, `module` or `module:name`; name the extra that installs a missing package."""
    module, _, name = target.partition(":")
    gc.disable()  # an import leaves no garbage, and searching for it takes a sixth of the time
    try:
        found = importlib.import_module(module)
        return getattr(found, name) if name else found
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise UserError(f"needs {error.name}: pip install 'flextok_pl[{OPTIONAL[error.name]}]'") from error
    finally:
        gc.enable()


def base_config(experiment: Path) -> Path | None:
    """The `base.yaml` that an experiment file builds on: in its folder, or in the folder above."""
    for folder in experiment.resolve().parents[:2]:
        if (folder / "base.yaml").is_file():
            return folder / "base.yaml"
    return None


def _underscored(argument: str) -> str:
    """`--num-tokens=1` -> `--num_tokens=1`, so that both spellings work."""
    match = re.match(r"--[a-zA-Z][\w.-]*", argument)
    return argument if match is None else match[0][:2] + match[0][2:].replace("-", "_") + argument[match.end() :]
