"""VAEModule: its losses, its schedule, what it measures and what it exports."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA
from flextok_pl.config import VAEConfig
from flextok_pl.contracts import same_maker, weights_hash
from flextok_pl.models.discriminator import PatchDiscriminator
from flextok_pl.models.identity import latents_identity
from flextok_pl.models.vae import VAE
from flextok_pl.modules.optim import clip_gradients
from flextok_pl.modules.vae import VAEModule, kl_divergence, psnr

NET = VAEConfig(
    latent_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
)


def batches(count: int = 4, size: int = 3, side: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(size, 3, side, side, generator=generator) * 2 - 1,
            "key": [f"{i}-{j}" for j in range(size)],
        }
        for i in range(count)
    ]


def loader(data: list[dict[str, Any]]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def module(**options: Any) -> VAEModule:
    pl.seed_everything(0, verbose=False)
    return VAEModule(NET, **({"lr": 1e-3, "warmup_steps": 0} | options))


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu", "logger": False, "default_root_dir": folder, "max_steps": 4, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 1,
    }  # fmt: skip
    return pl.Trainer(**(defaults | options))


def test_kl_and_psnr_by_hand() -> None:
    moments = torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 4, 1, 1)
    expected = 0.5 * ((1 + 1 - 1 - 0) + (4 + torch.e - 1 - 1)) / 2
    assert kl_divergence(moments).item() == pytest.approx(expected)
    zeros = torch.zeros(2, 3, 2, 2)
    assert psnr(zeros, zeros + torch.tensor([2.0, 0.2]).view(2, 1, 1, 1)).tolist() == pytest.approx([0.0, 20.0])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"reconstruction", "kl"}),
        ({"perceptual_weight": 0.5}, {"reconstruction", "kl", "perceptual"}),
        ({"gan_weight": 0.5}, {"reconstruction", "kl", "generator", "adaptive_weight", "discriminator"}),
    ],
)
def test_each_term_is_optional_and_adds_up(options: dict[str, Any], names: set[str], tmp_path: Path) -> None:
    model = module(**options, kl_weight=0.1, discriminator_width=8)
    assert (model.perceptual is not None) == ("perceptual" in names)
    assert (model.discriminator is not None) == ("discriminator" in names)
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, loader(batches(2, side=32)))
    logged = {k.removeprefix("train/"): float(v) for k, v in run.callback_metrics.items() if k.startswith("train/")}
    assert set(logged) == names | {"loss", "psnr", "grad_norm", "lr"}
    total = logged["reconstruction"] + 0.1 * logged["kl"] + 0.5 * logged.get("perceptual", 0.0)
    total += 0.5 * logged.get("adaptive_weight", 0.0) * logged.get("generator", 0.0) + logged.get("discriminator", 0.0)
    assert logged["loss"] == pytest.approx(total, rel=1e-5)
    assert all("perceptual" not in name for name in model.state_dict())


def test_gradient_norm_and_learning_rate_are_those_of_the_logged_step(tmp_path: Path) -> None:
    """Also where gradients are accumulated over two batches."""
    norms: list[float] = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

    logger = CSVLogger(tmp_path, name="", version="run")
    options: dict[str, Any] = {"log_every_n_steps": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1e-3}
    trainer(tmp_path, logger=logger, callbacks=[Spy()], **options).fit(module(warmup_steps=3), loader(batches(8)))
    rows = [row for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()) if row["train/lr"]]
    assert [int(row["step"]) for row in rows] == [1, 3]
    assert [float(row["train/lr"]) for row in rows] == pytest.approx([0.5e-3, 1e-3])
    assert [float(row["train/grad_norm"]) for row in rows] == pytest.approx(norms[1::2], rel=1e-5)


def test_l2_and_no_kl(tmp_path: Path) -> None:
    model, data = module(reconstruction="l2", kl_weight=0.0), batches(1)
    model.trainer = trainer(tmp_path)
    torch.nn.init.constant_(model.vae.network.decoder.conv_out.weight, 0.0)
    torch.nn.init.constant_(model.vae.network.decoder.conv_out.bias, 0.5)
    model.log = model.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    loss = model.training_step(data[0], 0)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.detach(), (data[0]["image"] - 0.5).square().mean())


def test_players_get_their_own_gradients_and_clipping(tmp_path: Path) -> None:
    """The generator's loss leaves no gradient in the discriminator, nor the other way round."""
    model = module(gan_weight=1.0, discriminator_width=8)
    images = batches(1, side=32)[0]["image"]
    outputs = model(images)
    losses = model._adversarial(images, outputs, (outputs - images).abs().mean())
    losses["generator"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.discriminator.parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in model.discriminator.parameters())  # type: ignore[union-attr]
    model.zero_grad()
    losses["discriminator"].backward()
    assert all(p.grad is None for p in model.vae.parameters())
    for network, size in ((model.vae, 100.0), (model.discriminator, 0.01)):
        for parameter in network.parameters():  # type: ignore[union-attr]
            parameter.grad = torch.full_like(parameter, size)
    small = model.discriminator.layers[0].weight  # type: ignore[union-attr]
    for network in model.trained_networks():
        clip_gradients(network, 10.0, "norm")
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.vae.parameters()])  # type: ignore[misc]
    assert norm.item() == pytest.approx(10.0, rel=1e-4)
    assert small.grad is not None and small.grad.unique().item() == pytest.approx(0.01)


@pytest.mark.parametrize("width", [4, 36, 44, 64, 72])
def test_each_multiple_of_4_is_a_width_of_the_discriminator(width: int) -> None:
    with torch.device("meta"):
        assert PatchDiscriminator(width)(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 2, 2)


def test_gan_waits_for_its_start_step(tmp_path: Path) -> None:
    model = module(gan_weight=1.0, gan_start_step=2, discriminator_width=8)
    before = [p.detach().clone() for p in model.discriminator.parameters()]  # type: ignore[union-attr]
    run = trainer(tmp_path, max_steps=2, log_every_n_steps=0)
    run.fit(model, loader(batches(2, side=32)))
    assert "train/discriminator" not in run.callback_metrics
    assert all(map(torch.equal, before, model.discriminator.parameters()))  # type: ignore[union-attr]
    run = trainer(tmp_path, max_steps=3)
    model = module(gan_weight=1.0, gan_start_step=2, discriminator_width=8)
    run.fit(model, loader(batches(3, side=32)))
    assert not any(map(torch.equal, before, model.discriminator.parameters()))  # type: ignore[union-attr]


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    """Clipping, accumulation and schedule are the Trainer's; the posterior is sharp, so that its noise is nothing."""
    data, results = batches(4, size=2), []
    merged = [{"image": torch.cat([a["image"], b["image"]])} for a, b in zip(data[::2], data[1::2], strict=True)]
    for given, count in ((data, 2), (merged, 1)):
        model = module(reconstruction="l2", lr=1e-2)
        torch.nn.init.constant_(model.vae.network.quant_conv.weight[2:], 0.0)
        torch.nn.init.constant_(model.vae.network.quant_conv.bias[2:], -40.0)
        trainer(tmp_path, max_steps=2, accumulate_grad_batches=count, gradient_clip_val=0.1).fit(model, loader(given))
        results.append(model.vae.network.decoder.conv_in.weight.detach())
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_validation_metrics(tmp_path: Path) -> None:
    model, data = module(), [*batches(3), *batches(1, size=1)]
    run = trainer(tmp_path)
    (metrics,) = run.validate(model, loader(data), verbose=False)
    images = torch.cat([b["image"] for b in data])
    with torch.no_grad():
        error = (model(images).clamp(-1, 1) - images).square()
    assert metrics["val/mse"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert metrics["val/mse_over_variance"] == pytest.approx(
        (error.mean() / images.var(dim=0, correction=0).mean()).item(), rel=1e-5
    )
    expected = 10 * torch.log10(4 / error.flatten(1).mean(dim=1)).mean()
    assert metrics["val/psnr"] == pytest.approx(expected.item(), rel=1e-5)


def test_precisions(tmp_path: Path) -> None:
    """Evaluation computes in float32, training as the trainer says; a discriminator does not bear float16."""
    results = [
        trainer(tmp_path, precision=precision).validate(module(), loader(batches(1)), verbose=False)
        for precision in ("32-true", "bf16-mixed")
    ]
    assert results[0] == results[1]
    half, options = MixedPrecision("16-mixed", "cpu"), {"gan_weight": 1.0, "discriminator_width": 8}
    trainer(tmp_path, plugins=half).fit(module(), loader(batches()))
    with pytest.raises(ValueError, match=r"16-mixed.*gan_weight.*use bf16-mixed"):
        trainer(tmp_path, plugins=half).fit(module(**options), loader(batches(side=32)))
    with pytest.raises(ValueError, match="trainer.precision='bf16-true'"):
        trainer(tmp_path, precision="bf16-true").fit(module(), loader(batches()))


def test_export_holds_the_measured_scale(tmp_path: Path) -> None:
    model, data = module(scale_batches=3), batches(4)
    trainer(tmp_path).fit(model, loader(data))
    theirs = AutoencoderKL.from_pretrained(str(tmp_path / "vae"))
    images = torch.cat([b["image"] for b in data[:3]])
    with torch.no_grad():
        means = theirs.encode(images).latent_dist.mode()
    assert 1 / theirs.config.scaling_factor == pytest.approx(means.std(correction=0).item(), rel=1e-5)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.vae.network.state_dict().items())
    assert VAE.from_pretrained(tmp_path / "vae").config == model.vae.config


def test_averaged_weights_are_exported(tmp_path: Path) -> None:
    """Two steps with decay 0.5 from the first step's weights: the average of the two steps' weights."""
    seen: list[torch.Tensor] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(pl_module.vae.network.decoder.conv_out.weight.detach().clone())

    model = module(perceptual_weight=0.1, lr=1e-2)
    run = trainer(tmp_path, max_steps=2, callbacks=[EMA(decay=0.5), Spy()])
    run.fit(model, loader(batches(2, side=32)))
    exported = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_out.weight"]
    torch.testing.assert_close(exported, (seen[0] + seen[1]) / 2)
    assert not torch.equal(seen[0], seen[1])


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    data = batches()
    data[2]["image"][0] = float("nan")
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="good{step}")
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[checkpoint])
    with pytest.raises(RuntimeError, match=r"nan at step 2 .*2-0, 2-1, 2-2; .*goodstep=2\.ckpt"):
        run.fit(module(), loader(data))


def test_resume_repeats_nothing(tmp_path: Path) -> None:
    """Training that is resumed half way, after one of two epochs, ends with the weights of the uninterrupted one."""
    options: dict[str, Any] = {"perceptual_weight": 0.1, "gan_weight": 0.5, "discriminator_width": 8}
    data, ends = batches(2, side=32), []
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}", save_top_k=-1)
    for ckpt in (None, str(tmp_path / "step=2.ckpt")):
        model = module(**options)
        run = trainer(tmp_path, enable_checkpointing=True, callbacks=[checkpoint, EMA(decay=0.5)])
        run.fit(model, loader(data), ckpt_path=ckpt)
        assert run.global_step == 4
        ends.append(model.vae.state_dict())
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-6, rtol=1e-5)
    stored = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert not any("perceptual" in name for name in stored["state_dict"])
    assert VAEModule.load_from_checkpoint(tmp_path / "step=2.ckpt", perceptual_weight=0.0).vae.config == NET


def start(folder: Path, **changes: Any) -> VAE:
    """A finished autoencoder in a folder."""
    torch.manual_seed(9)
    vae = VAE(dataclasses.replace(NET, **changes)).rescaled(0.3)
    vae.save_pretrained(folder)
    return vae


def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    """Of the same architecture, whatever the scale of its latents, which is measured anew."""
    vae, model = start(tmp_path / "a"), module(init_from=str(tmp_path / "a"), lr=0.0)
    trainer(tmp_path).fit(model, loader(batches(1)))
    assert all(map(torch.equal, model.vae.state_dict().values(), vae.state_dict().values()))
    assert model.vae.config.scaling_factor not in (0.3, NET.scaling_factor)
    assert model.hparams["started_from"] == f"{tmp_path / 'a'} ({weights_hash(vae)})"
    start(tmp_path / "b", norm_num_groups=2)
    with pytest.raises(ValueError, match="norm_num_groups is 2 there and 4 here; set model.net.norm_num_groups=2"):
        trainer(tmp_path).fit(module(init_from=str(tmp_path / "b")), loader(batches(1)))
    with pytest.raises(ValueError, match="there is no autoencoder folder 'nowhere'"):
        trainer(tmp_path).fit(module(init_from="nowhere"), loader(batches(1)))


def test_the_decoder_alone_keeps_latents_and_their_scale(tmp_path: Path) -> None:
    vae, options = start(tmp_path), {"init_from": str(tmp_path), "train": ["decoder"], "gan_weight": 0.1}
    net = dataclasses.replace(NET, scaling_factor=0.3)
    model = VAEModule(net, **options, discriminator_width=8, lr=1e-2, warmup_steps=0)  # type: ignore[arg-type]
    trainer(tmp_path / "run").fit(model, loader(batches(side=32)))
    exported = VAE.from_pretrained(tmp_path / "run" / "vae")
    own, its = latents_identity(exported), latents_identity(vae)
    assert own["sha256"] == its["sha256"] and own["model_sha256"] != its["model_sha256"]
    assert exported.config.scaling_factor == 0.3 and same_maker(its["model_sha256"], its)
    assert torch.equal(exported.network.post_quant_conv.weight, vae.network.post_quant_conv.weight)
    with pytest.raises(ValueError, match="scaling_factor=0.88 of model.net, but 0.3 of init_from"):
        trainer(tmp_path).fit(module(**options), loader(batches(1)))
    with pytest.raises(ValueError, match="train decoder.conv_out, too, or set gan_weight to 0"):
        module(**options | {"train": ["encoder"]})


@pytest.mark.parametrize(
    "options",
    [
        {"net": VAEConfig(kind="pixel", latent_channels=12)},
        {"reconstruction": "l3"},
        {"gan_weight": -1.0},
        {"scale_batches": 0},
        {"perceptual_weight": 1.0, "perceptual_weights_path": "nowhere.pth"},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(options)[-1]}"):
        VAEModule(**({"net": NET} | options))


def test_batches_need_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['latent'\]; use image shards"):
        trainer(tmp_path).fit(module(), loader([{"latent": torch.zeros(1, 4, 4, 4)}]))
