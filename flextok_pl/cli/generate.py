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
"""Defaults of those options of the prior that a published prior may also set."""


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

    A picture depends only on its condition, the seed and its number within the condition. Options of the prior that you
    do not give come from a published prior's configuration, else from the defaults below. Options of the decoder come
    from the tokenizer's own settings, else from that configuration, else from the defaults.

    Args:
        classes: number or name of a class, for a class prior; `--class` may be given several times. Default all classes
            of up to 16, else the first 8.
        texts: a text, for a text prior; `--text` may be given several times. The empty text means no condition.
        prior: a `.safetensors` file from a training, or a published prior as a folder or Hub id such as
            `EPFL-VILAB/FlexAR-1B-C2I`; default the packaged demo prior.
        tokenizer: tokenizer of the prior's tokens; default the one that the prior names, else the demo tokenizer.
        budgets: numbers of tokens, such as 1,8,64; default 1, 2, 4, ... up to all.
        samples: pictures per condition.
        cfg_scale: guidance scale of the prior, 1 for none: a number, or numbers to interpolate over the token
            positions; default 1.5.
        temperature: sampling temperature of the prior; 0 takes the most likely token; default 1.
        top_k: sample from the k most likely tokens; default all.
        top_p: sample from the fewest most likely tokens that together have this probability; default all.
        guidance: guidance of the decoder: `none`, `cfg` or `apg`; default `apg`.
        guidance_scale: guidance scale of the decoder, 1 for none; default 7.5.
        num_steps: steps of the decoder; default 25.
        guidance_interval: flow times (low, high] at which to guide the decoder, such as [0.2,0.8], with 1 for noise;
            default all.
        seed: seed of tokens and noise.
        out: PNG file to write: one row per picture, one column per budget.
        text_encoder: replaces the prior's own, for example by a local copy of it.
        device: default a GPU if available.
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
    target = Path(out)
    names = [prompt.text or (f"class {prompt.label}" if known.kind == "class" else "") for prompt in prompts]
    save_png(image_grid(images.items(), names), target)
    print(f"{target}: pictures: {len(prompts)}, at {wanted} tokens")
