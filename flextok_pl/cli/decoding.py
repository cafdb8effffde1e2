"""`flextok decoding`: find the steps and the guidance that decode best at each token budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.backbones.extractors import OFFLINE_EXTRACTOR, build_extractor
from flextok_pl.cli.tools import checked_budgets, default_device, picture_size
from flextok_pl.contracts import Batch
from flextok_pl.data.pictures import open_pictures
from flextok_pl.data.transforms import crop_name
from flextok_pl.evaluation.decoding import decode, images_at_once
from flextok_pl.evaluation.generation import balanced_prompt, generate_tokens
from flextok_pl.evaluation.generation_statistics import GenerationStatistics
from flextok_pl.evaluation.pictures import save_figure
from flextok_pl.evaluation.protocol import data_hash_text, extractor_facts, model_hashes, versions
from flextok_pl.evaluation.reconstruction_statistics import ReconstructionStatistics
from flextok_pl.evaluation.report import format_columns, format_value, make_records, write_json
from flextok_pl.flow.decoding import EVERYWHERE, GUIDANCE_KINDS, Decoding
from flextok_pl.metrics.feature_set import POOL_SIZE
from flextok_pl.metrics.images import to_uint8
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.saved import SavedPrior

Cell = tuple[Decoding, int]
"""Options of a decoding, and the number of tokens."""
Statistics = ReconstructionStatistics[Cell] | GenerationStatistics[Cell]


def compare_decodings(
    reference: str,
    tokenizer: str | None = None,
    prior: str | None = None,
    budgets: str | None = None,
    num_steps: list[int] | None = None,
    guidance: list[str] | None = None,
    guidance_scale: list[float] | None = None,
    guidance_interval: list[tuple[float, float]] | None = None,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    metric: str | None = None,
    extractor: str = OFFLINE_EXTRACTOR,
    weights: str | None = None,
    batch_size: int = 64,
    num_workers: int = 2,
    seed: int = 0,
    out: str = "decoding",
    device: str | None = None,
) -> None:
    """Measure every combination of steps, guidance and token budget, and recommend one for each budget.

    Encodes pictures once, or draws a prior's samples once, and takes the features of real pictures once. Every
    combination starts from the same noise. Writes `decoding.json` (one record per number), `decoding.png` (one heat map
    per budget) and `schedule.json` (the best combination for each budget).

    Args:
        reference: real pictures: a folder, a shard set or a pattern of shard sets, or a `.npz` file.
        tokenizer: a `.safetensors` file, a folder or a Hub id; default the demo tokenizer.
        prior: a prior of classes, or of no condition. Its samples are measured in place of reconstructions: as many as
            there are real pictures, with its classes in turn.
        budgets: numbers of tokens, such as 1,4,16,64; default 1, 2, 4, ... up to all.
        num_steps: default [5, 10, 25].
        guidance: `none`, `cfg`, `apg`; default all of them.
        guidance_scale: scales of `cfg` and `apg`; default [1.5, 3.0, 7.5].
        guidance_interval: flow times (low, high] at which `cfg` and `apg` guide, with 1 for noise, such as
            [[0,1],[0.2,0.8]]; default all times, [[0,1]].
        cfg_scale: guidance scale of the prior.
        temperature: sampling temperature of the prior.
        metric: metric to choose by, where smaller is better; default the kernel distance.
        extractor: feature network.
        weights: local weights file of the feature network.
        batch_size: pictures per batch.
        num_workers: processes that decode pictures.
        seed: seed of noise and tokens.
        out: folder for the results.
        device: default a GPU if available.
    """
    decodings = [
        Decoding(steps, kind, scale, guidance_interval=interval)
        for kind in guidance or GUIDANCE_KINDS
        for scale in ([1.0] if kind == "none" else guidance_scale or [1.5, 3.0, 7.5])
        for interval in ([EVERYWHERE] if kind == "none" else guidance_interval or [EVERYWHERE])
        for steps in num_steps or [5, 10, 25]
    ]
    place = default_device(device)
    source = (
        None if prior is None else SavedPrior(prior, tokenizer, other_tokenizer=str(DEMO_TOKENIZER)).eval().to(place)
    )
    if source is not None and source.condition_kind == "text":
        raise ValueError(f"prior={prior!r} is conditioned on text: measure it with `flextok test` and its group gfid")
    tok = FlexTok.from_pretrained(tokenizer or DEMO_TOKENIZER, device=place) if source is None else source.reconstructor
    if tok.config.objective == "mse":
        raise ValueError(
            f"tokenizer={tokenizer!r} has objective='mse' and decodes in one step without guidance: there is nothing "
            "to choose; measure it with `flextok test`"
        )
    wanted = checked_budgets(budgets, tok.num_registers)
    network = build_extractor(extractor, weights).to(place)
    chosen = metric or network.kernel_metric_name
    known = (network.metric_name, network.kernel_metric_name)
    if chosen not in known:
        raise ValueError(f"metric={metric!r} must be one of {known}, for which smaller is better")
    size = picture_size(tok)
    loader, count = open_pictures(reference, size, batch_size, num_workers, tok.image_channels)
    if count < 2:
        raise ValueError(f"reference={reference!r} holds {count} picture, but a distance needs two: add pictures to it")
    kind = ReconstructionStatistics if source is None else GenerationStatistics
    cells = list(itertools.product(decodings, wanted))
    statistics: Statistics = kind(cells, network, min(1.0, POOL_SIZE / max(1, count)))
    model = tok if source is None else source
    with tqdm(total=count * len(cells), desc="decoding", unit="picture") as bar:
        for done in _measure(statistics, model, loader, seed, cfg_scale, temperature):
            bar.update(done)
    protocol = {
        "num_samples": count,
        "reference": reference,
        "data_hash": data_hash_text(statistics.data_hash),
        "image_size": statistics.image_size,
        "crop": crop_name(size),
        **extractor_facts(network),
        "seed": seed,
        **model_hashes(tok, None if source is None else source.prior),
        **({} if source is None else {"cfg_scale": cfg_scale, "temperature": temperature}),
        "device": place.type,
        "versions": versions(),
    }
    table = _write(statistics, protocol, chosen, Path(out))
    print(format_columns([["tokens", "steps", "guidance", chosen], *table]))
    print(f"best of {len(decodings)} combinations on {count} pictures; all numbers: {out}")


def _measure(
    statistics: Statistics,
    model: FlexTok | SavedPrior,
    loader: Iterable[Batch],
    seed: int,
    cfg_scale: float,
    temperature: float,
) -> Iterator[int]:
    """Tokenize each picture once, or generate tokens in its place, and decode them in every cell.

    Yields the number of images that each step has decoded.
    """
    tok = model if isinstance(model, FlexTok) else model.reconstructor
    numbers, most = itertools.count(), max(budget for _, budget in statistics.made)
    for batch in loader:
        images, keys = batch["image"].to(tok.device), batch["key"]
        originals = to_uint8(images)
        statistics.update_real(originals, keys)
        if isinstance(model, FlexTok):
            tokens = tok.tokenize(images, num_tokens=most)
        else:
            prompts = [balanced_prompt(next(numbers), model.num_classes) for _ in keys]
            keys = [prompt.key for prompt in prompts]
            tokens = generate_tokens(model, prompts, seed, cfg_scale, temperature)
        at_once = images_at_once(len(keys), originals.shape[2:], tok.device)
        for how, cells in itertools.groupby(statistics.made, key=lambda cell: cell[0]):
            for budget, made in decode(tok, tokens, [budget for _, budget in cells], how, keys, seed, at_once):
                if isinstance(statistics, ReconstructionStatistics):
                    statistics.update_reconstructions((how, budget), originals, made, keys)
                else:
                    statistics.update_generated((how, budget), made, keys)
                yield len(keys)


def _write(statistics: Statistics, protocol: Mapping[str, Any], metric: str, folder: Path) -> list[list[str]]:
    """Write all numbers, their heat maps and the best decoding at each budget; return the last as a table."""
    values = statistics.values(protocol["seed"])
    table: dict[int, dict[Decoding, float]] = {}
    records = []
    for (how, budget), found in values.items():
        table.setdefault(budget, {})[how] = found[metric]
        records += make_records({budget: found}, {**how.facts, **protocol}, statistics.how)
    best = {budget: min(found, key=found.__getitem__) for budget, found in table.items()}
    schedule = [
        {"num_tokens": budget, **how.facts, "metric": metric, "value": table[budget][how], **protocol}
        for budget, how in best.items()
    ]
    write_json(records, folder / "decoding.json")
    write_json(schedule, folder / "schedule.json")
    save_figure(_heat_maps(table, metric), folder / "decoding.png")
    return [[str(k), str(how.num_steps), _guided(how), format_value(table[k][how])] for k, how in best.items()]


def _guided(how: Decoding) -> str:
    """Label of a guidance and its strength."""
    if how.guidance == "none":
        return "none"
    low, high = how.guidance_interval
    return f"{how.guidance} {how.guidance_scale:g}" + ("" if (low, high) == EVERYWHERE else f" ({low:g}, {high:g}]")


def _heat_maps(table: Mapping[int, Mapping[Decoding, float]], metric: str) -> Figure:
    """One map per budget, guidance by steps, with the numbers and a frame around the best."""
    decodings = list(next(iter(table.values())))
    rows = list(dict.fromkeys(_guided(setting) for setting in decodings))
    columns = list(dict.fromkeys(setting.num_steps for setting in decodings))
    width, height = 1.0 + 0.6 * len(columns), 0.8 + 0.25 * len(rows)
    across = max(1, min(len(table), int(8 / width)))
    down = -(-len(table) // across)
    figure = Figure(figsize=(max(4.0, width * across), height * down + 0.4), dpi=120, layout="constrained")
    for index, (budget, found) in enumerate(table.items()):
        values = {(_guided(setting), setting.num_steps): value for setting, value in found.items()}
        cells = np.array([[values[row, steps] for steps in columns] for row in rows])
        axes = figure.add_subplot(down, across, index + 1)
        axes.imshow(cells, cmap="viridis_r", aspect="auto")
        axes.set_xticks(range(len(columns)), [str(steps) for steps in columns], fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.set_title(f"{budget} tokens" if budget > 1 else "1 token", fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        middle = (cells.min() + cells.max()) / 2
        for i, row in enumerate(cells.tolist()):
            for j, value in enumerate(row):
                colour = "black" if value < middle else "white"
                axes.text(j, i, format_value(value), ha="center", va="center", fontsize=7, color=colour)
        i, j = divmod(int(cells.argmin()), len(columns))
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False))
    figure.suptitle(f"{metric}; smaller is better, the smallest framed", fontsize=9)
    return figure
