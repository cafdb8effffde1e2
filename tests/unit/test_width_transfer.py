"""Width transfer: what each parameter is, starts with and learns at, and that activations do not see the width."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.layers.packing import Positions
from flextok_pl.models.irepa import ConvProjection
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.prior import Prior
from flextok_pl.models.teacher import ProjectionHead
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import PriorModule, TokenizerModule
from flextok_pl.modules.optim import parameter_groups
from flextok_pl.modules.width_transfer import (
    WidthPart,
    default_std,
    part_weights,
    rescale_initial_weights,
    width_groups,
)

TOKENIZER = dataclasses.replace(FlexTokConfig.preset("tiny"), encoder_head_dim=16, decoder_head_dim=16)
PRIOR = PriorConfig(num_classes=4, vocab_size=30, num_tokens=16, depth=2, width=64, head_dim=16, qk_norm=True)
ATTENTION = {f"attn.{name}.weight": "hidden" for name in ("wq", "wk", "wv", "proj")}
MLP = {f"mlp.{name}.weight": "hidden" for name in ("fc1", "fc2", "fc3")}


def tokenizer(width: int = 64, decoder_width: int | None = None, **options: Any) -> TokenizerModule:
    torch.manual_seed(0)
    net = dataclasses.replace(TOKENIZER, encoder_width=width, decoder_width=decoder_width or width)
    return TokenizerModule(net, **options)


def prior(width: int = 64, net: PriorConfig = PRIOR, **options: Any) -> PriorModule:
    torch.manual_seed(0)
    return PriorModule(dataclasses.replace(net, width=width), **options)


def roles(part: WidthPart) -> dict[str, str]:
    return {weight.name: weight.role for weight in part_weights(part)}


def in_blocks(block: dict[str, str], count: int = 2) -> dict[str, str]:
    return {f"blocks.{i}.{name}": role for i in range(count) for name, role in block.items()}


def test_roles_in_the_tokenizer() -> None:
    encoder, decoder = tokenizer(mup_base_width=32).width_parts()
    assert roles(encoder) == {
        "registers": "vector",
        "patch_embed.weight": "input",
        "patch_embed.bias": "vector",
        **in_blocks(ATTENTION | MLP),
        "head.weight": "output",
        "head.bias": "fixed",
    }
    modulation = {"adaLN_modulation.1.weight": "hidden", "adaLN_modulation.1.bias": "vector"}
    assert roles(decoder) == {
        **{name: "vector" for name in ("register_posemb", "mask_token", "null_token")},
        **{f"{name}.weight": "input" for name in ("code_embed", "patch_embed", "time_embed.mlp.0")},
        "time_embed.mlp.2.weight": "hidden",
        **{f"{name}.bias": "vector" for name in ("code_embed", "patch_embed", "time_embed.mlp.0", "time_embed.mlp.2")},
        **in_blocks(ATTENTION | MLP | modulation),
        **{f"head.{name}": role for name, role in modulation.items()},
        "head.proj.weight": "output",
        "head.proj.bias": "fixed",
    }


def test_roles_in_the_prior() -> None:
    block = {
        **{f"{name}_norm.weight": "vector" for name in ("attn", "mlp")},
        **{f"attn.{name}.weight": "hidden" for name in ("wqkv", "proj")},
        **{f"attn.{name}_norm.weight": "fixed" for name in ("q", "k")},
        **MLP,
    }
    common = {
        **{name: "vector" for name in ("start", "positions", "token_embedding.weight", "norm.weight")},
        "head.weight": "output",
    }
    (part,) = prior(mup_base_width=32).width_parts()
    assert roles(part) == {**common, "class_embedding.weight": "vector", **in_blocks(block)}
    text = dataclasses.replace(PRIOR, num_classes=0, text_width=12)
    with torch.device("meta"):
        part = WidthPart(Prior(text), Prior(dataclasses.replace(text, width=32)), 0.5, default_std)
    cross = {"cross_norm.weight": "vector", **{f"cross.{name}.weight": "hidden" for name in ("wq", "wkv", "proj")}}
    projection = {
        "text_projection.0.weight": "input",
        "text_projection.2.weight": "hidden",
        **{f"text_projection.{i}.bias": "vector" for i in (0, 2)},
    }
    assert roles(part) == {**common, **projection, **in_blocks(block | cross)}


def test_roles_in_the_projection_to_a_teacher() -> None:
    part = WidthPart(ProjectionHead(64, 8, hidden=24), ProjectionHead(32, 8, hidden=24), 0.5, default_std)
    first = part.network[0].weight.clone()
    found = roles(part)
    assert found.pop("0.weight") == "output"
    assert set(found.values()) == {"fixed"}
    rescale_initial_weights(part)
    torch.testing.assert_close(part.network[0].weight, first * 0.5**0.5)


def test_roles_in_a_convolution_to_a_teacher() -> None:
    part = WidthPart(ConvProjection(64, 8), ConvProjection(32, 8), 0.5, default_std)
    first = part.network.weight.clone()
    assert roles(part) == {"weight": "output", "bias": "fixed"}
    rescale_initial_weights(part)
    torch.testing.assert_close(part.network.weight, first * 0.5**0.5)


def test_what_has_no_rule_is_refused() -> None:
    class Table(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(width, width))

    with pytest.raises(ValueError, match="table has shape .4, 4., and .2, 2..*mup_base_width"):
        roles(WidthPart(Table(4), Table(2), 0.5, default_std))


def test_without_the_option_nothing_changes() -> None:
    for module, plain in ((tokenizer(), FlexTok), (prior(), Prior)):
        assert module.width_parts() == []
        torch.manual_seed(0)
        network = module.tokenizer if isinstance(module, TokenizerModule) else module.prior
        weights = plain(network.config).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
        groups = width_groups(module, 0.05, 1e-3, module.width_parts())
        for ours, theirs in zip(groups, parameter_groups(module, 0.05), strict=True):
            assert ours.keys() == theirs.keys() == {"params", "weight_decay"}
            assert list(map(id, ours["params"])) == list(map(id, theirs["params"]))


def test_the_base_width_itself_is_standard() -> None:
    for build in (tokenizer, prior):
        standard, module = build(), build(mup_base_width=64)
        assert all(torch.equal(a, b) for a, b in zip(standard.parameters(), module.parameters(), strict=True))
        groups = width_groups(module, 0.05, 1e-3, module.width_parts())
        assert [{key: g[key] for key in g if key != "params"} for g in groups] == [
            {"name": "fixed", "lr": 1e-3, "weight_decay": 0.05, "eps": 1e-8},
            {"name": "fixed_no_decay", "lr": 1e-3, "weight_decay": 0.0, "eps": 1e-8},
        ]
        for ours, theirs in zip(groups, parameter_groups(module, 0.05), strict=True):
            assert list(map(id, ours["params"])) == list(map(id, theirs["params"]))


def test_groups_of_two_widths() -> None:
    module = tokenizer(64, 128, mup_base_width=32)
    groups = {g["name"]: g for g in width_groups(module, 0.05, 1e-3, module.width_parts())}
    assert {name: (g["lr"], g["weight_decay"], g["eps"]) for name, g in groups.items()} == {
        "input_x0.5": (1e-3, 0.05, 5e-9),
        "input_x0.25": (1e-3, 0.05, 2.5e-9),
        "hidden_x0.5": (5e-4, 0.1, 5e-9),
        "hidden_x0.25": (2.5e-4, 0.2, 2.5e-9),
        "output_x0.5": (5e-4, 0.1, 1e-8),
        "output_x0.25": (2.5e-4, 0.2, 1e-8),
        "vector_x0.5_no_decay": (1e-3, 0.0, 5e-9),
        "vector_x0.25_no_decay": (1e-3, 0.0, 2.5e-9),
        "fixed_no_decay": (1e-3, 0.0, 1e-8),
    }
    names = {parameter: name for name, parameter in module.named_parameters()}
    members = {name: {names[parameter] for parameter in g["params"]} for name, g in groups.items()}
    assert members["output_x0.5"] == {"tokenizer.encoder.head.weight"}
    assert members["output_x0.25"] == {"tokenizer.decoder.head.proj.weight"}
    assert all(name.startswith("tokenizer.decoder.") for name in members["hidden_x0.25"])
    assert sum(map(len, members.values())) == sum(p.requires_grad for p in module.parameters())
    assert len(width_groups(module, 0.0, 1e-3, module.width_parts())) == len(groups)


def test_initial_deviations() -> None:
    narrow, wide = tokenizer(64), tokenizer(1024, mup_base_width=64)
    expected = {"patch_embed.weight": 1.0, "head.weight": 1 / 16, "blocks.0.attn.wq.weight": 1 / 4, "registers": 1.0}
    for name, ratio in expected.items():
        there, here = (module.tokenizer.encoder.get_parameter(name).std().item() for module in (narrow, wide))
        assert here / there == pytest.approx(ratio, rel=0.1), name
    assert not wide.tokenizer.decoder.head.proj.weight.any()
    narrow, wide = prior(64), prior(1024, mup_base_width=64)
    expected = {"token_embedding.weight": 1.0, "head.weight": 1 / 16, "blocks.0.mlp.fc2.weight": 1 / 4}
    for name, ratio in expected.items():
        there, here = (module.prior.get_parameter(name).std().item() for module in (narrow, wide))
        assert here / there == pytest.approx(ratio, rel=0.1), name
    assert torch.equal(wide.prior.norm.weight, torch.ones(1024))


@pytest.mark.parametrize("build", [tokenizer, prior])
@pytest.mark.parametrize("value", [0, -16, 24])
def test_base_widths_are_checked(build: Callable[..., Any], value: int) -> None:
    with pytest.raises(ValueError, match=f"mup_base_width={value} must be a positive multiple of 16: .* or null"):
        build(mup_base_width=value)


class Sequences(pl.LightningDataModule):
    """Four sequences that count up, as token shards give them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = {"sha256": "a" * 16, "vocab_size": 30, "num_tokens": 16}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        tokens = (torch.arange(4)[:, None] * 7 + torch.arange(16)) % 30
        batch = {"tokens": tokens, "label": torch.arange(4), "key": list("abcd")}
        return torch.utils.data.DataLoader([batch] * 4, batch_size=None)


def test_a_fit_schedules_and_logs_each_group_and_is_loaded_again(tmp_path: Path) -> None:
    module = prior(64, mup_base_width=16, lr=1e-3, warmup_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=CSVLogger(tmp_path),
        callbacks=[LearningRateMonitor("step")],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Sequences())
    metrics = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()
    columns = metrics[0].split(",")
    rates = {
        name: [float(row.split(",")[columns.index(name)]) for row in metrics[1:] if row.split(",")[columns.index(name)]]
        for name in columns
        if name.startswith("lr-AdamW/")
    }
    names = {"hidden_x0.25", "output_x0.25", "vector_x0.25_no_decay", "fixed_no_decay"}
    assert set(rates) == {f"lr-AdamW/{name}" for name in names}
    assert rates["lr-AdamW/vector_x0.25_no_decay"][:2] == pytest.approx([5e-4, 1e-3])
    assert rates["lr-AdamW/hidden_x0.25"][:2] == pytest.approx([1.25e-4, 2.5e-4])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = PriorModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams["mup_base_width"] == 16
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))


def tokenizer_step(module: TokenizerModule, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(8, 12, 8, 8, generator=generator)
    draws = sample_draws(module.tokenizer.config, latents, generator)
    draws = draws._replace(num_tokens=torch.full((8,), module.tokenizer.num_registers), null=draws.null & False)
    return flow_loss(module.tokenizer, latents, draws).loss.mean()


def prior_step(module: PriorModule, seed: int) -> Tensor:
    tokens = torch.randint(30, (8, 16), generator=torch.Generator().manual_seed(seed))
    return token_loss(module.prior.hidden(tokens, torch.arange(8) % 4), module.prior.head.weight, tokens).loss


def joined(output: Tensor | Positions) -> Tensor:
    """The values of all positions, (..., D)."""
    parts = [output] if isinstance(output, Tensor) else [each for each in output if each is not None]
    return torch.cat([each.flatten(0, -2) for each in parts])


def growth(build: Callable[..., Any], step: Callable[[Any, int], Tensor], blocks: list[str], **options: Any) -> Any:
    """How the mean absolute change of blocks' outputs in five steps grows: slopes over width, both in logarithms."""
    widths, changes = (32, 64, 128, 256), []
    for width in widths:
        module = build(width, **options)
        outputs: dict[str, list[Tensor]] = {block: [] for block in blocks}
        optimizer = torch.optim.AdamW(width_groups(module, 0.0, 3e-3, module.width_parts()), lr=3e-3)

        def look(module: Any = module, outputs: dict[str, list[Tensor]] = outputs) -> None:
            handles = [
                module.get_submodule(block).register_forward_hook(
                    lambda _, __, output, kept=kept: kept.append(joined(output))
                )
                for block, kept in outputs.items()
            ]
            with torch.no_grad():
                step(module, 100)
            for handle in handles:
                handle.remove()

        look()
        for seed in range(5):
            step(module, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        look()
        changes.append([(after - before).abs().mean().item() for before, after in outputs.values()])
    return np.polyfit(np.log(widths), np.log(changes), 1)[0]


@pytest.mark.parametrize(
    ("build", "step", "blocks"),
    [
        (tokenizer, tokenizer_step, ["tokenizer.encoder.blocks.1", "tokenizer.encoder.head"]),
        (prior, prior_step, ["prior.blocks.0", "prior.blocks.1"]),
    ],
)
def test_coordinate_check(build: Callable[..., Any], step: Callable[[Any, int], Tensor], blocks: list[str]) -> None:
    standard, transferred = growth(build, step, blocks), growth(build, step, blocks, mup_base_width=32)
    assert (standard > 0.6).all(), "the standard change grows with the width"
    assert (abs(transferred) < 0.2).all(), "that of width transfer does not"
