"""`flextok decoding`: which steps and which guidance decode best at each token budget."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from tqdm import tqdm

from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.backbones.extractors import OFFLINE_EXTRACTOR, build_extractor
from flextok_pl.callbacks.evaluation import extractor_facts, versions
from flextok_pl.callbacks.generation_fid import Wish, balanced_wish
from flextok_pl.cli.tools import checked_budgets, default_device, picture_size
from flextok_pl.contracts import weights_hash
from flextok_pl.data.pictures import open_pictures
from flextok_pl.data.transforms import CENTER_CROP
from flextok_pl.evaluation.generation import GenerationStatistics
from flextok_pl.evaluation.reconstruction import ReconstructionStatistics
from flextok_pl.evaluation.report import format_columns, format_value, make_records, write_json
from flextok_pl.files import write_file
from flextok_pl.flow.decoding import GUIDANCE_KINDS
from flextok_pl.keys import sample_generators
from flextok_pl.metrics.feature_set import POOL_SIZE
from flextok_pl.metrics.images import to_uint8
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.saved import SavedPrior


@dataclass(frozen=True)
class Setting:
    """How tokens are decoded.

    Args:
        num_steps: of the Euler solver.
        guidance: `none`, `cfg` or `apg`.
        guidance_scale: its strength; 1 with `none`.
    """

    num_steps: int
    guidance: str
    guidance_scale: float

    @property
    def guided(self) -> str:
        """Guidance and its strength, as a label."""
        return "none" if self.guidance == "none" else f"{self.guidance} {self.guidance_scale:g}"


def compare_decodings(
    reference: str,
    tokenizer: str | None = None,
    prior: str | None = None,
    budgets: str | None = None,
    num_steps: list[int] | None = None,
    guidance: list[str] | None = None,
    guidance_scale: list[float] | None = None,
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

    Pictures are encoded once, or a prior's samples drawn once; features of real pictures are taken once; and every
    combination starts from the same noise. Leaves `decoding.json` (a record per number), `decoding.png` (a heat map for
    each budget) and `schedule.json` (the best combination for each budget).

    Args:
        reference: real pictures: a folder, a shard set or a pattern of them, or a `.npz` file.
        tokenizer: a `.safetensors` file, a folder or a Hub id; default the demo tokenizer.
        prior: a prior of classes, or of no condition: measure pictures that it generates, as many as are real and its
            classes in turn, in place of reconstructions.
        budgets: numbers of tokens, such as 1,4,16,64; default 1, 2, 4, ... up to all.
        num_steps: default [5, 10, 25].
        guidance: `none`, `cfg`, `apg`; default all of them.
        guidance_scale: strengths of `cfg` and `apg`; default [1.5, 3.0, 7.5].
        cfg_scale: guidance of the prior.
        temperature: of the prior.
        metric: what is best where it is smallest; default the kernel distance.
        extractor: of the features.
        weights: a local file with its weights.
        batch_size: pictures at a time.
        num_workers: processes that decode pictures.
        seed: of noise and tokens.
        out: folder of the results.
        device: default a GPU where there is one.
    """
    settings = _settings(num_steps or [5, 10, 25], guidance or list(GUIDANCE_KINDS), guidance_scale or [1.5, 3.0, 7.5])
    place = default_device(device)
    source = None if prior is None else SavedPrior(prior, tokenizer or str(DEMO_TOKENIZER)).eval().to(place)
    if source is not None and source.condition_kind == "text":
        raise ValueError(f"prior={prior!r} is conditioned on text: measure it by `flextok test` and its group gfid")
    tok = FlexTok.from_pretrained(tokenizer or DEMO_TOKENIZER, device=place) if source is None else source.reconstructor
    if tok.config.objective == "mse":
        raise ValueError(
            f"tokenizer={tokenizer!r} has objective='mse' and decodes in one step without guidance: nothing is to be "
            "chosen; measure it by `flextok test`"
        )
    wanted = checked_budgets(budgets, tok.num_registers)
    network = build_extractor(extractor, weights).to(place)
    chosen = metric or network.kernel_metric_name
    known = (network.metric_name, network.kernel_metric_name)
    if chosen not in known:
        raise ValueError(f"metric={metric!r} must be one of {known}, which are smallest where they are best")

    loader, count = open_pictures(reference, picture_size(tok), batch_size, num_workers)
    share = min(1.0, POOL_SIZE / max(1, count))
    kind: type[ReconstructionStatistics | GenerationStatistics]
    kind = ReconstructionStatistics if source is None else GenerationStatistics
    first = kind(wanted, network, share)
    statistics = {settings[0]: first, **{s: kind(wanted, network, share, real=first.real) for s in settings[1:]}}
    for each in statistics.values():
        if isinstance(each, ReconstructionStatistics) and isinstance(first, ReconstructionStatistics):
            each.images = first.images  # real pictures are counted once
    done = 0
    with tqdm(total=count * len(settings) * len(wanted), desc="decoding", unit="picture") as bar:
        for batch in loader:
            images, keys = batch["image"].to(place), batch["key"]
            originals = to_uint8(images)
            first.update_real(originals, keys)
            if source is None:
                tokens = tok.tokenize(images, num_tokens=wanted[-1])
            else:
                wishes = [balanced_wish(done + i, source.num_classes) for i in range(len(keys))]
                keys = [wish.key for wish in wishes]
                tokens = _generated(source, wishes, cfg_scale, temperature, seed)
            done += len(keys)
            for setting, each in statistics.items():
                for budget in wanted:
                    noise = sample_generators(keys, seed)
                    made = to_uint8(tok.detokenize(tokens, num_tokens=budget, generator=noise, **asdict(setting)))
                    if isinstance(each, ReconstructionStatistics):
                        each.update_reconstructions(budget, originals, made, keys)
                    else:
                        each.update_generated(budget, made, keys)
                    bar.update(len(keys))

    values = {setting: each.values(seed) for setting, each in statistics.items()}
    protocol = {
        "num_samples": count,
        "reference": reference,
        "data_hash": f"{first.data_hash % 2**64:016x}",
        "image_size": first.image_size,
        "crop": CENTER_CROP,
        **extractor_facts(network),
        "solver": "euler",
        "seed": seed,
        "tokenizer_hash": weights_hash(tok),
        "device": place.type,
        "versions": versions(),
    }
    if source is not None:
        protocol |= {"prior_hash": weights_hash(source.prior), "cfg_scale": cfg_scale, "temperature": temperature}
    folder = Path(out).expanduser()
    records = [
        record for s, found in values.items() for record in make_records(found, {**asdict(s), **protocol}, first.how)
    ]
    write_json(records, folder / "decoding.json")
    table = {budget: {setting: found[budget][chosen] for setting, found in values.items()} for budget in wanted}
    best = {budget: min(found, key=lambda setting: found[setting]) for budget, found in table.items()}
    schedule = [
        {"num_tokens": budget, **asdict(setting), "metric": chosen, "value": table[budget][setting], **protocol}
        for budget, setting in best.items()
    ]
    write_json(schedule, folder / "schedule.json")
    write_file(folder / "decoding.png", _heat_maps(table, chosen))
    rows = [[str(k), str(s.num_steps), s.guided, format_value(table[k][s])] for k, s in best.items()]
    print(format_columns([["tokens", "steps", "guidance", chosen], *rows]))
    print(f"best of {len(settings)} combinations on {count} pictures; all numbers: {folder}")


def _settings(num_steps: Sequence[int], guidance: Sequence[str], scales: Sequence[float]) -> list[Setting]:
    for kind in guidance:
        if kind not in GUIDANCE_KINDS:
            raise ValueError(f"guidance={kind!r} is unknown; use some of {list(GUIDANCE_KINDS)}")
    if min(num_steps) < 1:
        raise ValueError(f"num_steps={list(num_steps)} must be at least 1")
    return [
        Setting(steps, kind, scale)
        for kind in guidance
        for scale in ([1.0] if kind == "none" else scales)
        for steps in num_steps
    ]


def _generated(source: SavedPrior, wishes: Sequence[Wish], cfg_scale: float, temperature: float, seed: int) -> Tensor:
    """(B, K) tokens."""
    classes = torch.tensor([wish.label for wish in wishes]) if source.num_classes else None
    generators = sample_generators([wish.key for wish in wishes], seed, "tokens")
    return source.generate_tokens(classes, cfg_scale, temperature=temperature, generator=generators)


def _heat_maps(table: Mapping[int, Mapping[Setting, float]], metric: str) -> bytes:
    """One map per budget, guidance by steps, with its numbers and a frame around the best, as PNG."""
    settings = list(next(iter(table.values())))
    rows = list(dict.fromkeys(setting.guided for setting in settings))
    columns = list(dict.fromkeys(setting.num_steps for setting in settings))
    width, height = 1.0 + 0.6 * len(columns), 0.8 + 0.25 * len(rows)
    across = max(1, min(len(table), int(8 / width)))
    down = -(-len(table) // across)
    figure = Figure(figsize=(max(4.0, width * across), height * down + 0.4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, (budget, found) in enumerate(table.items()):
        values = {(setting.guided, setting.num_steps): value for setting, value in found.items()}
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
    buffer = io.BytesIO()
    canvas.print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()
