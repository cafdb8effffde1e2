"""The model card: README.md, with metadata for the Hub (https://huggingface.co/docs/hub/model-cards) and a text.

It states what was recorded, and says so if something was not.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.interop.hub import HubId
from flextok_pl.records import Record
from flextok_pl.sharing.publication import Publication
from flextok_pl.sharing.run import RunFacts, without_places
from flextok_pl.sharing.usage import usage

LIBRARY = "flextok_pl"

OPTIONS = {
    "trainer.max_steps": "Steps",
    "trainer.max_epochs": "Epochs",
    "global_batch_size": "Global batch",
    "data.batch_size": "Batch of a device",
    "trainer.accumulate_grad_batches": "Accumulated batches",
    "model.init_args.lr": "Learning rate",
    "model.init_args.betas": "Betas",
    "model.init_args.weight_decay": "Weight decay",
    "model.init_args.warmup_steps": "Warm-up steps",
    "ema.decay": "Decay of the weights' average",
    "trainer.precision": "Precision",
    "seed_everything": "Seed",
}
"""Option of a run -> its name in the card."""

CITATION = """@inproceedings{bachmann2025flextok,
  title = {{FlexTok}: Resampling Images into {1D} Token Sequences of Flexible Length},
  author = {Bachmann, Roman and Allardice, Jesse and Mizrahi, David and Fini, Enrico and
            Kar, O{\\u{g}}uzhan Fatih and Amirloo, Elmira and El-Nouby, Alaaeldin and
            Zamir, Amir and Dehghan, Afshin},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  url = {https://arxiv.org/abs/2502.13967},
}"""

_BESIDE = ("metric", "value", "num_tokens", "bits_per_image")  # fields of a record beside its protocol
_MOST_NAMES = 20


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model, for its card."""

    config: FlexTokConfig | PriorConfig | VAEConfig
    sizes: Mapping[str, int]  # part -> its number of weights
    dtype: str  # of the published weights
    digest: str  # `weights_hash` in float32
    format: str  # of the files

    @property
    def kind(self) -> Literal["tokenizer", "prior", "autoencoder"]:
        """What the model is."""
        if isinstance(self.config, PriorConfig):
            return "prior"
        return "tokenizer" if isinstance(self.config, FlexTokConfig) else "autoencoder"

    @property
    def task(self) -> str:
        """The Hub's task that is nearest to what the model does."""
        if isinstance(self.config, PriorConfig):
            return "text-to-image" if self.config.text_width is not None else "unconditional-image-generation"
        return "image-to-image"

    @property
    def base(self) -> HubId | None:
        """The Hub's model that its training started from."""
        note = re.match(r"(\S+@[0-9a-f]{40})\b", getattr(self.config, "started_from", ""))
        return None if note is None else HubId.parse(note[1])


def model_card(given: Publication, model: ModelFacts, run: RunFacts) -> str:
    """Write the text of README.md."""
    matter = yaml.safe_dump(front_matter(given, model, run), sort_keys=False, allow_unicode=True, width=120)
    pictures = [f"![{text}]({file.name})\n\n*{text}.*" for file, text in run.pictures.items()]
    parts = [
        f"---\n{matter}---",
        f"# {given.title}",
        _summary(model),
        *pictures[:1],
        f"## How to use\n\n{usage(given.address, model.config)}",
        "## Results",
        *_results(run.records),
        *pictures[1:],
        f"## Training data\n\n{_data(given, run)}",
        f"## Training\n\n{_training(model, run)}",
        f"## The model\n\n{_model(model)}",
        f"## Licence\n\n{_licence(given)}",
        f"## Citation\n\nThe method is FlexTok, by Apple and EPFL. This model was trained with other code, {LIBRARY}.",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(given: Publication, model: ModelFacts, run: RunFacts) -> dict[str, Any]:
    """The metadata of a card, for the Hub."""
    data, base = HubId.parse(given.data or ""), model.base
    found: dict[str, Any] = {
        "license": given.license,
        "license_name": "other" if given.license_link else None,
        "license_link": given.license_link,
        "library_name": LIBRARY,
        "pipeline_tag": model.task,
        "tags": ["flextok", f"image-{model.kind}"],
        "datasets": None if data is None else [data.repository],
        "base_model": None if base is None else base.repository,
        "base_model_relation": None if base is None else "finetune",
        "model-index": [{"name": given.title, "results": [_measured(model, run.records)]}] if run.records else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _measured(model: ModelFacts, records: Sequence[Record]) -> dict[str, Any]:
    """Results in the form of the Hub's model-index."""
    name = str(without_places(records[0].get("reference")) or "images")
    metrics = [
        {"type": r["metric"], "value": r["value"], "name": f"{r['metric']}, tokens: {r['num_tokens']}"} for r in records
    ]
    task = {"type": model.task, "name": "Generation" if model.kind == "prior" else "Reconstruction"}
    return {
        "task": task,
        "dataset": {"name": name, "type": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")},
        "metrics": metrics,
    }


def _summary(model: ModelFacts) -> str:
    config, count = model.config, _count(sum(model.sizes.values()))
    if isinstance(config, VAEConfig):
        side = config.downsampling
        return (
            f"An image autoencoder: a latent position of {config.latent_channels} channels represents {side} x {side} "
            f"pixels. {count} parameters."
        )
    vocabulary = f"a vocabulary of {config.vocab_size:,}"
    if isinstance(config, PriorConfig):
        kind = f"{config.num_classes} classes" if config.num_classes else "no condition"
        return (
            f"An autoregressive prior over the tokens of a [FlexTok](https://arxiv.org/abs/2502.13967) tokenizer, for "
            f"{'texts' if config.text_width is not None else kind}: up to {config.num_tokens} tokens of {vocabulary}. "
            f"Any number of the first ones decodes to a picture. {count} parameters."
        )
    side = config.patch_size * (1 if config.vae is None else config.vae.downsampling)
    what = "latents" if config.vae is None else "pictures"
    sizes = " or ".join(f"{side * rows} x {side * columns}" for rows, columns in config.grids)
    return (
        f"An image tokenizer, [FlexTok](https://arxiv.org/abs/2502.13967): {what} of {sizes} "
        f"become 1 to {config.num_registers} ordered tokens of {vocabulary}, and any number of the first ones decodes "
        f"to a picture. {count} parameters."
    )


def _results(records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No evaluation of these weights was recorded."]
    metrics = list(dict.fromkeys(record["metric"] for record in records))
    values: dict[int, dict[str, float]] = {}
    for record in records:
        values.setdefault(record["num_tokens"], {})[record["metric"]] = record["value"]
    rows = [
        [str(budget), *(f"{found[metric]:.4g}" if metric in found else "" for metric in metrics)]
        for budget, found in values.items()
    ]
    shared = {name: value for name, value in records[0].items() if all(r.get(name) == value for r in records)}
    facts = {name: value for name, value in without_places(shared).items() if name not in _BESIDE}
    settings = _table(["setting", "value"], [[name, f"`{json.dumps(value)}`"] for name, value in facts.items()])
    few = dict.fromkeys(r["metric"] for r in records if r.get("full_rank") is False)
    note = f" {', '.join(few)}: compare only values of as many images; the covariance is singular." if few else ""
    return [
        _protocol(facts) + note,
        _table(["tokens", *metrics], rows, numbers=True),
        f"<details><summary>The whole protocol</summary>\n\n{settings}\n\n</details>",
    ]


def _protocol(facts: Mapping[str, Any]) -> str:
    size = facts.get("image_size")
    parts = [
        f"{facts.get('num_samples')} images" + (f" of {size[0]} x {size[1]} px" if isinstance(size, list) else ""),
        f"reference {facts['reference']}" if facts.get("reference") else "",
        f"{facts.get('num_steps')} {facts.get('solver')} steps",
        f"guidance {facts.get('guidance')} {facts.get('guidance_scale')}",
        f"features of {facts.get('extractor')} (weights {facts.get('extractor_weights_hash')})",
        f"seed {facts.get('seed')}",
    ]
    partial = "" if facts.get("complete", True) else "Only a part of the images was measured. "
    said = "; ".join(part for part in parts if part)
    return f"Protocol: {said}. {partial}Compare only numbers of the same protocol."


def _data(given: Publication, run: RunFacts) -> str:
    name = given.data or re.sub(r"/(train|all)$", "", str(without_places(run.train)))
    known = f"[{name}](https://huggingface.co/datasets/{name})" if HubId.parse(given.data or "") else f"{name}"
    size, side, classes = (run.data.get(key) for key in ("num_samples", "image_size", "classes"))
    lines = [
        f"Data: {known or 'not recorded'}",
        f"Samples: {f'{size:,}' if size else 'not recorded'}",
        f"Size of the pictures: {side} px" if side else "",
        f"Classes: {_names(classes)}" if classes else "",
        f"Licence: {given.data_license}",
        *(f"Credit: {credit}" for credit in run.credits),
    ]
    return _list(lines)


def _training(model: ModelFacts, run: RunFacts) -> str:
    started = without_places(getattr(model.config, "started_from", ""))
    values = {name: _at(run.config, path) for path, name in OPTIONS.items()}
    lines = [
        f"Started from: {started or ('new weights' if run.config else 'not recorded')}",
        *(f"{name}: {value}" for name, value in values.items() if value not in (None, -1)),
        "" if run.config else "Options: not recorded",
        f"Cost: {_cost(run.attempts)}",
    ]
    return _list(lines)


def _cost(attempts: Sequence[Mapping[str, Any]]) -> str:
    if not attempts:
        return "not recorded"
    hours = sum(each["seconds"] * each["devices"] for each in attempts) / 3600
    steps, last = sum(each["to_step"] - each["from_step"] for each in attempts), max(e["to_step"] for e in attempts)
    devices = ", ".join(dict.fromkeys(f"{each['devices']} x {each['device']}" for each in attempts))
    missing = "" if steps >= last else f"; further {last - steps:,} steps were not recorded"
    return f"{hours:.3g} device hours on {devices} for {steps:,} steps, validations included{missing}"


def _model(model: ModelFacts) -> str:
    config = dataclasses.asdict(model.config)
    parts = ", ".join(f"{part} {_count(size)}" for part, size in model.sizes.items())
    rows = [["Parameters", _count(sum(model.sizes.values())) + (f" ({parts})" if len(model.sizes) > 1 else "")]]
    rows.append(["Weights", f"{model.dtype}, format `{model.format}`"])
    rows.append(["Hash of the weights in float32", f"`{model.digest}`"])
    if isinstance(model.config, FlexTokConfig) and model.config.num_steps is not None:
        guidance = f"{model.config.guidance} {model.config.guidance_scale}"
        rows.append(["Made to decode in", f"{model.config.num_steps} steps, guidance {guidance}"])
    if isinstance(model.config, PriorConfig):
        name, digest = without_places(model.config.tokenizer_id), model.config.tokenizer
        rows.append(["Tokenizer", f"{name or 'not recorded by name'}" + (f", hash `{digest}`" if digest else "")])
        if len(model.config.class_names) > _MOST_NAMES:
            config["class_names"] = f"{len(model.config.class_names)} names"
    text = json.dumps(without_places(config), indent=1)
    shown = f"<details><summary>Configuration</summary>\n\n```json\n{text}\n```\n\n</details>"
    return f"{_table(['', ''], rows)}\n\n{shown}"


def _licence(given: Publication) -> str:
    link = f" ([text]({given.license_link}))" if given.license_link else ""
    return _list([f"Weights: {given.license}{link}", f"Training data: {given.data_license}"])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)}, such as {', '.join(names[:3])}"


def _at(values: Mapping[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines if line)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table, numbers to the right; bars within cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [heads, *rows]]
    return "\n".join([lines[0], "|" + ("---:|" if numbers else "---|") * len(heads), *lines[1:]])
