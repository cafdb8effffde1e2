"""Width transfer of tokenizer and prior: activations against width, and the best learning rate at three widths.

Small models train on the demo's latents and tokens, in the standard parametrisation and with `mup_base_width`. The base
width is the smallest of the sweep, where the two are the same.

Coordinate check: after a few steps at one learning rate, the mean absolute value of the outputs of blocks and heads for
one batch, and of their change since initialisation. `exponents` are slopes of the logarithm of the change over that of
the width: at 0 the change does not depend on the width.

Sweep: for every learning rate the final training loss (mean over the last fifth of the steps) of short trainings with
warm-up and cosine. `best` has the learning rate of the smallest mean over seeds (`grid`), and the minimum of a parabola
through it and its neighbours, over the logarithm of the learning rate (`parabola`).

    make bench-width
"""

import argparse
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
import torch
from report import write_results
from torch import Tensor, nn

from flextok_pl import FlexTokConfig, PriorConfig, ShardDataModule
from flextok_pl.layers.packing import Positions
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.token_loss import token_loss
from flextok_pl.modules import PriorModule, TokenizerModule
from flextok_pl.modules.optim import warmup_cosine
from flextok_pl.modules.width_transfer import width_groups

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARTS = ("tokenizer", "prior")
KINDS = ("standard", "muP")
TOKENS = 16  # K; the prior uses the first of the demo's 64

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--latents", default="data/openmoji64_latents")
parser.add_argument("--tokens", default="data/openmoji64_tokens")
parser.add_argument("--vae", default="flextok_pl/assets/vae_demo")
parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
parser.add_argument("--check-widths", type=int, nargs="+", default=[64, 128, 256, 512])
parser.add_argument("--check-steps", type=int, default=5)
parser.add_argument("--check-lr", type=float, default=3e-3)
parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3 * 2**n for n in range(6)])
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--workers", type=int, default=2, help="trainings at a time, with one thread each")
parser.add_argument("--device", default="cpu", choices=["cpu"])
parser.add_argument("--picture", default=None, help="PNG to draw")
parser.add_argument("--json", default=None, help="file to write the results to")

DATA: dict[str, Any] = {}


def prepare(options: argparse.Namespace) -> None:
    """Load the data for every training of this process."""
    torch.set_num_threads(1)
    DATA["options"] = options
    for part, source in (("tokenizer", options.latents), ("prior", options.tokens)):
        data = ShardDataModule(val=source, image_size=64, eval_batch_size=256, val_limit=4096, num_workers=0)
        batches = list(data.val_dataloader())
        field = "latent" if part == "tokenizer" else "tokens"
        DATA[part] = {name: torch.cat([batch[name] for batch in batches]) for name in (field, "label")}


def build(part: str, width: int, base_width: int | None, vae: str) -> TokenizerModule | PriorModule:
    if part == "prior":
        net = PriorConfig(
            num_classes=9, vocab_size=4375, num_tokens=TOKENS, depth=2, width=width, head_dim=32, qk_norm=True
        )
        return PriorModule(net, mup_base_width=base_width)
    config = FlexTokConfig(
        vae=None,
        encoder_width=width,
        encoder_depth=2,
        encoder_head_dim=32,
        decoder_width=width,
        decoder_depth=2,
        decoder_head_dim=32,
        num_registers=TOKENS,
        fsq_levels=(7, 5, 5, 5, 5),
        grid_size=(4, 4),
        position_base=10.0,
        repa_layer=None,
        nested_dropout="uniform_pow2",
        null_dropout=0.1,
        timestep_law="logit_normal",
    )
    return TokenizerModule(config, vae=vae, mup_base_width=base_width, weight_decay=0.01)


def loss_of(module: TokenizerModule | PriorModule, generator: torch.Generator, batch_size: int) -> Tensor:
    """The training loss of a batch; all random draws come from the generator."""
    data = DATA["prior" if isinstance(module, PriorModule) else "tokenizer"]
    rows = torch.randint(len(data["label"]), (batch_size,), generator=generator)
    if isinstance(module, PriorModule):
        tokens = data["tokens"][rows, :TOKENS]
        return token_loss(module.prior.hidden(tokens, data["label"][rows]), module.prior.head.weight, tokens).loss
    latents = module.latents({"latent": data["latent"][rows]})
    # As in experiments/tokenizer/demo.yaml.
    draws = sample_draws(module.tokenizer.config, latents, generator, timestep_shift=2.0, pure_noise=0.7)
    return flow_loss(module.tokenizer, latents, draws).loss.mean()


def optimizer_of(module: TokenizerModule | PriorModule, lr: float) -> torch.optim.Optimizer:
    groups = width_groups(module, module.hparams["weight_decay"], lr, module.width_parts())
    return torch.optim.AdamW(groups, lr=lr, betas=module.hparams["betas"])


def joined(output: Tensor | Positions) -> Tensor:
    """Concatenate the values of all positions."""
    parts = [output] if isinstance(output, Tensor) else [each for each in output if each is not None]
    return parts[0] if len(parts) == 1 else torch.cat([each.flatten(0, -2) for each in parts])


def outputs_of(module: TokenizerModule | PriorModule, batch_size: int) -> dict[str, Tensor]:
    """Outputs of blocks and heads for one batch, always the same."""
    networks = (
        {"prior": module.prior}
        if isinstance(module, PriorModule)
        else {"encoder": module.tokenizer.encoder, "decoder": module.tokenizer.decoder}
    )
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any, Tensor | Positions], None]:
        return lambda _, __, output: found.update({name: joined(output)})

    watched = {
        f"{network} {name}": block
        for network, parts in networks.items()
        for name, block in [*((f"block {i}", block) for i, block in enumerate(parts.blocks)), ("head", parts.head)]
    }
    handles = [block.register_forward_hook(keeper(name)) for name, block in watched.items()]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(10**6)
        loss_of(module, generator, batch_size)
        if isinstance(module, PriorModule):  # the loss applies the head's weight itself
            module.prior.head(module.prior.norm(found[f"prior block {len(module.prior.blocks) - 1}"]))
    for handle in handles:
        handle.remove()
    return found


def check(part: str, width: int, base_width: int | None, seed: int) -> dict[str, tuple[float, float]]:
    """Mean absolute (value, change) of every output after a few steps."""
    options = DATA["options"]
    torch.manual_seed(seed)
    module = build(part, width, base_width, options.vae)
    start = outputs_of(module, options.batch_size)
    optimizer = optimizer_of(module, options.check_lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.check_steps):
        loss_of(module, generator, options.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    end = outputs_of(module, options.batch_size)
    return {name: (end[name].abs().mean().item(), (end[name] - start[name]).abs().mean().item()) for name in start}


def train(part: str, width: int, base_width: int | None, lr: float, seed: int) -> float:
    """The final loss of one training; infinite if it is not finite."""
    options = DATA["options"]
    torch.manual_seed(seed)
    module = build(part, width, base_width, options.vae)
    optimizer = optimizer_of(module, lr)
    schedule = warmup_cosine(optimizer, options.steps // 10, options.steps, module.hparams["min_lr_ratio"])
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(options.steps):
        loss = loss_of(module, generator, options.batch_size)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    last = mean(losses[-(options.steps // 5) :])
    return last if math.isfinite(last) else math.inf


def best_lr(losses: dict[float, float]) -> tuple[float, float]:
    """(the learning rate of the least loss, the minimum of a parabola through it and its neighbours)."""
    lrs = sorted(losses)
    at = min(range(len(lrs)), key=lambda i: losses[lrs[i]])
    if not 0 < at < len(lrs) - 1 or not all(math.isfinite(losses[lr]) for lr in lrs[at - 1 : at + 2]):
        return lrs[at], lrs[at]
    near = lrs[at - 1 : at + 2]
    a, b, _ = np.polyfit(np.log(near), [losses[lr] for lr in near], 2)
    return lrs[at], float(np.exp(-b / (2 * a)))


def called(function: Callable[..., Any], call: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    return call, function(*call)


def run(pool: Any, function: Callable[..., Any], jobs: dict[Any, list[tuple[Any, ...]]]) -> dict[Any, list[Any]]:
    """The results of each list of calls, by seed, the widest models first; equal calls run once."""
    calls = sorted({call for row in jobs.values() for call in row}, key=lambda call: (call[-1], -call[1]))
    done = {}
    for call, result in pool.imap_unordered(partial(called, function), calls):
        print(call, result, flush=True)
        done[call] = result
    return {name: [done[call] for call in row] for name, row in jobs.items()}


def draw(results: dict[str, Any], path: str) -> None:
    parts = [part for part in PARTS if part in results]
    figure, axes = plt.subplots(len(parts), 3, figsize=(11, 3.4 * len(parts)), squeeze=False, layout="constrained")
    for (left, *sweeps), part in zip(axes, parts, strict=True):
        check, sweep = results[part]["coordinate_check"], results[part]["sweep"]
        names = [name for name in check["change"]["muP"] if "head" in name or "block 1" in name]
        for color, name in enumerate(names):
            for kind, style in (("standard", "--"), ("muP", "-")):
                points = check["change"][kind][name]
                label = name if kind == "muP" else None
                widths = [int(width) for width in points]
                left.plot(widths, list(points.values()), style, marker="o", ms=3, color=f"C{color}", label=label)
        left.set(xscale="log", yscale="log", xlabel="width", ylabel="mean absolute change")
        left.set_title(f"{part}: change of outputs\n(dashed standard, solid muP)", fontsize=10)
        left.set_xticks(widths, [str(width) for width in widths])
        left.minorticks_off()
        left.legend(fontsize=7)
        curves = {
            kind: {width: [mean(row) for row in runs.values()] for width, runs in sweep[kind].items()} for kind in KINDS
        }
        low = min(min(means) for by_width in curves.values() for means in by_width.values())
        high = max(curves["muP"][min(curves["muP"], key=int)])
        for axis, kind in zip(sweeps, KINDS, strict=True):
            for color, (width, runs) in enumerate(sweep[kind].items()):
                lrs = [float(lr) for lr in runs]
                axis.plot(lrs, curves[kind][width], marker="o", ms=3, color=f"C{color}", label=f"width {width}")
                spread = ([min(row) for row in runs.values()], [max(row) for row in runs.values()])
                axis.fill_between(lrs, *spread, color=f"C{color}", alpha=0.15, lw=0)
                axis.axvline(results[part]["best"][kind][width]["parabola"], color=f"C{color}", ls=":", lw=1)
            axis.set(xscale="log", xlabel="learning rate", ylabel="training loss")
            axis.set_title(f"{part}: {kind}\n(dotted: minimum)", fontsize=10)
            axis.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
            axis.minorticks_off()
            axis.legend(fontsize=7)
        for axis in sweeps:
            axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parser.parse_args()
    start = time.perf_counter()
    base = min(options.widths)

    def jobs(widths: list[int], *others: Iterable[float]) -> dict[tuple[str, str, int], list[tuple[Any, ...]]]:
        """Calls by part, parametrisation and width; at the base width both parametrisations share their jobs."""
        return {
            (part, kind, width): [
                (part, width, base if kind == "muP" and width != base else None, *rest)
                for rest in itertools.product(*others)
            ]
            for part, kind, width in itertools.product(options.parts, KINDS, widths)
        }

    checks = jobs(options.check_widths, range(options.seeds))
    trainings = jobs(options.widths, options.lrs, range(options.seeds))
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, initializer=prepare, initargs=(options,)) as pool:
        checked = run(pool, check, checks)
        trained = run(pool, train, trainings)

    results: dict[str, Any] = {}
    for part in options.parts:
        coordinates: dict[str, Any] = {"value": {}, "change": {}, "exponents": {}}
        sweep: dict[str, Any] = {}
        best: dict[str, Any] = {}
        for kind in KINDS:
            found = {width: checked[part, kind, width] for width in options.check_widths}
            for index, quantity in enumerate(("value", "change")):
                coordinates[quantity][kind] = {
                    name: {width: mean(row[name][index] for row in rows) for width, rows in found.items()}
                    for name in found[base][0]
                }
            coordinates["exponents"][kind] = {
                name: float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])
                for name, points in coordinates["change"][kind].items()
            }
            sweep[kind], best[kind] = {}, {}
            for width in options.widths:
                losses = iter(trained[part, kind, width])
                runs = {lr: list(itertools.islice(losses, options.seeds)) for lr in options.lrs}
                grid, parabola = best_lr({lr: mean(row) for lr, row in runs.items()})
                sweep[kind][width], best[kind][width] = runs, {"grid": grid, "parabola": parabola}
        results[part] = {"coordinate_check": coordinates, "sweep": sweep, "best": best}
    results["seconds"] = time.perf_counter() - start
    if options.picture:
        draw(results, options.picture)
    write_results("width_transfer", vars(options), results, options.json)


if __name__ == "__main__":
    main()
