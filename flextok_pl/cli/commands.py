"""The commands of `flextok`: what they run, and where their options are defined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRAINER = "lightning.pytorch.trainer.trainer:Trainer"

GIVEN_BY_THE_SUITE = ("model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders")
"""Parameters of the Trainer's methods that are not options."""


@dataclass(frozen=True)
class Command:
    """One command.

    `run` is a `module:function` of `flextok_pl.cli` that takes the command and its arguments; by default the single
    function in `options` is called with the options. `inputs` names the options whose values must be existing shard
    sets, folders or files, or patterns and URLs of such. `former` maps other names of an option to its name: former
    ones, those of other commands, and one for a single value of several.
    """

    summary: str
    options: tuple[str, ...]  # functions and classes, `module:name`, whose parameters they are
    run: str = "tool:run"
    groups: bool = False  # whether it also takes the groups of a training: trainer, data, model and callbacks
    inputs: tuple[str, ...] = ()
    former: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_sweep(self) -> bool:
        """Whether its options are in a file, which is its one positional argument."""
        return self.run.startswith("sweep:")


def _training(summary: str, method: str, *options: str, run: str = "training:run") -> Command:
    return Command(summary, (f"{TRAINER}.{method}", f"{TRAINING}:RunOptions", *options), run, groups=True)


def _tool(summary: str, function: str, **more: Any) -> Command:
    return Command(summary, (f"flextok_pl.{function}",), **more)


TRAINING = "flextok_pl.cli.training"
FINISHED = f"{TRAINING}:FinishedModels"
SMOKE = "flextok_pl.cli.smoke"
SWEEP = "flextok_pl.sweeps.sweep:Sweep"
SEARCH = "flextok_pl.cli.search"
VERIFIERS = "flextok_pl.search.verifier_options:VerifierOptions"

COMMANDS = {
    "fit": _training("train a model", "fit", f"{SMOKE}:SmokeOptions", run="smoke:run"),
    "validate": _training("evaluate on the validation set, cheaply", "validate", FINISHED),
    "test": _training("evaluate in full: every metric at every token budget", "test", FINISHED),
    "predict": _training("write the tokens of pictures, or tokens that a prior generates", "predict", FINISHED),
    "sweep": Command(
        "search over the options of an experiment, here or on a Slurm cluster",
        (SWEEP, "flextok_pl.cli.sweep:SweepOptions"),
        "sweep:run",
    ),
    "sweep status": Command(
        "show the trials of a sweep", (SWEEP, "flextok_pl.cli.sweep:StatusOptions"), "sweep:status"
    ),
    "plan": _training(
        "show whether a training fits a machine, and how long it takes",
        "fit",
        "flextok_pl.cli.plan:PlanOptions",
        run="plan:run",
    ),
    "prefetch": _training(
        "download what an experiment needs into a folder, for machines without a network",
        "fit",
        "flextok_pl.cli.prefetch:PrefetchOptions",
        run="prefetch:run",
    ),
    "data demo": _tool("write the embedded OpenMoji demo set as shards", "data.convert.demo:write_demo"),
    "data folder": _tool(
        "write a folder of images as shards", "data.convert.folder:write_folder", inputs=("src", "captions")
    ),
    "data imagenet": _tool(
        "write ImageNet-1k as shards, from its tars or its folders",
        "data.convert.imagenet:write_imagenet",
        inputs=("src", "classes"),
    ),
    "data parquet": _tool(
        "write parquet files, also of the Hugging Face Hub, as shards", "data.convert.parquet:write_parquet"
    ),
    "data reshard": _tool(
        "write WebDataset tars, or a shard set, as new shards",
        "data.convert.reshard:write_resharded",
        inputs=("src", "class_names"),
        former={"classes": "class_names"},
    ),
    "data latents": _tool(
        "encode the images of a shard set with a VAE, as shards",
        "cli.tools:encode_shards",
        inputs=("src", "teacher_weights"),
    ),
    "data tokens": _tool(
        "tokenize the images of a shard set, as shards",
        "cli.tools:tokenize_shards",
        inputs=("src",),
        former={"ckpt": "tokenizer"},
    ),
    "data verify": _tool(
        "check a shard set in full and list all errors", "cli.shards:verify_shards", inputs=("shards",)
    ),
    "data measure": _tool(
        "add the sizes of pictures to the index of an older shard set", "cli.shards:measure_shards", inputs=("shards",)
    ),
    "data stats": _tool(
        "show statistics of a shard set: classes, sizes, captions, pixels",
        "cli.shards:show_statistics",
        inputs=("shards",),
    ),
    "fid": _tool(
        "measure images against reference images: FID, KID, precision, recall",
        "cli.fid:compare_images",
        inputs=("images", "reference", "weights"),
    ),
    "compare": _tool(
        "show two files of results side by side, and where their protocols differ",
        "cli.fid:compare_records",
        inputs=("first", "second"),
    ),
    "decoding": _tool(
        "measure steps and guidance at every token budget, and recommend the best",
        "cli.decoding:compare_decodings",
        inputs=("reference", "weights"),
    ),
    "probe": _tool(
        "measure how well the first tokens predict the class", "cli.probe:probe_tokens", inputs=("train", "val")
    ),
    "doctor": _tool(
        "check a run for problems, and say what to do about them",
        "cli.doctor:diagnose_run",
        inputs=("run", "data", "plan", "reference"),
    ),
    "doctor reference": _tool(
        "write loss curves of several runs of an experiment, for comparison",
        "cli.doctor:make_reference",
        inputs=("runs",),
    ),
    "report": _tool(
        "write the results of an evaluation as an HTML page", "cli.report:write_report", inputs=("folder",)
    ),
    "push": _tool(
        "publish a model on the Hugging Face Hub with its card; first shows what it would send",
        "cli.push:push_model",
        inputs=("records",),
        former={"licence": "license", "data_licence": "data_license", "branch": "revision"},
    ),
    "generate": _tool(
        "show generated images at several token budgets, as one picture",
        "cli.generate:generate_images",
        former={"num_tokens": "budgets", "class": "classes", "text": "texts"},
    ),
    "search": Command(
        "search for tokens whose images score best with a verifier, for classes or texts",
        (f"{SEARCH}:RunOptions", "flextok_pl.search.options:SearchOptions", VERIFIERS),
        "search:run",
        inputs=("prompts", "classifier_data"),
        former={
            **{"class": "classes", "text": "texts", "verifier": "verifiers"},
            **{
                name: f"decoding.{name}"
                for name in ("num_steps", "guidance", "guidance_scale", "solver", "guidance_interval")
            },
        },
    ),
    "search measure": _tool(
        "measure the results of searches, and draw quality against cost",
        "cli.search:measure_searches",
        inputs=("runs", "reference", "classifier_data", "weights", "classifier_weights"),
    ),
    "app": Command(
        "try a tokenizer and a prior on a page in your browser",
        ("flextok_pl.cli.app:AppOptions", VERIFIERS),
        "app:run",
        inputs=("examples", "classifier_data"),
        former={"verifier": "verifiers"},
    ),
    "env": _training("show versions, devices and configuration, for a bug report", "fit", run="env:run"),
    "reconstruct": _tool(
        "show images at several token budgets, as one picture",
        "cli.tools:reconstruct_images",
        inputs=("images",),
        former={"ckpt": "tokenizer", "num_tokens": "budgets"},
    ),
}

GROUPS = {
    "rfid": "flextok_pl.callbacks:ReconstructionFID",
    "gfid": "flextok_pl.callbacks:GenerationFID",
    "codebook": "flextok_pl.callbacks:CodebookReport",
    "positions": "flextok_pl.callbacks:TokenReport",
    "metrics_log": "flextok_pl.callbacks:MetricsLog",
    "throughput": "flextok_pl.callbacks:Throughput",
    "lr_monitor": "lightning.pytorch.callbacks:LearningRateMonitor",
    "hparams": "flextok_pl.callbacks:HParams",
    "checks": "flextok_pl.callbacks:RunChecks",
    "checkpoint": "flextok_pl.runtime:StepCheckpoint",
    "best": "flextok_pl.runtime:StepCheckpoint",
    # Last, so that it swaps the raw weights back after every other callback has evaluated the averaged ones.
    "ema": "flextok_pl.callbacks:EMA",
    # After the average, so that a checkpoint holds that of its step.
    "preemption": "flextok_pl.runtime:Preemption",
}
"""Group of a training's options -> the callback that takes them: `null` leaves it out, `{}` uses its defaults."""

FIT_ONLY = frozenset({"throughput", "lr_monitor", "hparams", "checks", "checkpoint", "best", "ema", "preemption"})
"""Groups that an evaluation ignores."""
