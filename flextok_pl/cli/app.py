"""`flextok app`: a page in the browser to resample, generate and search."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from flextok_pl.app.page import build_page, launch
from flextok_pl.app.work import example_pictures
from flextok_pl.assets import EXAMPLES
from flextok_pl.cli.search import UNIFORM, RunOptions, load_models
from flextok_pl.cli.tool import instances
from flextok_pl.cli.tools import picture_size
from flextok_pl.flow.decoding import chosen_decoding
from flextok_pl.progress import say
from flextok_pl.search.verifier_options import VerifierOptions, build_verifiers
from flextok_pl.search.verifiers import Likelihood


@dataclass(frozen=True)
class AppOptions:
    """Try a tokenizer and a prior on a page in your browser.

    The page resamples your pictures at any number of tokens, and swaps tokens between two of them. It generates
    pictures by class or text, and searches for those that a verifier scores best. `--verifier` and its options add
    verifiers to `likelihood`. Only this machine can open the page, unless you give a host. The page loads nothing from
    elsewhere and sends nothing there. It deletes uploads after an hour, and when the command ends.

    Args:
        tokenizer: a `.safetensors` file, a folder or a Hub id; default the prior's tokenizer, else the demo tokenizer.
        prior: a `.safetensors` file, a folder or a Hub id; default the demo prior. With a tokenizer and no prior the
            page only resamples.
        text_encoder: replaces the prior's own, for example by a local copy of it.
        examples: folder of pictures, or shard set, whose first pictures the page offers; default some demo pictures
            that the demo tokenizer has not seen.
        host: address to listen at. With 0.0.0.0 everyone who reaches this machine can use the page, without a password.
        port: default the first free port from 7860 on.
        device: default a GPU if available.
    """

    tokenizer: str | None = None
    prior: str | None = None
    text_encoder: str | None = None
    examples: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be in 1..65535")


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok app` until it is interrupted."""
    (given, verifiers), _ = instances(command, arguments, AppOptions, VerifierOptions)
    prior = UNIFORM if given.prior is None and given.tokenizer is not None else given.prior
    models = load_models(
        RunOptions(prior=prior, tokenizer=given.tokenizer, text_encoder=given.text_encoder, device=given.device)
    )
    tok, size = models.tokenizer, picture_size(models.tokenizer)
    decoding = chosen_decoding(tok.config, chosen_decoding(models.published)).under(tok.config.objective)
    built = build_verifiers(verifiers, (), models.known, tok, size, decoding, tok.device)
    examples = example_pictures(given.examples or str(EXAMPLES), size, 8, tok.image_channels)
    page = build_page(models, size, decoding, {each.name: each for each in (Likelihood(), built)}, examples)
    address = launch(page, given.host, given.port)
    if given.host not in ("127.0.0.1", "::1", "localhost"):
        say(f"host={given.host}: everyone who reaches this machine can use the page, without a password")
    print(f"{address}: open this page in a browser; Ctrl+C ends it", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it also deletes what was uploaded
    page.block_thread()
