"""Speed and memory against the published implementation (apple/ml-flextok, the package `flextok`).

Both have the same random weights: `save_pretrained` writes ours, and the published loader reads them. A preset with
another autoencoder gets the published kind. They are first compared, in float32 and from the same noise. Then they take
turns at

- `tokenize`: images to few and to all tokens, with the autoencoder;
- `detokenize`: tokens to images at several budgets, and at one budget for each image, in equal strata of 1..K. It
  includes the autoencoder, and takes Euler steps with adaptive projected guidance at 7.5 as published;
- `train`: forward and backward pass on latents, without an optimizer, under laws of the budgets. Both draw times, null
  conditions and budgets. Ours draws in equal strata, so that few steps show the mean; the published cost does not
  depend on the draws. `memory_gib` is the most that a step allocates: activations and gradients (CUDA only).

TF32 is off. Precision, also of the autoencoder, and activation checkpointing are the same on both sides. The published
attention is a compiled FlexAttention, or SDPA with materialised masks (`--official-attention sdpa`). FlexAttention
compiles again for every shape and mask. This happens in the warm-up round, and dynamo's limit is raised so that it
never falls back to eager.

    git clone https://github.com/apple/ml-flextok && git -C ml-flextok checkout 87d00cc && pip install -e ml-flextok
    python benchmarks/official.py --batch-size 4 --json benchmarks/results/official_cpu.json
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from report import median_seconds, peak_gib, write_results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.flow.nested_dropout import BUDGET_LAWS, budgets_from_uniform
from flextok_pl.layers.blocks import compile_for_all_lengths
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.tokenizer import FlexTok

PARTS = ("tokenize", "detokenize", "train")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--preset", default="d12_d12")
parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--budgets", type=int, nargs="*", default=[8, 256])
parser.add_argument("--laws", nargs="+", default=["uniform", "pow2"], choices=BUDGET_LAWS)
parser.add_argument("--steps", type=int, default=25, help="Euler steps of a decoding")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="autocast to this type")
parser.add_argument("--compile", action="store_true", help="torch.compile every block of ours for training")
parser.add_argument("--checkpointing", action="store_true", help="recompute activations, on both sides")
parser.add_argument("--official-attention", choices=["flex", "sdpa"], help="default: flex on CUDA, sdpa on a CPU")
parser.add_argument("--profile", action="store_true", help="report the training step's seconds by kind of operation")
parser.add_argument("--json", default=None, help="file to write the results to")


def our_tokenizer(preset: str, law: str) -> FlexTok:
    """Random weights, also for those that training initialises to zero."""
    config = dataclasses.replace(FlexTokConfig.preset(preset), nested_dropout=law)
    vae = VAEConfig(latent_channels=config.latent_channels)  # architecture that the published package builds
    torch.manual_seed(0)
    tokenizer = FlexTok(dataclasses.replace(config, vae=vae)).eval()
    for parameter in tokenizer.decoder.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return tokenizer


def official_twin(tokenizer: FlexTok, attention: str, checkpointing: bool) -> Any:
    """The published model with our weights."""
    try:
        from flextok.utils.checkpoint import load_safetensors
        from hydra.utils import instantiate
    except ImportError as error:
        raise SystemExit(
            f"{error}: this benchmark needs the published package; run `git clone https://github.com/apple/ml-flextok` "
            "and `pip install -e ml-flextok`"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        tensors, config = load_safetensors(tokenizer.save_pretrained(folder, format="official"))
    for side, trunk in (("encoder", "enc_transformer"), ("decoder", "dec_transformer")):
        config[side]["module_dict"][trunk]["use_act_checkpoint"] = checkpointing
    official = instantiate(config)
    official.load_state_dict(tensors)
    for module in official.modules() if attention == "sdpa" else ():
        module.use_flex_attention, module.return_materialized_mask = False, True  # for attention and packers
    return official.eval()


@torch.no_grad()
def official_tokens(official: Any, images: Tensor, budget: int) -> Tensor:
    """Compute all tokens and take the first, as the published code requires."""
    return torch.cat(official.tokenize(images))[:, :budget]


def our_images(tokenizer: FlexTok, tokens: Sequence[Tensor], steps: int) -> Tensor:
    generator = torch.Generator(tokens[0].device).manual_seed(0)
    return tokenizer.detokenize(tokens, None, steps, "apg", 7.5, generator)


@torch.no_grad()
def official_images(official: Any, tokens: Sequence[Tensor], steps: int, side: int) -> Tensor:
    generator = torch.Generator(tokens[0].device).manual_seed(0)
    recipe = {"guidance_scale": 7.5, "perform_norm_guidance": True, "verbose": False}
    return official.detokenize([row[None] for row in tokens], side, timesteps=steps, generator=generator, **recipe)


def our_loss(tokenizer: FlexTok, config: FlexTokConfig, latents: Tensor, generator: torch.Generator) -> Tensor:
    return flow_loss(tokenizer, latents, sample_draws(config, latents, generator, stratified_budgets=True)).loss.mean()


def official_loss(official: Any, latents: Tensor) -> Tensor:
    noise = official.flow_matching_noise_module
    batch = {noise.clean_images_read_key: list(latents.split(1))}
    for part in (official.encoder, official.regularizer, noise, official.decoder):
        batch = part(batch)
    velocity = torch.cat(batch[official.pipeline.reconst_write_key])
    return (velocity.float() - (torch.cat(batch[noise.noise_write_key]) - latents)).square().mean()


def compare(tokenizer: FlexTok, official: Any, images: Tensor) -> dict[str, float]:
    """Differences of both: in all tokens, and in images decoded from the same tokens in two steps."""
    tokens, theirs = tokenizer.tokenize(images), official_tokens(official, images, tokenizer.num_registers)
    kept = [row[: tokenizer.num_registers // 4 + i] for i, row in enumerate(tokens)]
    decoded = our_images(tokenizer, kept, 2)
    difference = (decoded - official_images(official, kept, 2, tokenizer.latent_size[0])).abs().max().item()
    agreement = {
        "share_of_equal_tokens": (tokens == theirs).double().mean().item(),
        "distinct_tokens": len(tokens.unique()),
        "largest_image_difference": difference,
        "largest_image_value": decoded.abs().max().item(),
    }
    if agreement["share_of_equal_tokens"] < 0.95 or not difference < 0.01 * agreement["largest_image_value"]:
        raise SystemExit(f"the two implementations differ: {agreement}")
    return agreement


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_softmax"),
    "norms": ("aten::native_layer_norm",),
}


def profiled(call: Callable[[], object], device: str) -> dict[str, float]:
    """Seconds of a call by kind of operation; the rest is elementwise, or moves data."""
    call()
    with profile(activities=[ProfilerActivity.CUDA if device.startswith("cuda") else ProfilerActivity.CPU]) as profiler:
        call()
    seconds = dict.fromkeys([*KINDS, "elementwise and copies"], 0.0)
    for event in profiler.key_averages():
        name = next((name for name, starts in KINDS.items() if event.key.startswith(starts)), "elementwise and copies")
        time = event.self_device_time_total if device.startswith("cuda") else event.self_cpu_time_total
        seconds[name] += time / 1e6
    return seconds


def allocated_gib(call: Callable[[], object]) -> float:
    """Peak of the memory that a call allocates."""
    torch.cuda.reset_peak_memory_stats()
    before = peak_gib("cuda")
    call()
    return peak_gib("cuda") - before


def main() -> None:
    options = parser.parse_args()
    if options.dtype != "float32" and options.parts != ["train"]:
        parser.error("tokenize and detokenize compute in float32 only: add --parts train to another --dtype")
    device, batch = options.device, options.batch_size
    options.official_attention = options.official_attention or ("flex" if device.startswith("cuda") else "sdpa")
    torch.backends.cudnn.allow_tf32 = False  # off by default for matrix products
    torch._dynamo.config.recompile_limit = 64
    tokenizer = our_tokenizer(options.preset, options.laws[0])
    official = official_twin(tokenizer, options.official_attention, options.checkpointing).to(device)
    tokenizer.to(device)
    side, registers, generator = tokenizer.latent_size[0], tokenizer.num_registers, torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *[side * official.downsample_factor] * 2, generator=generator).to(device) * 2 - 1
    tokens = torch.randint(tokenizer.config.vocab_size, (batch, registers), generator=generator).to(device)
    latents = torch.randn(batch, tokenizer.config.latent_channels, side, side, generator=generator).to(device)
    results: dict[str, Any] = {"agreement_in_float32": compare(tokenizer, official, images)}
    official.vae.dtype_override = getattr(torch, options.dtype)

    def cast(call: Callable[..., Any], *arguments: Any) -> Any:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            return call(*arguments)

    def step(model: nn.Module, loss: Callable[..., Any], *arguments: Any) -> None:
        cast(loss, model, *arguments).backward()
        model.zero_grad()

    def race(part: str, pairs: Mapping[str, tuple[Callable[[], object], Callable[[], object]]]) -> None:
        """Time ours against the official implementation for each pair."""
        sides = ("ours", "official")
        calls = {f"{name} {who}": call for name, pair in pairs.items() for who, call in zip(sides, pair, strict=True)}
        # A decoding of many steps needs no warm-up round on a CPU.
        warm_up = part != "detokenize" or device.startswith("cuda")
        times = median_seconds(calls, options.repeats, device, warm_up)
        results[part] = {}
        for name in pairs:
            seconds = {who: times[f"{name} {who}"] for who in sides}
            row = {"seconds": seconds, "images_per_second": {who: batch / time for who, time in seconds.items()}}
            if part == "train" and device.startswith("cuda"):
                row["memory_gib"] = {who: allocated_gib(calls[f"{name} {who}"]) for who in sides}
            results[part][name] = {**row, "speedup_over_official": seconds["official"] / seconds["ours"]}
        print(part, results[part], flush=True)

    budgets = sorted({min(budget, registers) for budget in options.budgets})
    if "tokenize" in options.parts:
        calls = ((k, tokenizer.tokenize, official_tokens) for k in budgets)
        race(
            "tokenize",
            {f"k={k}": (partial(ours, images, k), partial(theirs, official, images, k)) for k, ours, theirs in calls},
        )
    if "detokenize" in options.parts:
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        mixed = budgets_from_uniform("uniform", registers, strata).tolist()
        rows = {f"k={k}": list(tokens[:, :k]) for k in budgets}
        rows["mixed"] = [row[:k] for row, k in zip(tokens, mixed, strict=True)]
        results["mixed_budgets"] = mixed
        race(
            "detokenize",
            {
                name: (
                    partial(our_images, tokenizer, each, options.steps),
                    partial(official_images, official, each, options.steps, side),
                )
                for name, each in rows.items()
            },
        )
    if "train" in options.parts:
        tokenizer.train().checkpoint_activations(options.checkpointing)
        official.train()
        if options.compile:
            for part in (tokenizer.encoder, tokenizer.decoder):
                compile_for_all_lengths(part.blocks)
        pairs = {}
        for law in options.laws:
            config = dataclasses.replace(tokenizer.config, nested_dropout=law)
            pairs[law] = (
                partial(step, tokenizer, our_loss, config, latents, torch.Generator().manual_seed(1)),
                partial(step, official, official_loss, latents),
            )
        race("train", pairs)
        if options.profile:
            for law, (ours, theirs) in pairs.items():
                results["train"][law]["profile"] = {
                    "ours": profiled(ours, device),
                    "official": profiled(theirs, device),
                }
    write_results("official", vars(options), results, options.json)


if __name__ == "__main__":
    main()
