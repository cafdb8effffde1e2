"""Distillation of a decoder: the objective against closed forms, and what a training of it does, keeps and refuses.

B batch, N steps of the student, M of the teacher.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from model_helpers import randomized
from torch import Tensor
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA
from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.flow.decoding import Decoding
from flextok_pl.keys import sample_generators
from flextok_pl.models.distillation import distillation_loss, training_law, window_losses
from flextok_pl.models.objective import TrainingDraws, draws_of_each
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import DistillationModule

NET = FlexTokConfig(
    vae=VAEConfig(kind="pixel", latent_channels=12, scaling_factor=1.0),
    latent_channels=12,
    encoder_width=32,
    encoder_depth=1,
    encoder_head_dim=16,
    decoder_width=32,
    decoder_depth=2,
    decoder_head_dim=16,
    num_registers=8,
    fsq_levels=(7, 5),
    grid_size=(4, 4),
    repa_layer=None,
    nested_dropout="pow2",
)
SLOPE = -0.7


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(x: Tensor, t: float) -> Tensor:
    """dx/dt = a x, whose Euler steps multiply x by 1 - a / M and whose solution is exponential."""
    return SLOPE * x


# The objective


@pytest.mark.parametrize("states", ["student", "teacher"])
@pytest.mark.parametrize(("num_steps", "teacher_steps"), [(1, 12), (2, 12), (4, 12), (3, 3)])
def test_the_target_is_the_closed_form(states: Any, num_steps: int, teacher_steps: int) -> None:
    noise, seen = drawn(2, 3, 4, 4, dtype=torch.float64), []
    factor = (1 - SLOPE / teacher_steps) ** (teacher_steps // num_steps)  # of a window

    def student(x: Tensor, t: float) -> Tensor:
        seen.append((x, t))
        return (1 - factor) * num_steps * x

    found = window_losses(student, linear, noise, num_steps, teacher_steps, states=states)
    assert found.loss.shape == (2, num_steps) and found.loss.max() < 1e-24
    assert [t for _, t in seen] == pytest.approx([i / num_steps for i in range(num_steps, 0, -1)])
    for i, (x, _) in enumerate(seen):
        torch.testing.assert_close(x, factor**i * noise)
    assert found.times.tolist() == pytest.approx([(i + 0.5) / num_steps for i in range(num_steps)])


@pytest.mark.parametrize(("solver", "error"), [("euler", 2e-3), ("heun", 1e-5)])
def test_a_fine_teacher_is_the_exact_solution(solver: str, error: float) -> None:
    factor, noise = math.exp(-SLOPE / 2), drawn(1, 1, 2, 2, dtype=torch.float64)
    found = window_losses(lambda x, t: 2 * (1 - factor) * x, linear, noise, 2, 600, solver)
    assert found.loss.max().sqrt() < error
    wrong = window_losses(lambda x, t: 2 * (1 - factor) * x + 1, linear, noise, 2, 600, solver, "teacher")
    torch.testing.assert_close(wrong.loss, torch.ones_like(wrong.loss), rtol=0, atol=3 * error)


def test_windows_begin_where_the_student_or_the_teacher_is() -> None:
    """A student that is off by 1 in velocity meets, half a window later, a state that is off by 1 / N."""
    noise, starts = torch.ones(1, 1, 1, 1), {"student": [], "teacher": []}
    for states, seen in starts.items():
        window_losses(
            lambda x, t, seen=seen: seen.append(float(x)) or 0 * x + 1, lambda x, t: 0 * x, noise, 4, 8, "euler", states
        )  # type: ignore[arg-type,func-returns-value]
    assert starts == {"student": [1, 0.75, 0.5, 0.25], "teacher": [1] * 4}


def test_wrong_windows() -> None:
    noise = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"num_steps=5 must divide the 12 steps.*\[1, 2, 3, 4, 6, 12\]"):
        window_losses(linear, linear, noise, 5, 12)
    with pytest.raises(ValueError, match="states='both'"):
        window_losses(linear, linear, noise, 4, 12, states="both")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tok() -> FlexTok:
    tok = randomized(NET)
    tok.encoder.requires_grad_(False)
    return tok


def draws_for(tok: FlexTok, latents: Tensor, keys: list[str]) -> TrainingDraws:
    return draws_of_each(training_law(tok.config, None), latents, sample_generators(keys, 0, "test"))


def test_a_teacher_with_as_many_steps_has_nothing_to_teach(tok: FlexTok) -> None:
    latents = drawn(6, 12, 8, 8)
    draws = draws_for(tok, latents, [*"abcdef"])
    assert not draws.null.any() and len(draws.num_tokens.unique()) > 1, "every image has its condition, and a budget"
    found = distillation_loss(tok, tok.decoder, latents, draws, Decoding(3, "none"), 3)
    assert found.loss.shape == (6, 3) and found.loss.max() < 1e-9
    coarse = distillation_loss(tok, tok.decoder, latents, draws, Decoding(12, "none"), 3)
    assert coarse.loss.min() > 1e-6


def test_guidance_is_built_in_and_gradients_go_to_the_student(tok: FlexTok) -> None:
    latents, student = drawn(3, 12, 8, 8), randomized(dataclasses.replace(NET))
    student.encoder.requires_grad_(False)
    draws = draws_for(tok, latents, ["a", "b", "c"])
    found = distillation_loss(student, tok.decoder, latents, draws, Decoding(1, "cfg", 3.0), 1)
    with torch.no_grad():
        tokens = student.quantizer.codes_to_tokens(student.quantizer(student.encode(latents)))
        null = torch.ones(3, dtype=torch.bool)
        with_tokens = tok.velocity(draws.noise, 1.0, tokens, draws.num_tokens)
        guided = 3 * with_tokens - 2 * tok.velocity(draws.noise, 1.0, tokens, null=null)
        own = student.velocity(draws.noise, 1.0, tokens, draws.num_tokens)
    torch.testing.assert_close(found.loss[:, 0].detach(), (own - guided).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-4)
    found.loss.mean().backward()
    trained = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert not [name for name, weight in tok.named_parameters() if weight.grad is not None]


def test_an_image_does_not_depend_on_its_batch(tok: FlexTok) -> None:
    latents, keys, decoding = drawn(5, 12, 8, 8), [*"abcde"], Decoding(4, "cfg", 2.0)
    with torch.no_grad():
        whole = distillation_loss(tok, tok.decoder, latents, draws_for(tok, latents, keys), decoding, 2).loss
        for part in ([2], [4, 1]):
            draws = draws_for(tok, latents[part], [keys[i] for i in part])
            alone = distillation_loss(tok, tok.decoder, latents[part], draws, decoding, 2).loss
            torch.testing.assert_close(alone, whole[part], rtol=1e-4, atol=1e-6)


# The training


class Pictures(torch.utils.data.Dataset):
    """One batch of 8 pictures of 16 px."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index:
            raise IndexError
        return {"image": drawn(8, 3, 16, 16).clamp(-1, 1), "key": [*"abcdefgh"]}


def loader() -> DataLoader:
    return DataLoader(Pictures(), batch_size=None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(randomized(NET).save_pretrained(tmp_path_factory.mktemp("teacher") / "tokenizer.safetensors"))


def module(teacher: str, **options: Any) -> DistillationModule:
    given = {"num_steps": 2, "teacher_steps": 4, "guidance": "cfg", "guidance_scale": 2.0, "warmup_steps": 0}
    return DistillationModule(teacher, **(given | options))


class Losses(pl.Callback):
    """Remembers the training losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def trainer(path: Path, max_steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=CSVLogger(path, name="", version="run", flush_logs_every_n_steps=1),
        callbacks=[*callbacks],
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )


def test_a_training_keeps_tokens_and_states_how_it_decodes(teacher: str, tmp_path: Path) -> None:
    network, losses, average = module(teacher, lr=3e-3), Losses(), EMA(decay=0.5)
    source = FlexTok.from_pretrained(teacher)
    run = trainer(tmp_path, 25, losses, average)
    run.fit(network, loader(), loader())
    assert sum(losses.values[-5:]) < 0.7 * sum(losses.values[:5])
    (optimizer,) = run.optimizers
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    decoder = [weight for weight in network.tokenizer.decoder.parameters() if weight.requires_grad]
    assert trained == {id(weight) for weight in decoder}
    assert average._weights is not None and all(name.startswith("tokenizer.decoder.") for name in average._weights)
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "train/grad_norm", "train/loss_t/0.75-1.00", "val/loss_t/0.25-0.50"} <= {*header}

    student = FlexTok.from_pretrained(tmp_path / "run" / "tokenizer.safetensors")
    assert (student.config.num_steps, student.config.guidance, student.config.guidance_scale) == (2, "none", 1.0)
    assert student.config.started_from.startswith(teacher) and "4 steps, cfg 2.0" in student.config.started_from
    for name, weight in source.encoder.state_dict().items():
        assert torch.equal(student.encoder.state_dict()[name], weight), name
    images = Pictures()[0]["image"]
    tokens = source.tokenize(images)
    assert torch.equal(student.tokenize(images), tokens)
    noise, path = drawn(8, 12, 8, 8), {"num_steps": 4, "guidance": "cfg", "guidance_scale": 2.0}
    wanted = source.sample_latents(tokens, noise=noise, **path)
    before = source.sample_latents(tokens, noise=noise, num_steps=2, guidance="none")
    after = student.sample_latents(tokens, noise=noise)
    assert torch.equal(after, student.sample_latents(tokens, None, 2, "none", noise=noise)), "the default of its file"
    assert (after - wanted).square().mean() < 0.5 * (before - wanted).square().mean()


def test_a_kill_and_another_teacher(teacher: str, tmp_path: Path) -> None:
    saved, whole, resumed = (
        ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1),
        Losses(),
        Losses(),
    )
    trainer(tmp_path / "a", 4, saved, whole, EMA(0.9)).fit(module(teacher), loader())
    file = tmp_path / "step=2.ckpt"
    trainer(tmp_path / "b", 4, resumed, EMA(0.9)).fit(module(teacher), loader(), ckpt_path=file)
    assert resumed.values == whole.values[2:]
    ends = [FlexTok.from_pretrained(tmp_path / name / "run").state_dict() for name in "ab"]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    other = FlexTok.from_pretrained(teacher)
    other.decoder.head.proj.bias.data += 1
    moved = str(other.save_pretrained(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="model.tokenizer was 'weights "):
        trainer(tmp_path / "c", 4).fit(module(moved), loader(), ckpt_path=file)
    with pytest.raises(ValueError, match="model.states was 'student'"):
        trainer(tmp_path / "d", 4).fit(module(teacher, states="teacher"), loader(), ckpt_path=file)


def test_a_student_may_teach(teacher: str, tmp_path: Path) -> None:
    """Of its own steps, without guidance."""
    tok = FlexTok.from_pretrained(teacher)
    tok.config = dataclasses.replace(tok.config, num_steps=4, guidance="none", guidance_scale=1.0)
    again = DistillationModule(str(tok.save_pretrained(tmp_path)), num_steps=2)
    assert again.decoding == Decoding(4, "none", 1.0) and again.tokenizer.config.num_steps == 2


def test_what_cannot_be_distilled(teacher: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_steps=3 must divide the 4 steps"):
        module(teacher, num_steps=3)
    with pytest.raises(ValueError, match="guidance='cgf' is unknown"):
        module(teacher, guidance="cgf")
    regressing = randomized(dataclasses.replace(NET, objective="mse")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="objective='mse' and decodes in one step already"):
        module(str(regressing))
