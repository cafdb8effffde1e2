"""Predictions of `flextok plan` for a training step, against measured steps.

Each setting takes steps in Lightning's order (a step's gradients are freed after the next forward pass) in its own
process. `kept` is the memory that autograd keeps for the backward pass, `live` the peak of all tensors. `resident` is
the process's resident set minus its value before the model is built (on a GPU the allocator's maximum); it includes
memory that allocator and libraries keep for themselves.

    python benchmarks/plan.py --json benchmarks/results/plan_cpu.json
"""

import argparse
import dataclasses
import json
from collections.abc import Callable

import torch
from report import measure_apart, peak_gib, synchronize, write_results

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.cost.count import Count, Numerics
from flextok_pl.cost.machines import machine
from flextok_pl.cost.plan import Setup, memory
from flextok_pl.cost.workload import Workload, prior_workload, tokenizer_workload
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.prior import Prior
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok

# Model, samples, type of the products; whether activations are kept or blocks checkpointed or compiled; parts of a
# batch, or positions of a chunked loss.
SETTINGS = [
    "49m 4 float32 kept 512",
    "49m 4 float32 kept none",
    "49m 4 float32 checkpointed 512",
    "49m 4 bfloat16 kept 512",
    "85m 8 float32 kept 512",
    "49m 4 float32 compiled 512",
    "49m 4 bfloat16 compiled 512",
    "d12_d12 1 float32 kept none",
    "d12_d12 2 float32 kept none",
    "d12_d12 2 float32 checkpointed none",
    "d12_d12 2 bfloat16 kept none",
    "d12_d12 2 float32 compiled none",
    "d12_d12 2 bfloat16 compiled none",
]
STEPS = 3

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--settings", nargs="+", default=SETTINGS, help="settings, each quoted, as in the list above")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--measure", default=None, help="measure one setting and print it as JSON")
parser.add_argument("--json", default=None, help="file to write the results to")


def prior(preset: str, batch: int, checkpointing: bool, chunk: str, numerics: Numerics, device: str):
    """(workload, model, loss of a step)."""
    config, size = PriorConfig.preset(preset), None if chunk == "none" else int(chunk)
    options = {"tokenizer": None, "text_encoder": None, "loss_chunk": size, "activation_checkpointing": checkpointing}
    model = Prior(config).to(device)
    model.checkpoint_activations(checkpointing)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (batch, config.num_tokens), generator=generator).to(device)
    classes = torch.zeros(batch, dtype=torch.int64, device=device)

    def loss() -> torch.Tensor:
        return token_loss(model.hidden(tokens, classes), model.head.weight, tokens, chunk_size=size).loss

    return prior_workload(options, config, 256, "tokens", numerics), model, loss


def tokenizer(preset: str, batch: int, checkpointing: bool, chunk: str, numerics: Numerics, device: str):
    """(workload, model, loss of a step), from latents and with all tokens, the most expensive step."""
    config = dataclasses.replace(FlexTokConfig.preset(preset), nested_dropout="none", null_dropout=0.0)
    options = {
        "stratified_budgets": False,
        "vae": None,
        "teacher": None,
        "route_share": 0.0,
        "route_blocks": None,
        "activation_checkpointing": checkpointing,
    }
    model = FlexTok(dataclasses.replace(config, vae=None)).to(device)
    model.checkpoint_activations(checkpointing)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, config.latent_channels, *model.latent_size, generator=generator).to(device)

    def loss() -> torch.Tensor:
        return flow_loss(model, latents, sample_draws(config, latents, generator)).loss.mean()

    size = model.latent_size[0] * config.vae.downsampling
    return tokenizer_workload(options, config, size, "latents", numerics), model, loss


def measure(setting: str, device: str) -> dict[str, float]:
    """Planned and measured memory of one setting."""
    preset, size, dtype, kept, part = setting.split()
    batch, half, checkpointing = int(size), dtype == "bfloat16", kept == "checkpointed"
    numerics = Numerics(2 if half else 4, fused_norms=device != "cpu")
    make = tokenizer if preset.startswith("d") else prior
    torch.manual_seed(0)
    take_steps(*tokenizer("tiny", 1, False, "1", numerics, device)[1:], 1, half, device)  # load the libraries
    before = peak_gib(device)
    made: tuple[Workload, torch.nn.Module, Callable[[], torch.Tensor]]
    made = make(preset, batch, checkpointing, part, numerics, device)
    workload, model, loss_of = made
    if kept == "compiled":
        for block in (module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]):
            block.compile(dynamic=True if make is tokenizer else None)  # as the modules do
    optimizer = take_steps(model, loss_of, STEPS, half, device)
    resident = peak_gib(device) - before
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    lasting = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *states])
    seen = Count()
    if kept != "compiled":  # the dispatcher does not see the memory of a compiled block
        with seen:
            take_steps(model, loss_of, 2, half, device, optimizer)
    saved = SavedMemory(model)
    with saved, torch.autocast(device, torch.bfloat16, enabled=half):
        loss_of()
    setup = Setup(machine("cpu"), 1, numerics, checkpointing=checkpointing, compiled=kept == "compiled", averaged=False)
    needed = memory(workload, setup, batch)
    planned = {
        "kept": needed["activations"] + needed["cast_weights"],
        "live": needed["total"] - needed["frozen"],
        "resident": needed["total"] - needed["frozen"],
    }
    measured = {"kept": saved.total, "live": lasting + seen.peak, "resident": resident * 2**30}
    if kept == "compiled":  # the process also holds the compiler
        del measured["live"], measured["resident"]
    if checkpointing or part == "none":  # our hooks do not see what a checkpoint keeps; logits are planned separately
        del measured["kept"]
    return {
        **{f"{name}_gib": value / 2**30 for name, value in measured.items()},
        **{f"planned_over_{name}": planned[name] / value for name, value in measured.items()},
    }


class SavedMemory(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps of forward passes in this context: each storage once, without parameters."""

    def __init__(self, module: torch.nn.Module) -> None:
        known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.total = 0
        self._kept: list[torch.Tensor] = []  # so that no other storage gets the same address

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                self.total += storage.nbytes()
                self._kept.append(tensor)
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def take_steps(
    model: torch.nn.Module,
    loss_of: Callable[[], torch.Tensor],
    count: int,
    half: bool,
    device: str,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Train for some steps; returns the optimizer."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(count):
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        del loss
        optimizer.step()
    synchronize(device)
    return optimizer


def main() -> None:
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.device)))
        return
    results = {setting: measure_apart(setting) for setting in options.settings}
    write_results("plan", vars(options), results, options.json)


if __name__ == "__main__":
    main()
