"""What differs on a GPU: half precision, compiled blocks, other attention kernels."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from flextok_pl import Trainer
from flextok_pl.assets import DEMO_PRIOR, DEMO_TOKENIZER
from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.callbacks import EMA, Throughput
from flextok_pl.cli import main
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.evaluation.reconstruction_statistics import ReconstructionStatistics
from flextok_pl.layers.blocks import compile_for_all_lengths
from flextok_pl.models.objective import TrainingDraws, flow_loss, sample_draws
from flextok_pl.models.prior import Prior
from flextok_pl.models.routing import Routing, sample_route
from flextok_pl.models.sampling import Sampling
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import PriorModule, TokenizerModule, VAEModule

pytestmark = pytest.mark.gpu

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def losses(run: Path) -> list[float]:
    """`val/loss` in the order of the validations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars("val/loss")]


def fit(folder: Path, experiment: str, shards: Path, *options: str) -> list[float]:
    settings = {
        "trainer": {
            "default_root_dir": str(folder),
            "max_steps": 30,
            "val_check_interval": 15,
            "check_val_every_n_epoch": None,
            "accelerator": "gpu",
            "logger": {"init_args": {"save_dir": str(folder)}},
        },
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch_size": 8, "eval_batch_size": 8},
    }
    folder.mkdir()
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(EXPERIMENTS / f"{experiment}.yaml"), "--config", str(file), *options])
    return losses(next(folder.glob("**/version_0")))


@pytest.mark.parametrize("experiment", ["tokenizer/tiny", "prior/tiny"])
def test_half_precision_and_compilation_change_little(experiment: str, image_shards: Path, tmp_path: Path) -> None:
    off = ["--rfid=null"] if experiment == "tokenizer/tiny" else ["--gfid=null", f"--model.tokenizer={DEMO_TOKENIZER}"]
    plain = fit(tmp_path / "plain", experiment, image_shards, *off)
    fast = ["--trainer.precision=bf16-mixed", "--model.compile_blocks=true", "--model.activation_checkpointing=true"]
    assert len(plain) == 2 and plain[1] < plain[0]
    for number, options in enumerate((fast[:1], fast[1:2], fast)):
        found = fit(tmp_path / str(number), experiment, image_shards, *off, *options)
        assert found == pytest.approx(plain, rel=0.02), options


def test_evaluation_equals_that_of_a_cpu(image_shards: Path, tmp_path: Path) -> None:
    tables = []
    for accelerator in ("cpu", "gpu"):
        folder = tmp_path / accelerator
        config = ["--config", str(EXPERIMENTS / "tokenizer" / "demo.yaml"), "--tokenizer", str(DEMO_TOKENIZER)]
        data = [f"--data.val={image_shards / 'val'}", "--data.image_size=64", "--data.num_workers=0"]
        small = ["--rfid.num_steps=4", "--rfid.budgets=[1,8,64]", f"--trainer.accelerator={accelerator}"]
        main(["test", *config, *data, *small, f"--trainer.logger.init_args.save_dir={folder}"])
        tables.append(json.loads(next(folder.glob("**/rfid.json")).read_text()))
    for on_cpu, on_gpu in zip(*tables, strict=True):
        assert on_gpu["value"] == pytest.approx(on_cpu["value"], rel=1e-3, abs=1e-4), on_cpu["metric"]


def test_measuring_reconstructions_does_not_wait() -> None:
    extractor = build_extractor("effnet-lite0").to("cuda")
    statistics = ReconstructionStatistics([1, 2], extractor, pool_fraction=0.5)
    pictures = torch.randint(256, (2, 9, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    originals, made = pictures.to("cuda")
    keys = [str(i) for i in range(9)]
    statistics.update_real(originals, keys)
    try:
        for mode in ("default", "error"):  # libraries wait when they are first used
            torch.cuda.set_sync_debug_mode(mode)
            of_mode = [f"{mode} {key}" for key in keys]
            for budget in (1, 2):
                statistics.update_reconstructions(budget, originals, made, of_mode, [originals])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert statistics.home.type == "cuda" and statistics.num_images == 18
    on_cpu = ReconstructionStatistics([1], build_extractor("effnet-lite0"))
    on_cpu.update_real(*pictures[:1], keys)
    on_cpu.update_reconstructions(1, *pictures, keys)
    on_gpu = ReconstructionStatistics([1], extractor)
    on_gpu.update_real(originals, keys)
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert on_gpu.home.type == "cuda"
    assert on_gpu.values()[1] == pytest.approx(on_cpu.values()[1], rel=1e-6)


def test_tokens_and_pictures_equal_those_of_a_cpu(image_shards: Path) -> None:
    """On a GPU under autocast, and with TF32 in convolutions as PyTorch has it."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for device in ("cpu", "cuda"):
        tok = FlexTok.from_pretrained(DEMO_TOKENIZER, device=device)
        prior = Prior.from_pretrained(DEMO_PRIOR, device=device)
        with torch.autocast("cuda", torch.bfloat16):
            tokens = tok.tokenize(images.to(device))
            classes = torch.arange(4, device=device)
            drawn = prior.generate(classes, 16, cfg_scale=1.5, generator=torch.Generator().manual_seed(0))
            given = made[0][0].to(device) if made else tokens
            pictures = tok.detokenize(given, num_tokens=8, num_steps=4, generator=torch.Generator().manual_seed(0))
        made.append((tokens.cpu(), drawn.cpu(), pictures.cpu()))
    for cpu, gpu in zip(made[0][:2], made[1][:2], strict=True):
        assert (cpu == gpu).float().mean() > 0.98  # a code at a rounding boundary may fall to its other side
    torch.testing.assert_close(made[0][2], made[1][2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("routing", [None, Routing(0.5, 0, 0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_keeps_the_merged_register(compiled: bool, routing: Routing | None) -> None:
    """Loss and gradients of published blocks under autocast, beside those in float32."""
    config = replace(FlexTokConfig.preset("d12_d12"), vae=None, encoder_depth=2, decoder_depth=2)
    torch.manual_seed(0)
    tokenizer = FlexTok(config).cuda()
    for parameter in tokenizer.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    latents = torch.randn(8, config.latent_channels, *tokenizer.latent_size, device="cuda")
    generator = torch.Generator().manual_seed(0)
    draws: TrainingDraws = sample_draws(config, latents, generator)
    route = sample_route(routing, config, latents, generator)

    def step() -> tuple[float, dict[str, Tensor]]:
        tokenizer.zero_grad()
        loss = flow_loss(tokenizer, latents, draws, route=route).loss.mean()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in tokenizer.named_parameters() if p.grad is not None}

    loss, gradients = step()
    if compiled:
        for part in (tokenizer.encoder, tokenizer.decoder):
            compile_for_all_lengths(part.blocks)
    with torch.autocast("cuda", torch.bfloat16):
        half_loss, half = step()
    assert half_loss == pytest.approx(loss, rel=2e-3)
    for name, gradient in gradients.items():
        if name.startswith("decoder"):  # a rounded code is another code: the encoder's gradients differ by more
            assert (half[name] - gradient).norm() < 0.05 * gradient.norm(), name


def generated(prior: Prior, num_tokens: int) -> Tensor:
    classes = torch.arange(4, device=prior.device)
    options = {"cfg_scale": [1.0, 3.0], "top_p": 0.95, "generator": torch.Generator().manual_seed(0)}
    return prior.generate(classes, num_tokens, **options)


def test_generation_replays_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens than a capture is worth are drawn one by one, and so is what is compared with."""
    prior, replays = Prior.from_pretrained(DEMO_PRIOR, device="cuda"), []

    class Counted(torch.cuda.CUDAGraph):
        def replay(self) -> None:
            replays.append(1)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    few = generated(prior, 8)
    assert not replays
    tokens = generated(prior, prior.num_tokens)
    assert len(replays) == prior.num_tokens - 2, "the first position and the step before the capture are not replayed"
    assert (tokens[:, :8] == few).float().mean() > 0.98
    monkeypatch.setattr("flextok_pl.models.prior.can_capture", lambda model: False)
    assert (tokens == generated(prior, prior.num_tokens)).float().mean() > 0.9  # a token that differs changes the rest
    assert len(replays) == prior.num_tokens - 2


def test_branches_replay_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each extension of a state captures a graph of its own, and adds up log-probabilities within it."""
    prior = Prior.from_pretrained(DEMO_PRIOR, device="cuda")
    uniform = torch.rand(4, prior.num_tokens, generator=torch.Generator().manual_seed(0)).cuda()

    def drawn() -> tuple[Tensor, Tensor]:
        log_probs = torch.zeros(4, dtype=torch.float64, device="cuda")
        state = prior.begin(torch.tensor([1]), cfg_scale=2.0, num_tokens=2)
        rows = torch.zeros(4, dtype=torch.int64, device="cuda")
        state = state.branch(rows, state.logits().topk(4).indices[0], 25)
        state.extend(24, uniform, Sampling(0.8), log_probs)
        state = state.branch(torch.arange(4, device="cuda"), state.logits().argmax(-1), prior.num_tokens)
        state.extend(prior.num_tokens - 26, uniform, Sampling(0.8), log_probs)
        return state.tokens, log_probs

    tokens, log_probs = drawn()
    monkeypatch.setattr("flextok_pl.models.prior.can_capture", lambda model: False)
    expected, expected_log_probs = drawn()
    same = (tokens == expected).all(1)
    assert (tokens == expected).float().mean() > 0.9  # a token that differs changes the rest
    torch.testing.assert_close(log_probs[same], expected_log_probs[same], rtol=0, atol=1e-3)


@pytest.mark.parametrize("captured", [False, True])
def test_the_host_waits_for_no_token(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, waits = Prior.from_pretrained(DEMO_PRIOR, device="cuda"), []
    if not captured:
        monkeypatch.setattr("flextok_pl.models.prior.can_capture", lambda model: False)
    for num_tokens in (20, 40):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            generated(prior, num_tokens)
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
    assert 0 < waits[0] == waits[1], "those before the first token and after the last"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_priors_loss(dtype: torch.dtype, compiled: bool) -> None:
    """Loss and gradients in half precision, with a large scale, beside those in float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1300, 128, device="cuda", generator=generator, requires_grad=True)
    weight = (0.02 * torch.randn(64000, 128, device="cuda", generator=generator)).requires_grad_()
    targets = torch.randint(32000, (1300,), device="cuda", generator=generator)
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, label_smoothing=0.1)
    expected = torch.autograd.grad(65536 * plain, (hidden, weight))
    with torch.autocast("cuda", dtype):
        result = token_loss(hidden, weight, targets, 0.1, compiled=compiled)
    gradients = torch.autograd.grad(65536 * result.loss, (hidden, weight))
    torch.testing.assert_close(result.loss, plain, rtol=1e-3, atol=0)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_priors_tokenizer_is_on_the_gpu_while_it_is_needed() -> None:
    config = Prior.from_pretrained(DEMO_PRIOR).config
    module = PriorModule(replace(config, tokenizer=None), tokenizer=str(DEMO_TOKENIZER)).to("cuda")
    assert module.prior.device.type == "cuda" and module.tokenizer.module.device.type == "cpu"
    tokens = module.generate_tokens(torch.zeros(1, dtype=torch.int64))
    assert module.reconstructor.detokenize(tokens, num_steps=1).device.type == "cuda"
    module.teardown("validate")
    assert module.tokenizer.module.device.type == "cpu"


class Batches(pl.LightningDataModule):
    """Batches of four samples in page-locked memory, with everything that a module may want."""

    batch_size = 4
    tokenizer: ClassVar = {"sha256": "a" * 16, "vocab_size": 50, "num_tokens": 8}
    classes = ()

    def train_dataloader(self) -> DataLoader:
        random = torch.Generator().manual_seed(0)
        batch: Any = {
            "image": (torch.rand(4, 3, 32, 32, generator=random) * 2 - 1).pin_memory(),
            "tokens": torch.randint(50, (4, 8), generator=random).pin_memory(),
            "label": torch.tensor([0, 1, 0, 1]).pin_memory(),
            "key": list("abcd"),
        }
        return DataLoader([batch] * 12, batch_size=None)


class NothingWaits(pl.Callback):
    """Makes it an error to wait, from the start of a step that is not logged to that of the next."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step in self.steps else "default")


@pytest.fixture
def waiting_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def small_prior() -> PriorModule:
    net = PriorConfig(num_classes=2, num_tokens=8, vocab_size=50, depth=2, width=64, head_dim=32)
    return PriorModule(net, warmup_steps=0)


def small_vae() -> VAEModule:
    net = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    return VAEModule(net, warmup_steps=0, gan_weight=0.5, discriminator_width=8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "make",
    [small_prior, small_vae, lambda: TokenizerModule(FlexTokConfig.preset("tiny"), warmup_steps=0)],
    ids=["prior", "vae", "tokenizer"],
)
def test_no_step_waits(
    make: Callable[[], pl.LightningModule],
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waiting_allowed_again: None,
) -> None:
    """See tests/unit/test_no_waiting.py; here the device itself finds what waits, also in the optimizer's step."""
    module = make()
    if isinstance(module, VAEModule) and precision == "16-mixed":
        pytest.skip("no precision for a discriminator")
    monkeypatch.setattr(type(module), "on_train_end", lambda self: None)
    Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_steps=9,
        log_every_n_steps=3,
        gradient_clip_val=1.0,
        callbacks=[NothingWaits({3, 4, 6, 7}), EMA(), Throughput()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(module, Batches())


def test_a_step_that_waits_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting_allowed_again: None
) -> None:
    real = PriorModule.training_step

    def training_step(self: PriorModule, batch: Any, batch_idx: int) -> Any:
        outputs = real(self, batch, batch_idx)
        outputs["loss"].item()
        return outputs

    monkeypatch.setattr(PriorModule, "training_step", training_step)
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=3,
        callbacks=[NothingWaits({2})],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        trainer.fit(small_prior(), Batches())
