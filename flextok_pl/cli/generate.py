"""`flextok generate`: images from classes or texts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from flextok_pl.assets import DEMO_PRIOR, DEMO_TOKENIZER
from flextok_pl.cli.tools import checked_budgets, default_device
from flextok_pl.evaluation.generation import as_condition
from flextok_pl.evaluation.pictures import image_grid, save_png
from flextok_pl.flow.decoding import chosen_decoding
from flextok_pl.modules.saved import SavedPrior
from flextok_pl.search.prompts import Conditions, prompts_from_options

SAMPLING = {"cfg_scale": 1.5, "temperature": 1.0, "top_k": None, "top_p": None}
"""Defaults of the options of the prior that a published one may set, too."""


def generate_images(
    classes: list[str] | None = None,
    texts: list[str] | None = None,
    prior: str | None = None,
    tokenizer: str | None = None,
    budgets: str | None = None,
    samples: int = 1,
    cfg_scale: float | list[float] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: Literal["none", "cfg", "apg"] | None = None,
    guidance_scale: float | None = None,
    num_steps: int | None = None,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    out: str = "grid.png",
    text_encoder: str | None = None,
    device: str | None = None,
) -> None:
    """Generate images, decode each from several numbers of its tokens, and draw all in one picture.

    A picture depends on its condition, the seed and its number among those of its condition only. Options of the prior
    that are not given are those that a published prior's configuration names, those of the decoder what the tokenizer
    was made for, or what that configuration names, or else the defaults below.

    Args:
        classes: number or name of a class, for a prior of classes (or `--class`, once or several times); default all
            of up to 16 classes, else the first 8.
        texts: a text, for a prior of texts (or `--text`, once or several times); the empty text is no condition.
        prior: a `.safetensors` file that training left, or a published prior, as a folder or Hub id such as
            `EPFL-VILAB/FlexAR-1B-C2I`; default the demo prior of this package.
        tokenizer: the tokenizer whose tokens it knows; default the one that the prior names, else the demo tokenizer.
        budgets: numbers of tokens, such as 1,8,64; default 1, 2, 4, ... up to all.
        samples: pictures of each condition.
        cfg_scale: guidance of the prior, 1 for none: a number, or numbers to interpolate over the token positions;
            default 1.5.
        temperature: of the prior; 0 takes the most likely token; default 1.
        top_k: draw from the k most likely tokens; default all.
        top_p: draw from the fewest most likely tokens that have this probability together; default all.
        guidance: of the decoder: `none`, `cfg` or `apg`; default `apg`.
        guidance_scale: its strength; 1 is none; default 7.5.
        num_steps: steps of the decoder; default 25.
        guidance_interval: (low, high]: flow times at which to guide the decoder, such as [0.2,0.8], 1 being noise;
            default all.
        seed: of tokens and noise.
        out: PNG file to write: one row per picture, one column per budget.
        text_encoder: in place of the prior's own, such as a local copy of it.
        device: default a GPU where there is one.
    """
    module = SavedPrior(prior or str(DEMO_PRIOR), tokenizer, text_encoder, str(DEMO_TOKENIZER))
    module = module.eval().to(default_device(device))
    published = module.prior.config.generation
    sampling = published.or_given(SAMPLING, cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    decoding = chosen_decoding(
        module.reconstructor.config,
        chosen_decoding(published),
        guidance=guidance,
        guidance_scale=guidance_scale,
        num_steps=num_steps,
        guidance_interval=guidance_interval,
    )
    wanted = checked_budgets(budgets, module.prior.num_tokens)
    known = Conditions(module.condition_kind, module.num_classes, module.class_names)
    prompts = prompts_from_options(known, classes, texts, samples=samples)
    seeds = [seed + i % samples for i in range(len(prompts))]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    tokens = module.generate_tokens(as_condition(known.kind, prompts), **sampling, generator=generators)
    images = {
        budget: module.reconstructor.detokenize(
            tokens,
            num_tokens=budget,
            **decoding.arguments,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        ).cpu()
        for budget in wanted
    }
    target = Path(out).expanduser()
    names = [prompt.text or (f"class {prompt.label}" if known.kind == "class" else "") for prompt in prompts]
    save_png(image_grid(images.items(), names), target)
    print(f"{target}: pictures: {len(prompts)}, at {wanted} tokens")
