"""Reads the folder of a run: its options, logs, checkpoint and finished model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from flextok_pl.cli.tools import picture_size
from flextok_pl.data import ShardDataModule
from flextok_pl.diagnosis.logged import Facts
from flextok_pl.diagnosis.logs import read_curves
from flextok_pl.diagnosis.training import Curve
from flextok_pl.evaluation.report import read_records
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.modules import TokenizerModule
from flextok_pl.runtime import newest_intact, without_tensors
from flextok_pl.runtime.sharding import CURRENT_STATE
from flextok_pl.sharing.run import read_mapping

Kind = Literal["tokenizer", "prior", "autoencoder", "other"]

KINDS: dict[str, Kind] = {"TokenizerModule": "tokenizer", "PriorModule": "prior", "VAEModule": "autoencoder"}
"""Class of a module -> what it trains."""

OF_BATCHES = {
    "data": ("batch_size", "image_size"),
    "trainer": ("accumulate_grad_batches", "max_steps", "precision", "gradient_clip_val"),
}
"""Group -> its options that affect a loss, beside those of the model."""

OF_PICTURES = ("image_size", "channels", "labels", "cache_dir")
"""Options of `data` that decide how pictures are read."""


@dataclass(frozen=True)
class RunContents:
    """The folder of a run; `open` reads one."""

    folder: Path
    config: Mapping[str, Any]  # from its config.yaml, or else from the checkpoint
    checkpoint: Path | None  # the newest complete one
    curves: Mapping[str, Curve]

    @classmethod
    def open(cls, folder: Path) -> RunContents:
        """Read the folder of a run, also while it trains.

        Raises:
            ValueError: it is not the folder of a run.
        """
        checkpoints = folder / "checkpoints"
        checkpoint = newest_intact(checkpoints, contents=False) if checkpoints.is_dir() else None
        file = folder / "config.yaml"
        if file.is_file():
            config = read_mapping(file)
        elif checkpoint is not None:
            config = _config_of(without_tensors(checkpoint))
        else:
            raise ValueError(
                f"run={folder} is not the folder of a run: it has neither config.yaml nor a checkpoint; give one such "
                "as runs/tokenizer/demo/version_0"
            )
        if not isinstance(config.get("model"), dict):
            raise ValueError(f"{file} is not the configuration of a training: it has no group `model`")
        return cls(folder, config, checkpoint, read_curves(folder))

    def group(self, name: str) -> Mapping[str, Any]:
        """A group of options; empty if it is left out."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def model(self) -> Mapping[str, Any]:
        """The options of the module."""
        return self.group("model").get("init_args") or {}

    @property
    def net(self) -> Mapping[str, Any]:
        """The options of its network."""
        return self.model.get("net") or {}

    @property
    def kind(self) -> Kind:
        """What the run trains."""
        return KINDS.get(str(self.group("model").get("class_path")).rpartition(".")[2], "other")

    @property
    def experiment(self) -> str:
        """The experiment's name, such as `tokenizer/demo`."""
        loggers = self.group("trainer").get("logger")
        for each in loggers if isinstance(loggers, list) else [loggers]:
            name = (each.get("init_args") or {}).get("name") if isinstance(each, dict) else None
            if name:
                return str(name)
        return "/".join(self.folder.absolute().parts[-3:-1])

    @cached_property
    def steps(self) -> int:
        """Finished optimizer steps, according to logs and checkpoint."""
        logged = [self.curves["train/loss"][-1][0] + 1] if "train/loss" in self.curves else []
        saved = [] if self.checkpoint is None else [int(without_tensors(self.checkpoint)["global_step"])]
        return max([*logged, *saved], default=0)

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps of the whole training, if its options state them."""
        steps = self.group("trainer").get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def options(self) -> dict[str, Any]:
        """The options that decide about a loss, by dotted name."""
        found = _flat(self.model, "model.")
        for group, names in OF_BATCHES.items():
            found |= {f"{group}.{name}": self.group(group)[name] for name in names if name in self.group(group)}
        return found

    def curve(self, name: str) -> Curve:
        """The values logged under this name; empty if there are none."""
        return self.curves.get(name, [])

    @property
    def learning_rates(self) -> Curve:
        """The learning rate of the weight group that has the largest, as the monitor or the module logs it."""
        found = [curve for name, curve in self.curves.items() if name.startswith("lr-") or name == "train/lr"]
        return max(found, key=lambda curve: max(rate for _, rate in curve), default=[])

    def facts(self, val_samples: int | None) -> Facts:
        """The facts that checks of logged values need."""
        levels, ema = self.net.get("fsq_levels"), self.group("ema")
        rates = []
        if self.kind == "tokenizer" and "null_dropout" in self.net:
            rates.append(("model.net.null_dropout", float(self.net["null_dropout"])))
        if self.kind == "prior" and "condition_dropout" in self.model and "val/condition_gap" in self.curves:
            rates.append(("model.condition_dropout", float(self.model["condition_dropout"])))
        return Facts(
            steps=self.steps,
            total=self.max_steps,
            vocab_size=math.prod(levels) if levels else self.net.get("vocab_size"),
            val_samples=val_samples,
            null_rates=tuple(rates),
            ema=(float(ema["decay"]), int(ema.get("update_every_n_steps") or 1)) if "decay" in ema else None,
        )

    def errors_by_budget(self) -> dict[int, float]:
        """Squared error by budget, of the last test, or else of the last validation that left records."""
        for file in (self.folder / "rfid.json", self.folder / "rfid_fit" / "rfid.json"):
            if file.is_file():
                return {int(r["num_tokens"]): float(r["value"]) for r in read_records(file) if r["metric"] == "mse"}
        return {}

    def tokenizer(self) -> FlexTok | None:
        """The trained tokenizer, exported or from the newest checkpoint; None without either."""
        file = self.folder / "tokenizer.safetensors"
        if file.is_file():
            return FlexTok.from_pretrained(file)
        if self.checkpoint is None or self.checkpoint.is_dir():
            return None
        module = TokenizerModule.load_from_checkpoint(self.checkpoint, map_location="cpu", weights_only=True)
        return module.tokenizer.eval()

    def autoencoder(self) -> VAE | None:
        """The exported autoencoder, or None before the training's end."""
        folder = self.folder / "vae"
        return VAE.from_pretrained(folder) if folder.is_dir() else None

    def states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The averaged and the raw weights of the newest checkpoint; None if it has no average."""
        if self.checkpoint is None or self.checkpoint.is_dir():
            return None
        held = without_tensors(self.checkpoint)
        return (held["state_dict"], held[CURRENT_STATE]) if held.get(CURRENT_STATE) else None

    def data(self, source: str | None, samples: int) -> ShardDataModule:
        """Pictures to run the model on: `source`, or else those of the run's validation, at their size there.

        Raises:
            ValueError: they do not exist.
        """
        own = dict(self.group("data"))
        chosen = source or own.get("val")
        if chosen is None:
            raise ValueError("the run names no validation set: give --data")
        if isinstance(chosen, str) and "://" not in chosen and not Path(chosen).expanduser().exists():
            raise ValueError(f"{chosen} does not exist: run this where the training was started, or give --data")
        if own.get("image_size") is None and self.kind == "tokenizer" and (tok := self.tokenizer()) is not None:
            own |= {"image_size": picture_size(tok), "channels": tok.image_channels}
        return ShardDataModule(
            val=chosen,
            eval_batch_size=min(32, own.get("eval_batch_size") or own.get("batch_size") or 32),
            num_workers=0,
            val_limit=samples,
            **{name: own[name] for name in OF_PICTURES if own.get(name) is not None},
        )


def planned_speed(file: Path) -> float:
    """Read images per second from a plan that `flextok plan --json` wrote."""
    try:
        planned = json.loads(file.read_text(encoding="utf-8"))["images_per_s"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"plan={file} was not written by `flextok plan --json`: {error!r}") from error
    if not planned:
        raise ValueError(f"plan={file} has no time: the machine's peak is unknown; plan again with --peak_tflops")
    return float(planned)


def _config_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training without a config.yaml, as far as its checkpoint holds them."""
    options = dict(checkpoint.get("hyper_parameters", {}))
    net = options.get("net") or {}
    marks = {"fsq_levels": "TokenizerModule", "num_classes": "PriorModule", "block_out_channels": "VAEModule"}
    name = next((name for mark, name in marks.items() if mark in net), "")
    return {"model": {"class_path": name, "init_args": options}}


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
