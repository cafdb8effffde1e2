"""Two processes with half the batch each train as one does with all of it, whether weights are copied or sharded.

Processes are forked as torchrun would start them. What is compared are the logged losses and gradient norms of each
step, the exported averages, and what is evaluated during the fit.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor

from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.config import PriorConfig
from flextok_pl.models.prior import Prior
from flextok_pl.modules.resume import ResumableModule

ROOT = Path(__file__).parents[2]
STEPS = 4
UNCOUNTED = ["--throughput", "null"]
"""Leaves out counting operations, which takes each process a second; test_half_precision_... counts them."""


def tokenizer_fit(shards: Path, folder: Path) -> list[str]:
    return [
        *("fit", "--config", str(ROOT / "experiments" / "tokenizer" / "tiny.yaml"), "--codebook", "null"),
        *("--data.train", str(shards / "train"), "--data.val", str(shards / "val"), "--data.eval_batch_size", "4"),
        *(
            "--data.val_limit",
            "17",
            "--trainer.limit_val_batches",
            "1.0",
        ),  # two batches on one, three on the other
        *("--rfid.num_steps=1", "--rfid.max_samples=null", "--rfid.cache_dir=null", "--rfid.fit_budgets=[4]"),
        *("--trainer.accumulate_grad_batches", "2", "--model.mup_base_width", "32"),
    ]


def aligned_fit(shards: Path, folder: Path) -> list[str]:
    """A tokenizer whose alignment with a teacher stops after two steps, and whose patches take a route."""
    teacher = folder / "teacher.pth"
    torch.manual_seed(3)
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), teacher)
    return [
        *tokenizer_fit(shards, folder),
        *("--rfid", "null", "--model.net.repa_layer", "1", "--model.repa_until", "0.5"),
        *("--model.teacher", "vit_tiny_patch16_224", "--model.teacher_weights", str(teacher)),
        *("--model.repa_projection", "conv", "--model.repa_spatial_norm", "0.6"),
        *("--model.route_share", "0.5", "--model.route_blocks", "[0,0]"),
    ]


def prior_fit(shards: Path, folder: Path) -> list[str]:
    net = {"num_classes": 2, "num_tokens": 64, "vocab_size": 4375, "depth": 2, "width": 32, "head_dim": 16}
    experiment = {
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "image_size": 64, "eval_batch_size": 4},
        "model": {"class_path": "PriorModule", "init_args": {"net": net, "tokenizer": str(DEMO_TOKENIZER)}},
        "positions": {},
        "ema": {"decay": 0.5},
    }
    (folder / "prior.yaml").write_text(yaml.safe_dump(experiment))
    base = str(ROOT / "experiments" / "base.yaml")
    return ["fit", "--config", base, "--config", str(folder / "prior.yaml"), "--model.activation_checkpointing", "true"]


def fit(
    start_ranks: Any,
    folder: Path,
    strategy: str,
    world_size: int,
    arguments: list[str],
    prepare: Callable[[int], object] | None = None,
) -> Path:
    """Train in one or more processes; returns the run's folder."""
    more = [
        *("--trainer.accelerator", "cpu", "--trainer.strategy", strategy, "--trainer.devices", str(world_size)),
        *("--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1", "--model.warmup_steps", "1"),
        *("--data.batch_size", str(4 // world_size), "--data.num_workers", "0"),
        *("--checkpoint.every_n_train_steps", "2", "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_model_summary", "false"),
    ]
    ranks = start_ranks(folder, world_size, [*arguments, *more], prepare)
    for process in ranks:
        process.join(180)
    assert [process.exitcode for process in ranks] == [0] * world_size
    return max((folder / "runs").glob("**/version_*"), key=lambda run: run.stat().st_mtime)


def logged(run: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(run)).Reload()
    return [event.value for event in events.Scalars(tag)]


def validated(run: Path) -> dict[str, float]:
    """The module's own values of the last validation."""
    events = EventAccumulator(str(run)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if re.match(r"val/(loss|token_gap|bits_per_token|accuracy)", tag)]
    return {tag: events.Scalars(tag)[-1].value for tag in tags}


def exported(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("*.safetensors")
    return load_file(file)


def gradients(folder: Path) -> list[dict[str, torch.Tensor]]:
    """What `keep_gradients` has kept of the last training in a folder, by step."""
    return [torch.load(folder / f"gradients{step}.pt", weights_only=True) for step in range(STEPS)]


@pytest.fixture
def keep_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first process write the whole gradient of each step, before clipping, to its folder."""

    def keep(module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
        if module.global_rank == 0:
            torch.save(whole, f"gradients{module.global_step}.pt")

    monkeypatch.setattr(ResumableModule, "on_before_optimizer_step", keep)


def assert_same_training(run: Path, reference: Path) -> None:
    # torch sums the squares of a sharded gradient in float32 in another order, hence the norms' larger tolerance.
    for tag, tolerance in (("train/loss", 1e-6), ("train/grad_norm", 2e-5)):
        values = logged(run, tag)
        assert len(values) == STEPS and values == pytest.approx(logged(reference, tag), rel=tolerance), tag
    assert_same_weights(run, reference)


def assert_same_weights(run: Path, reference: Path) -> None:
    weights, expected = exported(run), exported(reference)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():  # Adam's first steps magnify the rounding of gradients near zero
        torch.testing.assert_close(weights[name], value, rtol=3e-5, atol=5e-6)


@pytest.mark.parametrize("make", [tokenizer_fit, prior_fit], ids=["tokenizer", "prior"])
def test_two_processes_train_as_one(
    make: Any, image_shards: Path, tmp_path: Path, start_ranks: Any, keep_gradients: None
) -> None:
    for name in ("auto", "ddp", "fsdp2", "sharded"):
        (tmp_path / name).mkdir()
    arguments = [*make(image_shards, tmp_path), *UNCOUNTED]
    one = fit(start_ranks, tmp_path / "auto", "auto", 1, arguments)
    runs = {name: fit(start_ranks, tmp_path / name, name, 2, arguments) for name in ("ddp", "fsdp2")}
    for name, run in runs.items():
        assert_same_training(run, one)
        assert validated(run) == pytest.approx(validated(one), rel=1e-5, abs=1e-5)
        for own, expected in zip(gradients(tmp_path / name), gradients(tmp_path / "auto"), strict=True):
            assert own.keys() == expected.keys()
            for tensor, value in expected.items():  # some are zero in the first step
                assert (own[tensor] - value).norm() <= 2e-6 * value.norm(), tensor
        if make is tokenizer_fit:
            records = [json.loads((each / "rfid_fit" / "rfid.json").read_text()) for each in (run, one)]
            values = [{r["metric"]: r["value"] for r in each} for each in records]
            assert values[0] == pytest.approx(values[1], rel=1e-3)
            assert {r["num_samples"] for each in records for r in each} == {17}

    if make is prior_fit:
        return  # what follows is the strategy's, whatever the module
    # Sharded training goes on from its own checkpoint, be it the last, and from its parts, and alone.
    for step in (4, 2):
        steps = [*arguments, "--ckpt_path", str(runs["fsdp2"] / "checkpoints" / f"step000000{step}.ckpt")]
        resumed = fit(start_ranks, tmp_path / "fsdp2", "fsdp2", 2, steps)
        assert all(torch.equal(value, exported(resumed)[name]) for name, value in exported(runs["fsdp2"]).items())
    alone = fit(start_ranks, tmp_path / "auto", "auto", 1, steps)
    assert logged(alone, "train/loss") == pytest.approx(logged(one, "train/loss")[2:], rel=1e-6)
    assert_same_weights(alone, one)

    strategy = "{class_path: flextok_pl.runtime.FullyShardedStrategy, init_args: {save_distributed_checkpoint: true}}"
    parts = fit(start_ranks, tmp_path / "sharded", strategy, 2, arguments)
    checkpoint = parts / "checkpoints" / "step0000002.ckpt"
    assert checkpoint.is_dir() and len(list(checkpoint.glob("*.distcp"))) == 2
    assert not list(checkpoint.parent.glob(".*")), "nothing unfinished stays"
    resumed = fit(start_ranks, tmp_path / "sharded", strategy, 2, [*arguments, "--ckpt_path", str(checkpoint)])
    assert all(torch.equal(value, exported(resumed)[name]) for name, value in exported(parts).items())


def test_processes_start_from_a_model_alike(
    image_shards: Path, tmp_path: Path, start_ranks: Any, keep_gradients: None
) -> None:
    """The average, too, which holds the first weights until step 2, and what is frozen; sharded training goes on."""
    arguments, file = prior_fit(image_shards, tmp_path), tmp_path / "given.safetensors"
    net = yaml.safe_load((tmp_path / "prior.yaml").read_text())["model"]["init_args"]["net"]
    torch.manual_seed(5)
    given = Prior(PriorConfig(**net))
    given.save_pretrained(file)
    arguments += [*UNCOUNTED, "--model.init_from", str(file), "--ema.update_starting_at_step", "2"]
    arguments += ["--model.train", "[token_embedding,start,positions,blocks,norm,head]"]
    runs = {}
    for name, processes in (("auto", 1), ("ddp", 2), ("fsdp2", 2)):
        (tmp_path / name).mkdir()
        runs[name] = fit(start_ranks, tmp_path / name, name, processes, arguments)
        assert_same_training(runs[name], runs["auto"])
        early = torch.load(runs[name] / "checkpoints" / "step0000002.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(early["prior.head.weight"], given.head.weight)
    for run in runs.values():
        assert torch.equal(exported(run)["class_embedding.weight"], given.class_embedding.weight)
        assert not torch.equal(exported(run)["head.weight"], given.head.weight)
    file.unlink()
    arguments += ["--ckpt_path", str(runs["fsdp2"] / "checkpoints" / "step0000002.ckpt")]
    resumed = fit(start_ranks, tmp_path / "fsdp2", "fsdp2", 2, arguments)
    assert all(torch.equal(value, exported(resumed)[name]) for name, value in exported(runs["fsdp2"]).items())


def note_weights(rank: int) -> None:
    """Let a process write down the types of the weights that it multiplies by, in training and evaluation."""
    real, seen = torch.nn.Linear.forward, set[tuple[str, str, bool]]()

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        now = (
            str(self.weight.dtype),
            str(self.bias.dtype) if self.bias is not None else "none",
            torch.is_grad_enabled(),
        )
        if now not in seen and not x.is_meta:  # as where operations are counted
            seen.add(now)
            Path(f"weights{rank}.json").write_text(json.dumps(sorted(seen)))
        return real(self, x)

    torch.nn.Linear.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("make", [tokenizer_fit, prior_fit], ids=["tokenizer", "prior"])
def test_half_precision_is_the_same_with_shards(
    make: Any, image_shards: Path, tmp_path: Path, start_ranks: Any, keep_gradients: None
) -> None:
    """Matrices are gathered in bfloat16, and in float32 to evaluate; gradients are as accurate as without shards."""
    for name in ("ddp", "fsdp2"):
        (tmp_path / name).mkdir()
    arguments = [*make(image_shards, tmp_path), "--trainer.precision", "bf16-mixed"]
    copied, sharded = (fit(start_ranks, tmp_path / n, n, 2, arguments, note_weights) for n in ("ddp", "fsdp2"))
    for own, expected in zip(gradients(tmp_path / "fsdp2")[:1], gradients(tmp_path / "ddp")[:1], strict=True):
        for tensor, value in expected.items():
            assert (own[tensor] - value).norm() <= 2e-6 * value.norm(), tensor
    assert logged(sharded, "train/loss")[0] == pytest.approx(logged(copied, "train/loss")[0], rel=1e-6)
    for tag in ("train/loss", "train/grad_norm"):  # a later step's numbers are rounded at other places
        assert logged(sharded, tag) == pytest.approx(logged(copied, tag), rel=1e-2)
    assert validated(sharded) == pytest.approx(validated(copied), rel=1e-3, abs=1e-3)
    types = json.loads((tmp_path / "fsdp2" / "weights0.json").read_text())
    training = {tuple(found) for *found, in_training in types if in_training}
    assert ("torch.bfloat16", "none") in training and {weight for weight, _ in training} == {"torch.bfloat16"}
    assert {bias for _, bias in training} <= {"none", "torch.float32"}
    assert {weight for weight, _, in_training in types if not in_training} == {"torch.float32"}


def test_ddp_sends_gradients_from_where_they_are(image_shards: Path, tmp_path: Path, start_ranks: Any) -> None:
    """The buckets hold them from the first optimizer step on, also in batches of an accumulation that send none."""

    def prepare(rank: int) -> None:
        def on_after_backward(module: pl.LightningModule) -> None:
            storages = [p.grad.untyped_storage() for p in module.parameters() if p.requires_grad]
            whole = {storage.data_ptr(): storage.nbytes() for storage in storages}
            with Path(f"held{rank}").open("a") as lines:
                lines.write(f"{module.global_step} {len(storages)} {len(whole)} {sum(whole.values())}\n")

        ResumableModule.on_after_backward = on_after_backward  # type: ignore[method-assign]

    run = fit(start_ranks, tmp_path, "ddp", 2, tokenizer_fit(image_shards, tmp_path), prepare)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    size = sum(each["exp_avg"].nbytes for each in state.values())
    held = [[int(part) for part in line.split()] for line in (tmp_path / "held0").read_text().splitlines()]
    assert {step for step, *_ in held} == {*range(STEPS)} and len(held) > STEPS, "an epoch may end within one"
    assert held[0][1] == len(state) and held[0][2] > 2, "before the first buckets they lie here and there"
    assert all(buckets <= 2 and total == size for _, _, buckets, total in held[1:]), held


def test_what_cannot_be_sharded_says_so(
    image_shards: Path, tmp_path: Path, start_ranks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["test", *tokenizer_fit(image_shards, tmp_path)[1:3], "--data.val", str(image_shards / "val")]
    arguments += ["--data.train", "null", "--tokenizer", str(DEMO_TOKENIZER), "--trainer.strategy", "fsdp2"]
    (process,) = start_ranks(tmp_path, 1, [*arguments, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    process.join(120)
    assert process.exitcode == 1
    message = capfd.readouterr().err
    assert "SavedTokenizer is neither" in message and "--trainer.strategy ddp" in message, message


def test_two_processes_stop_an_alignment_as_one(
    image_shards: Path, tmp_path: Path, start_ranks: Any, keep_gradients: None
) -> None:
    """DDP gets a gradient of every weight of the projection behind the stop, too: zero."""
    arguments, runs = [*aligned_fit(image_shards, tmp_path), *UNCOUNTED], {}
    for name, processes in (("auto", 1), ("ddp", 2), ("fsdp2", 2)):
        (tmp_path / name).mkdir()
        runs[name] = fit(start_ranks, tmp_path / name, name, processes, arguments)
    expected = gradients(tmp_path / "auto")
    assert [bool(step["projection.weight"].any()) for step in expected] == [True, True, False, False]
    for name in ("ddp", "fsdp2"):
        assert_same_training(runs[name], runs["auto"])
        for own, whole in zip(gradients(tmp_path / name), expected, strict=True):
            assert own.keys() == whole.keys()
            for tensor, value in whole.items():
                # Weights that already differ by rounding give gradients that differ by more.
                assert (own[tensor] - value).norm() <= 1e-4 * value.norm(), tensor
