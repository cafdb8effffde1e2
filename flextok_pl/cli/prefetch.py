"""`flextok prefetch`: download what an experiment needs, for machines without a network."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flextok_pl.backbones.clip_score import clip_downloads
from flextok_pl.backbones.dreamsim import DreamSimFiles
from flextok_pl.backbones.extractors import extractor_downloads
from flextok_pl.backbones.networks import LPIPS_NETWORKS, timm_downloads
from flextok_pl.cli.training import ParsingCLI, run_cli
from flextok_pl.data.shards.copies import SetCopy, copies_of
from flextok_pl.downloads import Download, Part, Places, environment
from flextok_pl.errors import UserError
from flextok_pl.evaluation.options import PROBE
from flextok_pl.interop import PRIOR_FORMATS, TOKENIZER_FORMATS
from flextok_pl.models.pretrained import model_downloads
from flextok_pl.models.text import text_encoder_downloads
from flextok_pl.models.vae import autoencoder_downloads
from flextok_pl.progress import say

Options = Mapping[str, Any]
"""The options of a model or of a group, by name."""


@dataclass
class PrefetchOptions:
    """Options that a fit does not take.

    Args:
        to: folder for the files; default this machine's caches, where a fit here would put them.
        check: list what is there and what is missing, and fetch nothing.
    """

    to: str | None = None
    check: bool = False


UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


class Wanted(NamedTuple):
    """A download, and the option of the experiment that needs it."""

    option: str
    download: Download


def _tokenizer(name: str | None) -> list[Download]:
    return [] if name is None else model_downloads(name, TOKENIZER_FORMATS)


def _prior(name: str | None) -> list[Download]:
    return [] if name is None else model_downloads(name, PRIOR_FORMATS)


def _autoencoder(name: str | None) -> list[Download]:
    return [] if name is None or name.endswith(".safetensors") else autoencoder_downloads(name)


def _extractor(options: Options) -> list[Download]:
    return [] if options["weights"] is not None else extractor_downloads(options["extractor"])


def _timm(options: Options, name: str, weights: str) -> list[Download]:
    """A network of timm, or one that a package contains."""
    chosen = options[name]
    is_timm = chosen not in (None, PROBE) and not chosen.startswith("effnet-")
    return timm_downloads(chosen) if is_timm and options[weights] is None else []


def _perceptual(options: Options) -> list[Download]:
    if not options["perceptual_weight"] or options["perceptual_weights_path"] is not None:
        return []
    if options["perceptual_network"] == "lpips":
        return [LPIPS_NETWORKS["vgg"]]
    return _timm(options, "perceptual_network", "perceptual_weights_path")


def _dreamsim(options: Options) -> list[Download]:
    return [DreamSimFiles(options["dreamsim"])] if options["dreamsim"] and not options["dreamsim_weights"] else []


def _copies(option: str, options: Options) -> list[Download]:
    return [*copies_of(options[option])]


MODELS: dict[str, dict[str, Callable[[Options], list[Download]]]] = {
    "VAEModule": {"init_from": lambda o: _autoencoder(o["init_from"]), "perceptual_network": _perceptual},
    "TokenizerModule": {
        "vae": lambda o: _autoencoder(o["vae"]),
        "init_from": lambda o: _tokenizer(o["init_from"]),
        "teacher": lambda o: _timm(o, "teacher", "teacher_weights"),
    },
    "DistillationModule": {"tokenizer": lambda o: _tokenizer(o["tokenizer"])},
    "PriorModule": {
        "tokenizer": lambda o: _tokenizer(o["tokenizer"]),
        "init_from": lambda o: _prior(o["init_from"]),
        "text_encoder": lambda o: text_encoder_downloads(o["text_encoder"]) if o["text_encoder"] else [],
    },
}
"""Class of a model -> option -> what it fetches."""

GROUPS: dict[str, dict[str, Callable[[Options], list[Download]]]] = {
    "rfid": {
        "extractor": _extractor,
        "lpips": lambda o: [LPIPS_NETWORKS["alex"]] if o["lpips"] is True else [],
        "dreamsim": _dreamsim,
    },
    "gfid": {
        "extractor": _extractor,
        "classifier": lambda o: _timm(o, "classifier", "classifier_weights"),
        "classifier_data": partial(_copies, "classifier_data"),
        "clip": lambda o: [] if o["clip"] is None else clip_downloads(o["clip"]),
    },
    "data": {split: partial(_copies, split) for split in ("train", "val", "test")},
}
"""Group of options -> option -> what it fetches."""


def wanted(config: Any) -> Iterator[Wanted]:
    """List what an experiment fetches for training, validation and test, each file once.

    `config` is as it was parsed, or as `--print_config` shows it.
    """
    model = config["model"]
    name = model["class_path"].rsplit(".", 1)[-1]
    if name not in MODELS:
        raise UserError(f"model={model['class_path']}: prefetch supports only {', '.join(MODELS)}")
    groups = {"model": (model["init_args"], MODELS[name])}
    groups |= {group: (config[group], options) for group, options in GROUPS.items() if config[group] is not None}
    seen: set[Download] = set()
    for group, (values, options) in groups.items():
        for option, downloads in options.items():
            for download in downloads(values):
                if download not in seen:
                    seen.add(download)
                    yield Wanted(f"{group}.{option}", download)


class PrefetchCLI(ParsingCLI):
    """Parses the options of `flextok fit`, and fetches without building anything."""

    command = "prefetch"

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the options of this command to those of a fit."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(PrefetchOptions, None)

    def run(self) -> None:
        """Fetch or check."""
        prefetch(list(wanted(self.config)), self.config.to, self.config.check)


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok prefetch`."""
    run_cli(PrefetchCLI, "fit", arguments)


def prefetch(items: Sequence[Wanted], to: str | None = None, check: bool = False) -> None:
    """Fetch the items into a folder, or check which of them are there; print a line for each.

    Raises:
        UserError: some are missing; the others have been fetched.
    """
    folder = None if to is None else Path(to).absolute()
    places = Places.usual() if folder is None else Places.below(folder)
    if not items:
        print("this experiment fetches nothing")
        return
    missing = [item for item in items if not (_look if check else _bring)(item, places)]
    if folder is not None:
        _explain(items, places, folder)
    if missing:
        names = ", ".join(item.download.title for item in missing)
        remedy = "run it without --check on a machine with a network" if check else "run the same command again"
        raise UserError(f"{len(missing)} of {len(items)} are missing: {names}; {remedy}")


def _bring(item: Wanted, places: Places) -> bool:
    """Fetch one item; return whether it is there now."""
    option, download = item
    try:
        if isinstance(download, SetCopy) and places.data is None:
            raise ValueError("a copy of a shard set needs --to FOLDER")
        before = download.parts(places)
        if not _is_complete(before):
            say(f"{option}: fetching {download.title}, {_size(before)} ...")
            download.fetch(places)
        came = "fetched" if not _is_complete(before) else "is here"
        print(f"{option}: {download.title}: {came}, {_size(download.parts(places))}", flush=True)
    except Exception as error:  # several network libraries, each with its own errors; go on with the other items
        print(f"{option}: {download.title}: failed, {type(error).__name__}: {error}", flush=True)
        return False
    return True


def _look(item: Wanted, places: Places) -> bool:
    """Print what is there of one item; return whether it is complete."""
    option, download = item
    try:
        parts = download.parts(places)
    except Exception as error:  # as above
        print(f"{option}: {download.title}: missing, of unknown size ({type(error).__name__}: {error})", flush=True)
        return False
    lacking = [part for part in parts if not part.here]
    state = "is here" if _is_complete(parts) else "missing"
    if lacking and len(lacking) < len(parts):
        state = f"missing {', '.join(part.name for part in lacking)}"
    print(f"{option}: {download.title}: {state}, {_size(parts)}", flush=True)
    return _is_complete(parts)


def _is_complete(parts: Sequence[Part]) -> bool:
    return bool(parts) and all(part.here for part in parts)


def _size(parts: Sequence[Part]) -> str:
    """Size of all parts together."""
    known = [part.size for part in parts if part.size is not None]
    if not known:
        return "of unknown size"
    total = sum(known)
    for unit, factor in UNITS.items():
        if total >= factor:
            return f"{total / factor:.3g} {unit}"
    return f"{total} bytes"


def _explain(items: Sequence[Wanted], places: Places, folder: Path) -> None:
    """Print how a machine without a network uses the files in the folder."""
    print("\nOn a machine without a network:")
    for name, value in environment(folder).items():
        print(f"  export {name}={shlex.quote(value)}")
    for option, download in items:
        if isinstance(download, SetCopy):
            print(f"  --{option} {shlex.quote(str(download.folder(places) / '*'))}   in place of {download.title}")
