"""TokenizerModule: what a fit logs, stores, averages, exports and repeats. B batch, K registers."""

import dataclasses
import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA, CodebookReport, MetricsLog, ReconstructionFID
from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.models.objective import sample_draws
from flextok_pl.models.teacher import Teacher, resized_map
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.modules import TokenizerModule
from flextok_pl.modules.loss_buckets import LossBuckets
from flextok_pl.runtime import StepCheckpoint

NET = FlexTokConfig(
    vae=VAEConfig(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
    ),
    latent_channels=4,
    encoder_width=32,
    encoder_depth=1,
    encoder_head_dim=16,
    decoder_width=32,
    decoder_depth=2,
    decoder_head_dim=16,
    num_registers=8,
    grid_size=(4, 4),
    repa_layer=0,
    nested_dropout="pow2",
)
# Ten losses of `test_golden_losses`, on CPU in float32. A change of the maths changes them; a refactor does not.
GOLDEN_LOSSES = [1.03539, 1.100558, 1.083942, 0.992451, 1.004297, 0.982917, 0.971767, 0.914156, 0.934093, 0.937781]
# The same of six steps with an alignment.
GOLDEN_ALIGNED_LOSSES = [1.094208, 0.401121, 0.470939, 0.251159, 0.284855, 0.228857]


class Pictures(torch.utils.data.Dataset):
    """Batches of 8 random pictures of 16 px, the same in every epoch."""

    def __init__(self, batches: int, poison: int | None = None) -> None:
        self.batches, self.poison = batches, poison

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.batches:
            raise IndexError
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1
        if index == self.poison:
            images[3] = float("nan")
        return {"image": images, "key": [f"b{index}_{i}" for i in range(8)]}


def loader(batches: int = 5, poison: int | None = None) -> DataLoader:
    return DataLoader(Pictures(batches, poison), batch_size=None)


def vae_folder(path: Path) -> str:
    torch.manual_seed(7)
    VAE(NET.vae).save_pretrained(path / "vae")
    return str(path / "vae")


def module(path: Path, **options: Any) -> TokenizerModule:
    torch.manual_seed(0)
    return TokenizerModule(NET, vae=vae_folder(path), lr=3e-3, warmup_steps=2, **options)


def trainer(path: Path, max_steps: int = 10, callbacks: list[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=CSVLogger(path, name="", version="run", flush_logs_every_n_steps=1),
        callbacks=callbacks or [],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks or []),
        **options,
    )


class Losses(pl.Callback):
    """Remembers the training losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def fit(path: Path, network: TokenizerModule, max_steps: int = 10, **options: Any) -> list[float]:
    losses = Losses()
    trainer(path, max_steps, [losses, *options.pop("callbacks", [])], **options).fit(network, loader(), loader(1))
    return losses.values


def test_golden_losses(tmp_path: Path) -> None:
    assert fit(tmp_path, module(tmp_path)) == pytest.approx(GOLDEN_LOSSES, rel=1e-5)


def test_training_learns_and_logs(tmp_path: Path) -> None:
    network = module(tmp_path)
    losses = fit(tmp_path, network, 60)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    expected = {"train/loss", "train/grad_norm", "val/loss", "val/loss_other_tokens", "val/token_gap"}
    expected |= {f"val/loss_k/{k:03d}" for k in (1, 2, 4, 8)} & set(header) | {"train/loss_t/0.25-0.50"}
    assert expected <= set(header)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}])
def test_options_that_change_only_the_cost(tmp_path: Path, options: dict[str, Any]) -> None:
    assert fit(tmp_path / "a", module(tmp_path), 5) == pytest.approx(
        fit(tmp_path / "b", module(tmp_path, **options), 5), rel=1e-4
    )


def test_export_holds_the_averaged_weights_and_the_vae(tmp_path: Path) -> None:
    network, raw = module(tmp_path), module(tmp_path)
    fit(tmp_path, network, callbacks=[EMA(decay=0.9)])
    fit(tmp_path / "raw", raw)
    exported = FlexTok.from_pretrained(tmp_path / "run" / "tokenizer.safetensors")
    for name, weight in network.tokenizer.state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight), name
    assert not torch.equal(exported.decoder.head.proj.weight, raw.tokenizer.decoder.head.proj.weight)
    vae = VAE.from_pretrained(tmp_path / "vae")
    assert all(torch.equal(exported.vae.state_dict()[name], weight) for name, weight in vae.state_dict().items())
    images = Pictures(1)[0]["image"]
    assert torch.equal(exported.tokenize(images), network.reconstructor.tokenize(images))


def test_the_best_checkpoint_is_exported_too(tmp_path: Path) -> None:
    """Here the first of three, as it has the largest loss; frozen weights, which it lacks, are exported too."""
    network = module(tmp_path)
    best = StepCheckpoint(tmp_path / "kept", filename="best", monitor="val/loss", mode="max")
    fit(tmp_path, network, 3, callbacks=[EMA(decay=0.5), best], val_check_interval=1, check_val_every_n_epoch=None)
    stored = torch.load(tmp_path / "kept" / "best.ckpt", weights_only=True)
    assert stored["global_step"] == 1
    last, exported = (
        FlexTok.from_pretrained(tmp_path / "run" / f"tokenizer{name}.safetensors").state_dict()
        for name in ("", "_best")
    )
    assert exported.keys() == last.keys()
    for name, weight in exported.items():
        assert torch.equal(weight, stored["state_dict"].get(f"tokenizer.{name}", last[name])), name
    assert not torch.equal(exported["decoder.head.proj.weight"], last["decoder.head.proj.weight"])


def test_frozen_parts_are_neither_averaged_nor_stored(tmp_path: Path) -> None:
    network = module(tmp_path)
    averaging, checkpoint = EMA(decay=0.9), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    before = {name: value.clone() for name, value in network.tokenizer.vae.module.state_dict().items()}
    fit(tmp_path, network, callbacks=[averaging, checkpoint])
    assert all(torch.equal(before[name], value) for name, value in network.tokenizer.vae.module.state_dict().items())
    stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [name for state in ("state_dict", "current_model_state") for name in stored[state] if "vae" in name]


def test_a_validation_does_not_depend_on_the_batches(tmp_path: Path) -> None:
    """11 pictures in batches of 2 and of 5, in either order."""
    pictures = [*Pictures(2)[0]["image"], *Pictures(2)[1]["image"][:3]]
    samples = [{"image": image, "key": f"picture {i}"} for i, image in enumerate(pictures)]
    network, found = module(tmp_path), []
    for size, rows in ((2, samples), (5, samples), (5, samples[::-1])):
        found += trainer(tmp_path).validate(network, DataLoader(rows, batch_size=size), verbose=False)  # type: ignore[arg-type]
    assert found[0]["val/loss"] > 0 and {"val/token_gap", "val/loss_k/004"} <= found[0].keys()
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    without = DataLoader([{"image": pictures[0]}], batch_size=1)  # type: ignore[arg-type,var-annotated]
    with pytest.raises(ValueError, match="'key'"):
        trainer(tmp_path).validate(network, without, verbose=False)


def test_latents_of_the_vae_train_like_its_images(tmp_path: Path) -> None:
    network = module(tmp_path)
    batch = Pictures(1)[0]
    moments = network.tokenizer.vae.moments(batch["image"])
    torch.testing.assert_close(network.latents({"latent": moments}), network.latents(batch))
    with pytest.raises(ValueError, match="'image' or 'latent'"):
        network.latents({"key": batch["key"]})


class Measured(pl.LightningDataModule):
    """A validation set of one batch."""

    def num_samples(self, split: str) -> int:
        return 8

    def val_dataloader(self) -> DataLoader:
        return loader(1)


def test_what_is_measured_does_not_depend_on_the_trainers_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flextok_pl.evaluation.report.plot_budgets", lambda *args: None)  # slow
    found = []
    for precision in ("32-true", "bf16-mixed"):
        rfid = ReconstructionFID([1, 8], num_steps=1, cache_dir=None, output_dir=tmp_path / precision)
        codes = CodebookReport(output_dir=tmp_path / precision)
        run = trainer(tmp_path / precision, callbacks=[rfid, codes], precision=precision)
        (values,) = run.validate(module(tmp_path), Measured(), verbose=False)
        found.append((values, rfid.values, codes.values))
    assert found[0] == found[1] and "val/loss" in found[0][0] and "fd_effnet_lite0" in found[0][1][8]


def test_half_precision_trains_on_the_same_latents(tmp_path: Path) -> None:
    network, batch = module(tmp_path), Pictures(1)[0]
    latents = network.latents(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.latents(batch), latents)
    plain = fit(tmp_path / "a", network, 5)
    half = fit(tmp_path / "b", module(tmp_path), 5, precision="bf16-mixed")
    assert half != plain and half == pytest.approx(plain, rel=0.02)
    scaled = fit(tmp_path / "c", module(tmp_path), 5, plugins=MixedPrecision("16-mixed", "cpu"))
    assert scaled != plain and scaled == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_do_not_train(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.precision='{precision}'.* use "):
        fit(tmp_path, module(tmp_path), precision=precision)


def test_a_loss_that_is_not_finite_stops_the_fit(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the loss is nan at step 3.*b3_0"):
        trainer(tmp_path).fit(module(tmp_path), loader(poison=3))


def random_vit(path: Path) -> Path:
    import timm

    torch.manual_seed(3)
    file = path / "teacher.pth"
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), file)
    return file


def test_alignment_with_a_teacher(tmp_path: Path) -> None:
    """A random ViT from a local file stands for DINOv2; the projection learns, the teacher does not."""
    network = module(tmp_path, teacher="vit_tiny_patch16_224", teacher_weights=str(random_vit(tmp_path)))
    before = network.projection[0].weight.clone()
    trainer(tmp_path, 3).fit(network, loader(3))
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "train/repa" in header
    assert not torch.equal(before, network.projection[0].weight)
    assert network.teacher(Pictures(1)[0]["image"]).shape == (8, 192, 16, 16)
    exported = FlexTok.from_pretrained(tmp_path / "run" / "tokenizer.safetensors")
    assert exported.config == dataclasses.replace(NET, vae=network.tokenizer.config.vae)


def test_golden_losses_with_a_teacher(tmp_path: Path) -> None:
    weights = str(random_vit(tmp_path))
    losses = fit(tmp_path, module(tmp_path, teacher="vit_tiny_patch16_224", teacher_weights=weights), 6)
    assert losses == pytest.approx(GOLDEN_ALIGNED_LOSSES, rel=1e-5)


def test_stopped_alignment(tmp_path: Path) -> None:
    """Until the stop all is as without it; then the teacher does not run, and the loss is that of the velocity."""
    options = {"teacher": "vit_tiny_patch16_224", "teacher_weights": str(random_vit(tmp_path))}
    whole = fit(tmp_path / "whole", module(tmp_path, **options), 6)
    network, seen = module(tmp_path, repa_until=0.5, **options), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 0:
                pl_module.teacher.register_forward_hook(lambda *_: seen.append(trainer.global_step))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            moved = [bool(weight.grad.any()) for weight in pl_module.projection.parameters()]
            assert moved == [trainer.global_step < 3] * len(moved)

    losses = fit(tmp_path / "half", network, 6, callbacks=[Watch()])
    assert losses[:3] == whole[:3] and losses[3:] != whole[3:] and seen == [0, 1, 2]
    header, *rows = [line.split(",") for line in (tmp_path / "half/run/metrics.csv").read_text().splitlines()]
    velocity = [float(row[header.index("train/loss")]) for row in rows if row[header.index("train/loss")]]
    assert losses[3:] == velocity[3:] and losses[:3] != velocity[:3], "nothing is added to it, to the bit"
    with pytest.raises(ValueError, match=r"repa_until=0\.5.*trainer\.max_steps"):
        trainer(tmp_path / "endless", -1, max_epochs=-1).fit(module(tmp_path, repa_until=0.5, **options), loader())


def test_a_stop_and_a_kill(tmp_path: Path) -> None:
    """Losses of a training that goes on from before its stop, or from after it, are those of one that ran through."""
    options = {"teacher": "vit_tiny_patch16_224", "teacher_weights": str(random_vit(tmp_path)), "repa_until": 0.5}
    saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = Losses()  # of epochs of one batch, as Lightning's own loader cannot go on within an epoch
    trainer(tmp_path / "whole", 6, [saved, whole]).fit(module(tmp_path, **options), loader(1))
    for step in (2, 3, 4):
        found = Losses()
        file = tmp_path / f"step={step}.ckpt"
        trainer(tmp_path / f"{step}", 6, [found]).fit(module(tmp_path, **options), loader(1), ckpt_path=file)
        assert found.values == whole.values[step:]
    longer, found = module(tmp_path, **options | {"repa_until": 1.0}), Losses()  # may be another from a checkpoint on
    trainer(tmp_path / "other", 6, [found]).fit(longer, loader(1), ckpt_path=tmp_path / "step=4.ckpt")
    assert found.values[0] < whole.values[4] - 0.1, "aligned again"


@pytest.mark.parametrize("changed", [{"repa_projection": "conv"}, {"repa_spatial_norm": 0.6}])
def test_other_alignments_train(tmp_path: Path, changed: dict[str, Any]) -> None:
    options = {"teacher": "vit_tiny_patch16_224", "teacher_weights": str(random_vit(tmp_path))}
    network = module(tmp_path, **options, **changed, mup_base_width=16)
    losses = fit(tmp_path / "other", network, 10)
    plain = fit(tmp_path / "plain", module(tmp_path, **options, mup_base_width=16), 10)
    assert losses != plain and losses[0] == pytest.approx(plain[0], abs=0.2) and sum(losses[-3:]) < sum(losses[:3])
    assert (network.projection.weight.ndim == 4) if "repa_projection" in changed else len(network.projection) == 5


def test_options_of_an_alignment_without_a_teacher(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"repa_until.*no effect without model\.teacher"):
        module(tmp_path, repa_projection="conv")


def test_patches_on_a_route(tmp_path: Path) -> None:
    """A route changes training steps only, and a training that goes on draws the routes that it would have drawn."""
    options = {"route_share": 0.5, "route_blocks": (0, 0)}
    saved, whole = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1), Losses()
    trainer(tmp_path / "whole", 6, [saved, whole]).fit(module(tmp_path, **options), loader(1))
    resumed = Losses()
    file = tmp_path / "step=3.ckpt"
    trainer(tmp_path / "resumed", 6, [resumed]).fit(module(tmp_path, **options), loader(1), ckpt_path=file)
    assert resumed.values == whole.values[3:]
    plain = Losses()
    trainer(tmp_path / "plain", 6, [plain]).fit(module(tmp_path), loader(1))
    assert whole.values[0] == pytest.approx(plain.values[0], rel=0.1) and whole.values != plain.values
    found = [
        trainer(tmp_path / name).validate(module(tmp_path, **given), loader(1), verbose=False)[0]["val/loss"]
        for name, given in (("a", options), ("b", {}))
    ]
    assert found[0] == found[1]


class PrecomputedPictures(pl.LightningDataModule):
    """The pictures of `Pictures` as float32 latents and features, with what made them."""

    def __init__(self, vae: VAE, teacher: Teacher | None, grid: int, name: str = "vit_tiny_patch16_224") -> None:
        super().__init__()
        self.vae, self.network, self.grid = vae, teacher, (grid, grid)
        self.autoencoder = {"sha256": weights_hash(vae)}
        self.teacher = None if teacher is None else {"name": name, "sha256": weights_hash(teacher)}

    def train_dataloader(self) -> DataLoader:
        batches = []
        for batch in Pictures(3):
            precomputed = {"latent": self.vae.moments(batch["image"]).detach(), "key": batch["key"]}
            if self.network is not None:
                precomputed["teacher_features"] = resized_map(self.network(batch["image"]), self.grid)
            batches.append(precomputed)
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [16, 4])
def test_precomputed_features_train_like_the_teacher(tmp_path: Path, grid: int) -> None:
    """On the teacher's own grid and on the decoder's; the teacher is not loaded."""
    weights, losses = str(random_vit(tmp_path)), Losses()
    teacher = Teacher("vit_tiny_patch16_224", weights).eval()
    live = module(tmp_path, teacher="vit_tiny_patch16_224", teacher_weights=weights)
    data = PrecomputedPictures(live.tokenizer.vae.module, teacher, grid)
    network = module(tmp_path, teacher="vit_tiny_patch16_224", teacher_weights=weights)
    trainer(tmp_path / "stored", 5, [losses]).fit(network, datamodule=data)
    assert network.teacher is None
    expected = Losses()
    trainer(tmp_path / "live", 5, [expected]).fit(live, loader(3))
    assert losses.values == pytest.approx(expected.values, rel=1e-5)


def test_what_another_model_made_is_refused(tmp_path: Path) -> None:
    weights = str(random_vit(tmp_path))
    teacher = Teacher("vit_tiny_patch16_224", weights).eval()
    options = {"teacher": "vit_tiny_patch16_224", "teacher_weights": weights}
    vae = module(tmp_path).tokenizer.vae.module
    torch.manual_seed(8)
    other, retrained = VAE(NET.vae), Teacher("vit_tiny_patch16_224", weights).eval()
    retrained.network.network.norm.bias.data += 1
    for data, message in (
        (PrecomputedPictures(other, teacher, 4), r"latents of autoencoder.*flextok data latents"),
        (PrecomputedPictures(vae, retrained, 4), "features of the teacher.*model.teacher_weights"),
        (PrecomputedPictures(vae, teacher, 4, name="effnet-lite2"), "features of the teacher.*'vit_tiny"),
        (PrecomputedPictures(vae, teacher, 2), r"\(2, 2\), coarser than the decoder's.*--teacher_grid 4"),
        (PrecomputedPictures(vae, None, 4), r"needs images or its features.*\['key', 'latent'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, 5).fit(module(tmp_path, **options), datamodule=data)


def test_the_offline_teacher_sees_where_things_are(tmp_path: Path) -> None:
    images = -torch.ones(1, 3, 64, 64)
    marked = images.clone()
    marked[:, :, 40:60, 4:24] = 1.0
    (grid,) = (Teacher("effnet-lite2")(marked) - Teacher("effnet-lite2")(images)).norm(dim=1)  # (16, 16)
    assert grid[10:15, 1:6].mean() > 2 * grid[:8, 8:].mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pure_noise": 1.5}, "pure_noise=1.5"),
        ({"timestep_shift": 0.0}, "timestep_shift=0.0 must be a positive number"),
        ({"repa_until": 0.0}, "repa_until=0.0"),
        ({"repa_spatial_norm": 2.0}, "repa_spatial_norm=2.0"),
        ({"teacher": "effnet-lite2", "repa_projection": "linear"}, "repa_projection='linear'"),
        ({"route_share": 0.5}, "route_blocks=None"),
        ({"route_share": 0.5, "route_blocks": (0, 0), "teacher": "effnet-lite2"}, "net.repa_layer=0 on it"),
        ({"teacher": "no_such_model"}, "no_such_model"),
        ({"teacher": "effnet-lite2", "teacher_weights": "missing.pth"}, "missing.pth"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


def test_predictions_need_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"from images, but data.test gives \['key', 'latent'\]: use image shards"):
        module(tmp_path).predict_step({"key": ["a"], "latent": torch.zeros(1, 24, 4, 4)}, 0)


def test_a_log_of_metrics_without_a_data_module(tmp_path: Path) -> None:
    fit(tmp_path, module(tmp_path), 3, callbacks=[MetricsLog()])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "train/loss" in lines[-1]["metrics"] and "train/flops" not in lines[-1]["metrics"]


def test_wrong_autoencoders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="net.latent_channels=4"):
        TokenizerModule(dataclasses.replace(NET, vae=None, latent_channels=6), vae=vae_folder(tmp_path))
    with pytest.raises(ValueError, match="no autoencoder"):
        TokenizerModule(dataclasses.replace(NET, vae=None))
    with pytest.raises(ValueError, match="repa_layer"):
        TokenizerModule(dataclasses.replace(NET, repa_layer=None), teacher="effnet-lite2")


def test_loss_buckets() -> None:
    buckets = LossBuckets(8)
    latents = torch.zeros(4, 4, 8, 8)
    draws = sample_draws(NET, latents, torch.Generator().manual_seed(0))._replace(
        t=torch.tensor([0.1, 0.6, 0.7, 1.0]),
        num_tokens=torch.tensor([1, 3, 8, 8]),
        null=torch.tensor([False, False, False, True]),
    )
    buckets.update(torch.tensor([1.0, 2.0, 4.0, 8.0]), draws)
    assert buckets.compute_and_reset("x") == {
        "x/loss_t/0.00-0.25": 1,
        "x/loss_t/0.50-0.75": 3,
        "x/loss_t/0.75-1.00": 8,
        "x/loss_k/001": 1,
        "x/loss_k/004": 2,
        "x/loss_k/008": 4,
    }
    assert buckets.compute_and_reset("x") == {}


def test_compiled_blocks_are_compiled_for_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few variants serve all budgets and batches of a training; what evaluation runs adds none to them."""
    graphs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    class Sizes(Pictures):
        def __getitem__(self, index: int) -> dict[str, Any]:
            size = (8, 1, 3)[index % 3]
            return {name: value[:size] for name, value in super().__getitem__(index).items()}

    class Images(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            tok = pl_module.reconstructor
            for size, budget in ((2, 1), (2, 8), (1, 3), (1, 8)):
                tokens = tok.tokenize(Pictures(1)[0]["image"][:size])
                tok.detokenize(tokens, num_tokens=budget, num_steps=1, guidance="cfg", guidance_scale=2.0)

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    torch.compiler.reset()
    network = module(tmp_path, compile_blocks=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        trainer(tmp_path, 5, [Images()]).fit(network, loader(5), DataLoader(Sizes(3), batch_size=None))
    assert all(graphs) and len(graphs) <= 2 + 2, "of the encoder's last block, and of all and the last of the decoder"
    torch.compiler.reset()
