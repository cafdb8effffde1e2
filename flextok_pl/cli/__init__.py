"""The `flextok` command: `fit`, `validate`, `test` and `predict` by LightningCLI, and the tools.

Nothing heavy is imported before the command is known, so `flextok --help` answers at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

COMMANDS = {
    "fit": ("training:run", "train a model"),
    "validate": ("training:run", "evaluate on the validation set, cheaply"),
    "test": ("training:run", "evaluate in full: every metric at every token budget"),
    "predict": ("training:run", "write the tokens of pictures, or those that a prior generates, as JSON lines"),
    "sweep": ("sweep:run", "search over the options of an experiment, here or on a Slurm cluster"),
    "sweep status": ("sweep:status", "show the trials of a sweep"),
    "plan": ("plan:run", "say whether a training fits a machine, and how long it takes"),
    "data demo": ("tools:data_demo", "write the embedded OpenMoji demo set as shards"),
    "data folder": ("tools:data_folder", "write a folder of images as shards"),
    "data imagenet": ("tools:data_imagenet", "write ImageNet-1k as shards, from its tars or its folders"),
    "data parquet": ("tools:data_parquet", "write parquet files, also of the Hugging Face Hub, as shards"),
    "data reshard": ("tools:data_reshard", "write WebDataset tars, or a shard set, as new shards"),
    "data latents": ("tools:data_latents", "encode the images of a shard set by a VAE, as shards"),
    "data tokens": ("tools:data_tokens", "tokenize the images of a shard set, as shards"),
    "data verify": ("shards:verify", "read a shard set in full and list everything that is wrong"),
    "data stats": ("shards:stats", "show what is in a shard set: classes, sizes, captions, pixels"),
    "fid": ("fid:fid", "measure images against reference images: FID, KID, precision, recall"),
    "compare": ("fid:compare", "show two files of results side by side, and where their protocols differ"),
    "decoding": ("decoding:decoding", "measure steps and guidance at every token budget, and recommend the best"),
    "probe": ("probe:probe", "measure how well the class can be read off the first tokens"),
    "report": ("report:report", "write what an evaluation left as one HTML page"),
    "generate": ("generate:run", "show generated images at several token budgets, as one picture"),
    "reconstruct": ("tools:reconstruct", "show images at several token budgets, as one picture"),
}
"""Command -> (module:function of this package, one line of help). A function takes the command and its arguments."""

OPTIONAL = {"optuna": "sweep"}
"""Package that a whole command needs -> the extra that installs it."""


class UserError(Exception):
    """Something the user can put right; shown as one line without a traceback."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one `flextok` command.

    Args:
        argv: the arguments; default `sys.argv[1:]`.

    Raises:
        SystemExit: the arguments are wrong (2), or the command cannot do what they ask for (1).
    """
    arguments = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in arguments or bool(os.environ.get("FLEXTOK_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(_overview())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("flextok_pl"))
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS or arguments[0] not in COMMANDS else 1
    command = " ".join(arguments[:words])
    if command not in COMMANDS:
        print(f"{_overview()}\n\nflextok: error: {command!r} is none of the commands above", file=sys.stderr)
        raise SystemExit(2)
    module, function = COMMANDS[command][0].split(":")
    # jsonargparse announces what its next major version drops; our version range excludes that one.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    try:
        getattr(_module(module), function)(command, arguments[words:])
    except UserError as error:
        if debug:
            raise
        raise SystemExit(f"flextok {command}: error: {error}") from None


def _module(name: str) -> ModuleType:
    """The module of a command.

    Raises:
        UserError: it needs a package that is not installed.
    """
    gc.disable()  # nothing of an import is garbage, and searching for it takes a sixth of its time
    try:
        return importlib.import_module(f"flextok_pl.cli.{name}")
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise UserError(f"needs {error.name}: pip install 'flextok_pl[{OPTIONAL[error.name]}]'") from error
    finally:
        gc.enable()


def base_config(experiment: Path) -> Path | None:
    """The `base.yaml` that an experiment file is a difference to: in its folder, or in the folder above."""
    for folder in experiment.resolve().parents[:2]:
        if (folder / "base.yaml").is_file():
            return folder / "base.yaml"
    return None


def config_paths(arguments: Sequence[str]) -> list[Path]:
    """The files given by `--config`, in their order."""
    paths = []
    for i, argument in enumerate(arguments):
        if argument in ("-c", "--config") and i + 1 < len(arguments):
            paths.append(Path(arguments[i + 1]))
        elif argument.startswith("--config="):
            paths.append(Path(argument.removeprefix("--config=")))
    return paths


def _underscored(argument: str) -> str:
    """`--num-tokens=1` -> `--num_tokens=1`: both spellings are taken."""
    match = re.match(r"--[a-zA-Z][\w.-]*", argument)
    return argument if match is None else match[0][:2] + match[0][2:].replace("-", "_") + argument[match.end() :]


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flextok COMMAND ...",
            "",
            "Train, evaluate and use FlexTok image tokenizers and their priors.",
            "",
            *lines,
            "",
            "flextok COMMAND --help lists a command's options. --debug shows the traceback of an error.",
        ]
    )
