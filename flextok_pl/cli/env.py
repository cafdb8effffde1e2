"""`flextok env`: print the facts about machine, versions and experiment that a bug report needs."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flextok_pl.cli.front import given_files, read
from flextok_pl.cli.training import ParsingCLI, run_cli
from flextok_pl.errors import UserError
from flextok_pl.evaluation.protocol import versions

PACKAGES = (
    *("flextok_pl", "torch", "torchvision", "lightning", "jsonargparse", "torchmetrics", "torch-fidelity", "diffusers"),
    *("timm", "transformers", "huggingface_hub", "safetensors", "webdataset", "fsspec", "numpy", "pillow"),
)


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok env`: print versions, devices, the commit and the whole configuration of an experiment.

    Variables of the environment are not printed. In the configuration `***` replaces user names, queries of URLs and
    commands of `pipe:`, and `~` replaces your home folder.
    """
    for name, value in facts():
        print(f"{name}: {value}")
    if given_files(read(arguments)[0]):
        run_cli(MergedConfig, "fit", arguments)
    elif arguments:
        raise UserError(f"{arguments[0]} belongs to an experiment: give --config FILE, too")


class MergedConfig(ParsingCLI):
    """Parses an experiment as `flextok fit` does, and prints the result."""

    command = "env"

    def run(self) -> None:
        """Print the configuration."""
        text = self.parser.dump(self.config, skip_none=False)
        print(f"configuration: {self.experiment}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}\n")
        print(without_secrets(text))


def facts() -> Iterator[tuple[str, Any]]:
    """Yield name and value of each line."""
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.platform()}, {os.cpu_count()} cores"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "CUDA", f"{torch.version.cuda or 'none'} of torch's build, driver {_driver() or 'none'}"
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB"
    yield "MPS", "available" if torch.backends.mps.is_available() else "not available"
    yield "threads", torch.get_num_threads()
    if commit := versions().get("commit"):
        yield "commit", commit


def without_secrets(text: str) -> str:
    """Remove possible secrets from a configuration: parts of URLs beyond a place, commands, your home folder."""
    text = re.sub(r"pipe:[^\n]*", "pipe:***", text)
    text = re.sub(r"(\w+://)[^\s/@'\"]+@", r"\1***@", text)
    text = re.sub(r"(\w+://[^\s?'\"]+\?)[^\s'\"]+", r"\1***", text)
    return text.replace(str(Path.home()), "~") if Path.home() != Path("/") else text


def _driver() -> str | None:
    """Version of NVIDIA's driver."""
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _said(*command: str) -> str | None:
    """The output of a program, if it is installed and succeeds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
