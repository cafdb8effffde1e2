"""`flextok report`: write the results of an evaluation as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG

from flextok_pl.assets import PUBLISHED
from flextok_pl.evaluation.report import Record, draw_budgets, format_value, read_records
from flextok_pl.files import write_file

KINDS = {"rfid": "Reconstruction", "gfid": "Generation"}
"""Name of a file of records -> what it measures."""

PICTURES = {
    "rfid": {
        "grid.png": "Held-out pictures and their reconstructions, from one token to all",
        "extremes.png": "Smallest and largest squared error at each budget",
    },
    "gfid": {"gfid_grid.png": "Generated pictures at each budget: the first tokens of one sample per row"},
}
"""Pictures of an evaluation -> their captions."""

NUMBERS = ("metric", "value", "num_tokens")
"""Fields of a record beside its protocol."""

FID = "frechet_inception_distance"

STYLE = """
body {font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222}
h1 {font-size: 1.6rem} h2 {font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd}
table {border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px}
th, td {padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #eee}
th:first-child, td:first-child {text-align: left}
figure {margin: 1rem 0; overflow-x: auto} figcaption {color: #555; font-size: 13px}
img {image-rendering: pixelated; max-width: none} svg {max-width: 100%; height: auto}
details {margin: 1rem 0} summary {cursor: pointer}
"""


def write_report(folder: str, out: str | None = None, dataset: Literal["imagenet256"] | None = None) -> None:
    """Write one HTML page about a model: curves and tables by token budget, pictures, token statistics, protocol.

    Args:
        folder: folder in which a test left `rfid.json` or `gfid.json`.
        out: HTML file to write; default `report.html` in that folder.
        dataset: `imagenet256` states that the images are ImageNet's validation set at 256 px; the page then also shows
            published FIDs of other models.
    """
    place = Path(folder)
    results = {kind: read_records(place / f"{kind}.json") for kind in KINDS if (place / f"{kind}.json").is_file()}
    if not results:
        raise ValueError(f"{place} has neither rfid.json nor gfid.json: run `flextok test` or `make eval-fid` first")
    if dataset is not None:
        _check_comparable(results, dataset)
    sections = [_section(kind, records, place, dataset) for kind, records in results.items()]
    if (place / "codes.json").is_file():
        sections.append(_tokens(read_records(place / "codes.json"), place))
    title = f"Evaluation of {place}"
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )
    target = place / "report.html" if out is None else Path(out)
    write_file(target, page)
    print(target)


def _check_comparable(results: Mapping[str, Sequence[Record]], dataset: str) -> None:
    """Refuse to show published FIDs, of Inception features and 50,000 pictures of 256 px, beside other results."""
    for kind, records in results.items():
        first = records[0]
        size, count = first.get("image_size"), first.get("num_samples")
        metrics = {record["metric"] for record in records}
        if size != [256, 256] or count != 50_000 or FID not in metrics:
            raise ValueError(
                f"dataset={dataset!r}: {kind}.json has {count} images of {size} and {sorted(metrics)}; published are "
                f"{FID} of 50000 at [256, 256]: leave dataset out"
            )


def _section(kind: str, records: Sequence[Record], place: Path, dataset: str | None) -> str:
    values: dict[int, dict[str, float]] = {}
    for record in records:
        values.setdefault(record["num_tokens"], {})[record["metric"]] = record["value"]
    metrics = list(values[min(values)])
    peers = [
        entry
        for entry in json.loads(PUBLISHED.read_text(encoding="utf-8"))
        if entry["dataset"] == dataset and entry["metric"] == kind
    ]
    first = records[0]
    parts = [
        f"<h2>{KINDS[kind]} by token budget</h2>",
        f"<p>{escape(_short_protocol(first))}</p>",
        f"<figure>{_curves(values, peers)}</figure>",
        _table(
            ["tokens", *metrics],
            [[str(budget), *(format_value(row[metric]) for metric in metrics)] for budget, row in values.items()],
        ),
    ]
    if peers:
        rows = [[p["model"], str(p["num_tokens"]), str(p["value"]), p["source"], p["kind"]] for p in peers]
        parts.append("<h3>Published values, each under its own protocol</h3>")
        parts.append(_table(["model", "tokens", kind, "source", "stated by"], rows))
    parts += [_picture(place / name, caption) for name, caption in PICTURES[kind].items()]
    parts.append(_protocol(records))
    return "\n".join(parts)


def _short_protocol(record: Record) -> str:
    guidance = f"{record.get('guidance')} {record.get('guidance_scale')}"
    if record.get("guidance_interval"):
        guidance += f" at times {record['guidance_interval']}"
    parts = [
        f"{record['num_samples']} images of {record.get('image_size')} px",
        f"{record.get('num_steps')} {record.get('solver')} steps, guidance {guidance}",
        f"features of {record.get('extractor')}",
        f"weights {record.get('model_weights')} of tokenizer {record.get('tokenizer_hash')}",
        f"seed {record.get('seed')}",
    ]
    return "; ".join(parts)


def _curves(values: Mapping[int, Mapping[str, float]], peers: Sequence[Record]) -> str:
    """The charts by budget as SVG, with other models' FIDs on their panel."""
    figure, panels = draw_budgets(values)
    for peer in peers:
        panels[FID].plot(peer["num_tokens"], peer["value"], "x", color="gray")
        panels[FID].annotate(peer["model"], (peer["num_tokens"], peer["value"]), fontsize=5, color="gray")
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "flextok"}):  # else the ids within the drawing are random
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})  # type: ignore[no-untyped-call]
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


def _tokens(records: Sequence[Record], place: Path) -> str:
    totals = [[r["metric"].removeprefix("codes_"), format_value(r["value"])] for r in records if "position" not in r]
    parts = [
        "<h2>Tokens</h2>",
        _table(["statistic", "value"], totals),
        _picture(place / "codes.png", "Entropy of each position, and its information about the class"),
        _protocol(records),
    ]
    return "\n".join(parts)


def _picture(file: Path, caption: str) -> str:
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _protocol(records: Sequence[Record]) -> str:
    """The protocol that all records share, and the fields that only some metrics state."""
    facts = {name: value for name, value in records[0].items() if all(r.get(name) == value for r in records)}
    rows = [[name, json.dumps(value)] for name, value in facts.items() if name not in NUMBERS]
    for record in records:
        own = [
            [f"{record['metric']}: {name}", json.dumps(value)]
            for name, value in record.items()
            if name not in (*NUMBERS, "position") and name not in facts
        ]
        rows += [row for row in own if row not in rows]
    return f"<details><summary>Protocol</summary>{_table(['field', 'value'], rows)}</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table><tr>{cells('th', heads)}</tr>\n{body}</table>"
