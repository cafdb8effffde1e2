"""The page of `flextok app`, in Gradio: a tab each to resample a picture, to generate and to search.

All computations wait in one queue and run alone. A visitor's choices and results stay in their session.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from flextok_pl.app import work
from flextok_pl.contracts import ImageSize
from flextok_pl.errors import UserError, told_to_the_user
from flextok_pl.evaluation.report import format_value
from flextok_pl.flow.decoding import GUIDANCE_KINDS, Decoding
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.search.driver import Models
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.verifiers import BaseVerifier

PAGE_ONLY: dict[str, Any] = {"api_visibility": "private"}
"""Options of an event that programs cannot call."""

QUEUED: dict[str, Any] = PAGE_ONLY | {"concurrency_id": "models", "concurrency_limit": 1}
"""Options of an event that computes."""

LIVE: dict[str, Any] = QUEUED | {"trigger_mode": "always_last", "show_progress": "minimal"}
"""Options of an event that follows a slider: of those that come while it runs, only the last one counts."""

KEEP_S = 3600
"""Time for which the server keeps uploads and pictures."""

POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""What the browser may load: nothing from other hosts."""

CSS = """
.gradio-container {width: 100%; max-width: 1200px !important; margin: auto !important}
.picture img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}
#drawn .grid-container {grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) !important; padding-top: 28px}
.examples .grid-container {grid-template-columns: repeat(auto-fill, minmax(38px, 1fr)) !important; gap: 4px; padding: 0}
.picture .thumbnail-item {width: 100%; height: auto; aspect-ratio: 1}
.tokens {display: flex; flex-wrap: wrap; gap: 3px; max-height: 168px; overflow-y: auto}
.tokens span {padding: 1px 5px; border-radius: 4px; color: #fff; font: 11px ui-monospace, monospace}
.first {background: #2563eb} .second {background: #c2410c}
.tokens .cut {background: none; color: var(--body-text-color-subdued); opacity: .6}
.legend {margin-bottom: 6px; font-size: 13px}
.legend i {display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 4px 0 10px}
.costs span {display: inline-block; margin-right: 16px}
.bar {height: 8px; margin: 4px 0; border-radius: 4px; background: var(--border-color-primary)}
.bar div {height: 8px; border-radius: 4px; background: var(--color-accent)}
"""


def build_page(
    models: Models,
    size: ImageSize,
    decoding: Decoding,
    verifiers: Mapping[str, BaseVerifier],
    examples: Sequence[Image.Image],
) -> gr.Blocks:
    """Build the page.

    Args:
        models: tokenizer and prior to run; without a `Prior` the page only resamples.
        size: size of the tokenizer's pictures in pixels.
        decoding: decoding options, unless a visitor chooses others.
        verifiers: verifiers to choose from for a search.
        examples: pictures of that size to choose from.
    """
    with gr.Blocks(title="FlexTok", analytics_enabled=False, delete_cache=(KEEP_S, KEEP_S)) as page:
        gr.Markdown("## FlexTok: pictures as 1 to " + f"{models.tokenizer.num_registers} ordered tokens")
        with gr.Tab("Resample"):
            _resample_tab(page, models, size, decoding, examples)
        if isinstance(models.prior, Prior):
            with gr.Tab("Generate"):
                _generate_tab(models, decoding)
            with gr.Tab("Search"):
                _search_tab(models, decoding, verifiers)
    return page


def launch(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serve the page, only to this machine if the host is a loopback address, and return its address.

    Raises:
        ValueError: the host or the port is not available.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    sans, mono = (["system-ui", "sans-serif"], ["ui-monospace", "monospace"])
    try:
        _, address, _ = page.queue(max_size=20).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            max_file_size=work.MAX_BYTES,
            theme=gr.themes.Default(primary_hue="blue", font=sans, font_mono=mono),
            css=CSS,
            app_kwargs={"middleware": [Middleware(_OwnHostOnly)]},
        )
    except OSError as error:
        raise ValueError(
            f"port={port} at host={host} is not available: another program listens there, or this machine lacks the "
            "address; leave port out for the first free one from 7860 on"
        ) from error
    return str(address)


class _OwnHostOnly:
    """Adds `POLICY` to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, with_policy)


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Show errors that a visitor can fix; any other error stays in the server's log."""
    try:
        with told_to_the_user():
            yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _resample_tab(
    page: gr.Blocks, models: Models, size: ImageSize, usual: Decoding, examples: Sequence[Image.Image]
) -> None:
    tok = models.tokenizer
    most = tok.num_registers
    with gr.Row():
        pick_a = _picker("Picture A", "picture-a", examples)
        with gr.Column(min_width=280):
            result = _image("From the tokens", "result")
            kept = gr.Slider(1, most, most, step=1, label="Tokens kept")
            start = gr.Slider(0, most, most // 4, step=1, label="Tokens of A before those of B", visible=False)
            remove = gr.Button("Remove picture B", size="sm", visible=False)
            strip = gr.HTML()
        pick_b = _picker("Picture B, to swap tokens with", "picture-b", examples)
    first, second = pick_a[0], pick_b[0]
    decoding = _decoding_options(tok, usual, with_seed=True)
    inputs, outputs = [first, second, start, kept, *decoding], [result, strip]

    def example(number: int) -> tuple[work.Picture, Image.Image]:
        picture = work.tokenized(tok, examples[number], size)
        return picture, picture.image

    def from_example(chosen: gr.SelectData) -> tuple[work.Picture, Image.Image]:
        return example(chosen.index)

    def from_file(data: bytes) -> tuple[work.Picture, Image.Image]:
        with _errors_shown():
            picture = work.tokenized(tok, work.read_upload(data), size)
        return picture, picture.image

    def decode(
        first: work.Picture | None, second: work.Picture | None, start: int, kept: int, *options: Any
    ) -> tuple[Any, Any]:
        if first is None:
            return None, ""
        other = None if second is None else second.tokens
        with _errors_shown():
            tokens = work.mixed(first.tokens, other, start, kept)
            image = work.decoded(tok, tokens[None], Decoding(*options[:3]), options[3] or 0)[0]
        return image, _strip(work.origins(first.tokens, other, start, kept))

    def with_b(there: bool) -> tuple[Any, Any]:
        return gr.update(visible=there), gr.update(visible=there)

    for state, image, upload, gallery in (pick_a, pick_b):
        for chosen in (
            upload.upload(from_file, upload, [state, image], show_progress="hidden", **QUEUED),
            gallery.select(from_example, None, [state, image], show_progress="hidden", **QUEUED),
        ):
            chosen.success(decode, inputs, outputs, **LIVE)
            if state is second:
                chosen.success(lambda: with_b(True), None, [start, remove], **PAGE_ONLY)
    removed = remove.click(lambda: (None, None, *with_b(False)), None, [second, pick_b[1], start, remove], **PAGE_ONLY)
    removed.then(decode, inputs, outputs, **LIVE)
    gr.on([each.change for each in inputs[2:]], decode, inputs, outputs, **LIVE)
    page.load(lambda: example(0), None, [first, pick_a[1]], **QUEUED).then(decode, inputs, outputs, **LIVE)


def _picker(label: str, name: str, examples: Sequence[Image.Image]) -> tuple[Any, Any, Any, Any]:
    """The elements that choose a picture: its `work.Picture`, its display, and two ways to choose it."""
    with gr.Column(min_width=280):
        image = _image(label, name)
        upload = gr.UploadButton("Upload a picture", size="sm", type="binary", file_types=["image"])
        gallery = gr.Gallery(
            [*examples],
            show_label=False,
            columns=8,
            height=58,
            allow_preview=False,
            interactive=False,
            buttons=[],
            format="png",
            elem_classes=["picture", "examples"],
        )
    return gr.State(time_to_live=KEEP_S), image, upload, gallery


def _image(label: str, name: str) -> gr.Image:
    looks: dict[str, Any] = {"height": 280, "format": "png", "buttons": ["download"], "elem_classes": "picture"}
    return gr.Image(label=label, elem_id=name, interactive=False, **looks)


def _seed(label: str = "Seed") -> gr.Number:
    return gr.Number(0, label=label, precision=0, minimum=0, maximum=2**31)


def _decoding_options(tok: FlexTok, usual: Decoding, with_seed: bool = False) -> list[Any]:
    """Steps, guidance and its scale, and the seed if wanted."""
    flow = tok.config.objective != "mse"
    with gr.Accordion("Options of decoding", open=False), gr.Row():
        steps = gr.Slider(1, 100, usual.num_steps, step=1, label="Steps", interactive=flow)
        kind = gr.Dropdown([*GUIDANCE_KINDS], value=usual.guidance, label="Guidance", interactive=flow)
        scale = gr.Slider(1, 20, usual.guidance_scale, step=0.5, label="Guidance scale", interactive=flow)
        return [steps, kind, scale, *([_seed("Seed of the noise")] if with_seed else [])]


def _strip(tokens: Sequence[tuple[int, str]]) -> str:
    """The tokens of a picture as HTML, coloured by their source."""
    chips = "".join(
        f'<span class="{source}" title="token {i + 1}">{token}</span>' for i, (token, source) in enumerate(tokens)
    )
    names = {"first": "of picture A", "second": "of picture B"}
    counts = {name: sum(source == name for _, source in tokens) for name in ("first", "second", "cut")}
    legend = "".join(f'<i class="{name}"></i>{counts[name]} {what}' for name, what in names.items() if counts[name])
    cut = f"; {counts['cut']} cut" if counts["cut"] else ""
    return f'<div class="legend">Tokens: {legend}{cut}</div><div class="tokens">{chips}</div>'


def _asked(models: Models) -> Any:
    """The input for the prior's condition."""
    known = models.known
    if known.kind == "text":
        return gr.Textbox(label="What to draw", placeholder="a red apple", lines=2, max_length=1000)
    if known.kind == "class":
        names = [*known.class_names] or [str(number) for number in range(known.num_classes)]
        return gr.Dropdown(names, value=names[0], label="Class")
    return gr.State(None)


def _sampling_options(models: Models) -> list[Any]:
    """Guidance and temperature of the prior."""
    own = models.published
    scale = 1.5 if own.cfg_scale is None else own.cfg_scale
    temperature = 0.6 if own.temperature is None else own.temperature
    return [
        gr.Slider(1, 10, scale, step=0.1, label="Guidance of the prior (1: none)"),
        gr.Slider(0, 2, temperature, step=0.05, label="Temperature (0: the most likely token)"),
    ]


def _generate_tab(models: Models, usual: Decoding) -> None:
    tok, own = models.tokenizer, models.published
    most = tok.num_registers
    drawn = gr.State(time_to_live=KEEP_S)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            asked = _asked(models)
            samples = gr.Slider(1, 8, 4, step=1, label="Pictures")
            seed = _seed()
            with gr.Accordion("Options of the prior", open=False):
                sampling = _sampling_options(models)
                sampling.append(gr.Slider(0, 500, own.top_k or 0, step=1, label="Top k (0: all tokens)"))
                sampling.append(gr.Slider(0.05, 1, own.top_p or 1, step=0.05, label="Top p (1: all tokens)"))
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2, min_width=280):
            gallery = gr.Gallery(
                label="Pictures",
                columns=4,
                height=420,
                interactive=False,
                format="png",
                buttons=["download"],
                elem_id="drawn",
                elem_classes="picture",
            )
            kept = gr.Slider(1, most, most, step=1, label="Tokens decoded")
    decoding = _decoding_options(tok, usual)

    def draw(asked: str | None, samples: int, seed: int | None, *sampling: Any) -> tuple[Any, int]:
        scale, temperature, top_k, top_p = sampling
        with _errors_shown():
            tokens = work.drawn(models, asked, samples, seed or 0, scale, temperature, top_k or None, top_p)
        return tokens, seed or 0

    def decode(drawn: tuple[Any, int] | None, kept: int, *options: Any) -> Any:
        if drawn is None:
            return gr.skip()
        tokens, seed = drawn
        with _errors_shown():
            return work.decoded(tok, tokens[:, :kept], Decoding(*options), seed)

    inputs = [drawn, kept, *decoding]
    made = button.click(draw, [asked, samples, seed, *sampling], drawn, show_progress_on=gallery, **QUEUED)
    made.success(decode, inputs, gallery, **QUEUED)
    gr.on([each.change for each in inputs[1:]], decode, inputs, gallery, **LIVE)


def _search_tab(models: Models, usual: Decoding, verifiers: Mapping[str, BaseVerifier]) -> None:
    most = models.prior.num_tokens
    algorithms = [("Best of N", "best_of_n"), ("Beam search", "beam"), ("Lookahead search", "lookahead")]
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            asked = _asked(models)
            algorithm = gr.Dropdown(algorithms, value="beam", label="Algorithm")
            verifier = gr.Dropdown([*verifiers], value=[*verifiers][-1], label="Verifier")
            candidates = gr.Slider(1, 32, 4, step=1, label="Candidates")
            width = gr.Slider(1, 8, 3, step=1, label="Beam width")
            tokens = gr.Slider(1, most, min(16, most), step=1, label="Tokens")
            seed = _seed()
            with gr.Accordion("Options of the prior", open=False):
                sampling = _sampling_options(models)
            with gr.Row():
                button, stop = gr.Button("Search", variant="primary"), gr.Button("Stop")
        with gr.Column(scale=2, min_width=280):
            best, status = _image("Best picture so far", "best"), gr.HTML()
            gr.Markdown("What each step kept, with scores; lines lead from each sequence to those that extend it.")
            tree = gr.Image(show_label=False, elem_id="tree", interactive=False, format="png", buttons=["fullscreen"])
    decoding = _decoding_options(models.tokenizer, usual)

    def search(
        asked: str | None,
        algorithm: str,
        verifier: str,
        candidates: int,
        width: int,
        tokens: int,
        seed: int,
        *more: Any,
    ) -> Iterator[tuple[Any, str, Any]]:
        yield None, "<p>Searching ...</p>", None
        with _errors_shown():
            options = SearchOptions(
                algorithm=algorithm,  # type: ignore[arg-type]
                num_candidates=candidates,
                beam_width=width,
                max_tokens=tokens,
                cfg_scale=more[0],
                temperature=more[1],
                decoding=Decoding(*more[2:]),
                seed=seed or 0,
            )
            with closing(work.searched(models, verifiers[verifier], asked, options)) as found:
                for each in found:
                    yield each.image, _status(each), each.tree

    chosen = [asked, algorithm, verifier, candidates, width, tokens, seed, *sampling, *decoding]
    event = button.click(search, chosen, [best, status, tree], show_progress="hidden", **QUEUED)
    stop.click(None, None, None, cancels=[event], **PAGE_ONLY)


def _status(found: work.Found) -> str:
    """Progress and cost of a search as HTML."""
    cost = found.cost
    facts = {
        "score": format_value(found.score),
        "tokens": found.num_tokens,
        "prior positions": cost.prior_positions,
        "decoder calls": cost.decoder_calls,
        "decoded pictures": cost.decoded_images,
        "scored candidates": cost.verifier_calls,
    }
    shown = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts.items())
    progress = f'<div class="bar"><div style="width: {100 * found.steps / found.of_steps:.0f}%"></div></div>'
    return f'<div class="costs">Step {found.steps} of {found.of_steps}{progress}{shown}</div>'
