"""`flextok fit --smoke`: every part of an experiment's run, in minutes, on a machine without its data and networks.

It changes the parsed configuration and then runs it as any other. All that it writes lies in a temporary folder:
- Shards of the kind that the experiment names hold random pictures, latents, tokens or text states.
- Files of random weights stand for every network that is not on this machine.
- A network of more than `MOST` parameters keeps its widths, heads and vocabulary, and `BLOCKS` of its blocks.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import Namespace, strip_meta
from PIL import Image

from flextok_pl.cli.front import read
from flextok_pl.cli.plan import training_sets
from flextok_pl.cli.prefetch import wanted
from flextok_pl.cli.stand_ins import BLOCKS, CAPTION, STAND_INS, write_t5
from flextok_pl.cli.tools import encode_shards, tokenize_shards
from flextok_pl.cli.training import FlexTokCLI, run_cli
from flextok_pl.config import TOKENIZER_PRESETS, FlexTokConfig, PriorConfig, VAEConfig, config_from_dict
from flextok_pl.contracts import checked_size, height_width
from flextok_pl.data.shards.index import ShardIndex
from flextok_pl.data.shards.writer import Sample, shard_name, write_index, write_shard
from flextok_pl.errors import UserError
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.modules.saved import SavedPrior, SavedTokenizer
from flextok_pl.modules.tokenizer import build_tokenizer

MOST = 50_000_000
STEPS, BATCH, ACCUMULATE = 2, 2, 2
TRAIN, HELD_OUT = STEPS * BATCH * ACCUMULATE, 3
"""Samples: an epoch of the training, and evaluation batches of which the last is not full."""
CLASSES = 10
"""Of the data of a model that knows no classes."""

ConfigT = TypeVar("ConfigT", FlexTokConfig, PriorConfig)


@dataclass
class SmokeOptions:
    """What only a training takes.

    Args:
        smoke: try every part of the run in a few steps, with random data, random weights in place of downloads, and few
            blocks of large networks. Nothing of it is kept, and its numbers mean nothing.
    """

    smoke: bool = False


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok fit`."""
    asked = [value for name, value in read(arguments)[0] if name == "smoke"]
    arguments = [each for each in arguments if not each.startswith("--smoke")]
    if not asked or asked[-1] in ("false", "False"):
        run_cli(FlexTokCLI, command, arguments)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flextok_smoke_") as folder:
        run_cli(partial(SmokeCLI, Path(folder)), command, arguments)
    print(f"smoke: all of it has run, in {time.monotonic() - began:.0f} s; the numbers above mean nothing", flush=True)


class SmokeCLI(FlexTokCLI):
    """Trains as `flextok fit` does, on what it writes to a folder, and tests what the training exports."""

    def __init__(self, folder: Path, *parsed: Any) -> None:
        self._folder = folder
        super().__init__(*parsed)

    def before_instantiate_classes(self) -> None:
        """Change the configuration."""
        if self.config.ckpt_path is not None:
            raise UserError(f"ckpt_path={self.config.ckpt_path}: --smoke starts from nothing; leave it out")
        self.config = strip_meta(self.config)
        changes = Smoke(self.config, self._folder).apply()
        print("".join(f"smoke: {change}\n" for change in changes), end="", flush=True)
        super().before_instantiate_classes()

    def run(self) -> None:
        """Train, and test the exported model, where the experiment measures one."""
        super().run()
        if self.config.rfid is None and self.config.gfid is None:
            return
        given, exported = self.config.model.init_args, self.place.folder / "tokenizer.safetensors"
        del self.model, self.trainer  # with the optimizer, for its memory
        if exported.is_file():
            model: Any = SavedTokenizer(str(exported))
        else:
            prior = exported.with_name("prior.safetensors")
            model = SavedPrior(str(prior), given.tokenizer, given.text_encoder)
        self.method = "test"
        self.instantiate_trainer().test(model, datamodule=self.datamodule, verbose=False)


class Smoke:
    """The changes of a parsed configuration."""

    def __init__(self, config: Namespace, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.kind: str = config.model.class_path.rsplit(".", 1)[-1]
        self.model: Any = config.model.init_args
        self.notes: list[str] = []
        self.random: list[str] = []  # options whose weights are

    def apply(self) -> list[str]:
        """Change the configuration in place, and give lines that say how.

        Raises:
            UserError: there is no stand-in for something that the experiment would fetch.
        """
        if self.kind not in NETWORKS:
            raise UserError(f"model={self.config.model.class_path}: --smoke knows {', '.join(NETWORKS)} only")
        whole = self._few_blocks()
        self._models(whole)
        self._networks()
        self._few_steps()
        self._data()
        self._evaluation()
        for option, download in wanted(self.config):
            raise UserError(f"{option}: --smoke has no stand-in for {download.title}; leave the option out")
        if self.random:
            self.notes.append(f"random weights for {', '.join(self.random)}")
        return self.notes

    # The model

    def _few_blocks(self) -> bool:
        """Take few blocks of a large network; whether it has all of them."""
        if self.kind not in ("TokenizerModule", "PriorModule"):
            return True
        net = self._net()
        kept = with_few_blocks(net)
        for field in fields(kept):
            if getattr(kept, field.name) != getattr(net, field.name):
                self.model.net[field.name] = getattr(kept, field.name)
                self.notes.append(f"model.net.{field.name} {getattr(net, field.name)} -> {getattr(kept, field.name)}")
        return bool(kept == net)

    def _net(self) -> Any:
        return config_from_dict(NETWORKS[self.kind], self.model.net.as_dict())

    def _models(self, whole: bool) -> None:
        """Write models of this package for those that are not here, or have other blocks than the network now has."""
        if self._is_missing("vae"):
            self._takes("vae", self._autoencoder(self._net().vae))
        if self._is_missing("tokenizer"):
            self._takes("tokenizer", self._tokenizer(self.model.tokenizer))
        if self.model.get("text_encoder") and self._is_missing("text_encoder") and self.model.text_encoder != "minilm":
            self._takes("text_encoder", write_t5(self.folder / "t5", self._net().text_width))
        if self.model.get("init_from") and (self._is_missing("init_from") or not whole):
            file, net = self.folder / "init_from.safetensors", self._net()
            if self.kind == "TokenizerModule":
                self._takes("init_from", build_tokenizer(net, self.model.vae).save_pretrained(file))
            elif self.kind == "PriorModule":
                self._takes("init_from", Prior(net).save_pretrained(file))
            else:
                self._takes("init_from", self._autoencoder(net))

    def _is_missing(self, option: str) -> bool:
        value = self.model.get(option)
        return value is not None and not Path(value).expanduser().exists()

    def _takes(self, option: str, file: Path, group: str = "model") -> None:
        options = self.model if group == "model" else self.config[group]
        options[option] = str(file)
        self.random.append(f"{group}.{option}")

    def _autoencoder(self, config: VAEConfig | None) -> Path:
        if config is None:
            raise UserError(
                f"model.vae={self.model.vae} is not here, and net.vae=null does not describe it: set net.vae"
            )
        VAE(config).save_pretrained(self.folder / "vae")
        return self.folder / "vae"

    def _tokenizer(self, name: str) -> Path:
        """Of the size that a name such as `EPFL-VILAB/flextok_d18_d28_dfn` states, but for its blocks."""
        config = next((preset for part, preset in TOKENIZER_PRESETS.items() if part in name), None)
        if config is None:
            raise UserError(
                f"model.tokenizer={name} is not here, and its name does not state its size: give a file, or a name "
                f"with one of {', '.join(TOKENIZER_PRESETS)}"
            )
        return FlexTok(with_few_blocks(config)).save_pretrained(self.folder / "tokenizer.safetensors")

    # Networks of others

    def _networks(self) -> None:
        """Write weights for those that would be fetched."""
        for group, options in {"model": self.model, "rfid": self.config.rfid, "gfid": self.config.gfid}.items():
            for name, weights, write in STAND_INS:
                if options is None or not options.get(name) or (options.get(weights) is not None and weights != name):
                    continue
                path = write(self.folder, options[name])
                if path is not None:
                    self._takes(weights, path, group)

    # The run

    def _few_steps(self) -> None:
        trainer, data, model = self.config.trainer, self.config.data, self.model
        accumulate = min(trainer.accumulate_grad_batches, ACCUMULATE)
        trainer.update(
            Namespace(  # type: ignore[no-untyped-call]
                devices=1,
                num_nodes=1,
                strategy="auto",
                max_steps=STEPS,
                max_epochs=None,
                max_time=None,
                accumulate_grad_batches=accumulate,
                val_check_interval=STEPS * accumulate,
                check_val_every_n_epoch=None,
                log_every_n_steps=1,
                logger=Namespace(  # type: ignore[no-untyped-call]
                    class_path="lightning.pytorch.loggers.TensorBoardLogger",
                    init_args=Namespace(  # type: ignore[no-untyped-call]
                        save_dir=str(self.folder / "runs"), name="lightning_logs", version=None, default_hp_metric=False
                    ),
                ),
            )
        )
        self.config.global_batch_size = None
        for name in ("checkpoint", "best"):
            if self.config[name] is not None:
                self.config[name].every_n_train_steps, self.config[name].every_n_epochs = STEPS, None
                self.config[name].train_time_interval = None
        data.batch_size = data.eval_batch_size = BATCH
        data.num_workers = min(data.num_workers, 1)
        data.val_limit = None
        most = {"warmup_steps": 1, "gan_start_step": 1, "scale_batches": 2}
        for name in most.keys() & vars(model).keys():
            model[name] = min(model[name], most[name])
        if model.get("compile_blocks"):
            model.compile_blocks = False
            self.notes.append("blocks are not compiled")
        self.notes.append(
            f"one process of {trainer.accelerator}, {STEPS} steps of {BATCH} x {accumulate} samples, "
            f"{HELD_OUT} held-out ones"
        )

    def _data(self) -> None:
        """Write the shards."""
        data = self.config.data
        pictures = partial(self._pictures, height_width(checked_size(data.image_size)), data.channels)
        names = {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT}
        for split in names:
            source = data[split]
            if source is None:
                continue
            entries = source if isinstance(source, list) else [source]
            held = fields_of(source) if split == "train" else set()
            written = [str(self._encoded(pictures(f"{split}_{i}", names[split]), held)) for i in range(len(entries))]
            data[split] = written if isinstance(source, list) else written[0]
            self.notes.append(f"data.{split}: {names[split]} random samples of {', '.join(sorted(held)) or 'images'}")
        if self.config.gfid is not None and self.config.gfid.classifier_data is not None:
            self.config.gfid.classifier_data = str(pictures("classifier_data", self._num_classes()))

    def _num_classes(self) -> int:
        return (self.model.net.num_classes if self.kind == "PriorModule" else 0) or CLASSES

    def _pictures(self, size: tuple[int, int], channels: int, name: str, count: int) -> Path:
        """Noise, somewhat larger than the images, each with a class and a caption."""
        num_classes = self._num_classes()
        generator, samples = torch.Generator().manual_seed(count), []
        for number in range(count):
            shape = (size[0] + 8, size[1] + 16, channels)
            pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels.squeeze()).save(buffer, "PNG", compress_level=1)
            label = str(number % num_classes).encode()
            files = {"png": buffer.getvalue(), "cls": label, "txt": CAPTION.format(number).encode()}
            samples.append(Sample(f"{name}_{number}", files))
        folder = self.folder / name
        folder.mkdir()
        halves = [samples[: count // 2], samples[count // 2 :]]
        shards = tuple(write_shard(folder / shard_name(i), half) for i, half in enumerate(halves))
        classes = tuple(f"class {i}" for i in range(num_classes))
        return write_index(ShardIndex(folder, ("image", "label", "text"), shards, classes)).folder

    def _encoded(self, pictures: Path, held: set[str]) -> Path:
        """Shards of latents or tokens, made of image shards by the networks of the experiment."""
        data, folder = self.config.data, pictures.with_name(f"{pictures.name}_encoded")
        options: dict[str, Any] = {"image_size": data.image_size, "batch_size": BATCH, "num_workers": 0}
        if "tokens" in held:
            if self.model.get("tokenizer") is None:
                raise UserError(f"data.train={data.train}: name the tokenizer of these tokens as model.tokenizer")
            stores_states = "text_states" in held or "model.text_encoder" in self.random
            encoder = self.model.text_encoder if stores_states else None
            tokenize_shards(str(pictures), str(folder), tokenizer=self.model.tokenizer, text_encoder=encoder, **options)
        elif held & {"latent", "teacher_features"}:
            vae = self.model.get("vae") or self.model.get("tokenizer")
            teacher = {name: self.model.get(name) for name in ("teacher", "teacher_weights")}
            encode_shards(
                str(pictures), str(folder), vae=vae, **(teacher if "teacher_features" in held else {}), **options
            )
        else:
            return pictures
        return folder

    def _evaluation(self) -> None:
        """Measure at the fewest and the most tokens."""
        config = self.config
        few = {"max_samples": HELD_OUT, "num_samples": HELD_OUT, "grid_samples": 2, "batch_size": BATCH}
        for group in (config.rfid, config.gfid):
            if group is None:
                continue
            most = self._num_tokens()
            group.budgets, group.fit_budgets, group.num_steps = [1, most], [1, most], 2
            group.cache_dir, group.output_dir = str(self.folder / "statistics"), None
            group.every_n_validations = min(group.every_n_validations, 1)
            for name in few:
                if group.get(name) is not None:
                    group[name] = min(group[name], few[name])
        for group in (config.codebook, config.positions):
            if group is not None and "every_n_validations" in group:
                group.every_n_validations = min(group.every_n_validations, 1)

    def _num_tokens(self) -> int:
        if self.kind == "PriorModule":
            return int(self.model.net.num_tokens)
        if self.kind == "TokenizerModule":
            return int(self.model.net.num_registers)
        return FlexTok.from_pretrained(self.model.tokenizer).num_registers


NETWORKS: dict[str, type[Any]] = {
    "VAEModule": VAEConfig,
    "TokenizerModule": FlexTokConfig,
    "DistillationModule": FlexTokConfig,
    "PriorModule": PriorConfig,
}
"""Module -> configuration of its network."""


def with_few_blocks(config: ConfigT) -> ConfigT:
    """A large network's configuration with fewer blocks, or a small one's as it is."""
    with torch.device("meta"):
        network = FlexTok(config) if isinstance(config, FlexTokConfig) else Prior(config)
    weights = [each for name, each in network.named_parameters() if not name.startswith("vae.")]
    if sum(each.numel() for each in weights) <= MOST:
        return config
    if isinstance(config, PriorConfig):
        return replace(config, depth=min(config.depth, BLOCKS))
    encoder, decoder = min(config.encoder_depth, BLOCKS), min(config.decoder_depth, BLOCKS)
    layer = None if config.repa_layer is None else min(config.repa_layer, decoder - 1)
    return replace(config, encoder_depth=encoder, decoder_depth=decoder, repa_layer=layer)


def fields_of(source: str | list[str]) -> set[str]:
    """What a training set holds, by its index if it is here, or else by its name."""
    known = {"tokens", "latent", "teacher_features", "text_states"}
    if indices := training_sets(source):
        return known & set(indices[0].fields)
    words = {"token": "tokens", "latent": "latent", "feature": "teacher_features"}
    return {field for word, field in words.items() if word in str(source)}
