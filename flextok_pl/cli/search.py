"""`flextok search`: find images by a search at test time; `flextok search measure`: measure their quality and cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from flextok_pl.assets import DEMO_PRIOR, DEMO_TOKENIZER
from flextok_pl.backbones.classifier import TimmClassifier
from flextok_pl.backbones.clip_score import CLIPScore
from flextok_pl.backbones.extractors import OFFLINE_EXTRACTOR, FeatureExtractor, build_extractor
from flextok_pl.cli.tool import instances
from flextok_pl.cli.tools import default_device, picture_size
from flextok_pl.config import GenerationConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.evaluation.generation import Prompt, as_condition
from flextok_pl.evaluation.generation_statistics import Classifier
from flextok_pl.evaluation.options import CACHE_DIR, PROBE, check_classifier
from flextok_pl.evaluation.pictures import save_figure
from flextok_pl.evaluation.probe import PROBE_SEED, tokenizer_probe
from flextok_pl.evaluation.protocol import decoding_facts, extractor_facts, model_hashes, versions
from flextok_pl.evaluation.report import Record, format_columns, format_value, write_json
from flextok_pl.flow.decoding import Decoding, chosen_decoding
from flextok_pl.models.prior import Condition
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.saved import SavedPrior
from flextok_pl.search.driver import Models, Searcher, search_prompts
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.priors import UniformPrior
from flextok_pl.search.prompts import Conditions, prompts_from_options
from flextok_pl.search.quality import COSTS, image_size, measure_run, plot_quality, reference_features
from flextok_pl.search.records import RunFolder, mean_score
from flextok_pl.search.verifier_options import VerifierOptions, build_verifiers

UNIFORM = "uniform"
"""In place of a prior: every token is equally likely."""

NOT_RECORDED = ("decoding", "decode_batch_size")
"""Options of a search that are recorded in another way, or that do not change the result."""


@dataclass(frozen=True)
class RunOptions:
    """Search for tokens whose images score best with a verifier, for given classes or texts.

    A prefix of the tokens is already a picture, so candidates are scored while they have few tokens. Draws depend only
    on the seed, the condition and the number of a candidate. After a kill, run the same command again to continue after
    the last step. With torchrun or srun each process takes a part of the prompts. The folder then holds `images` in the
    layout of GenEval, `search.jsonl` with a record for each prompt, and `trees`, pictures of what each step kept. You
    may give `--num_steps`, `--guidance`, `--guidance_scale` and `--guidance_interval` without the word `decoding`; they
    default to the tokenizer's own settings, if it has any.

    Args:
        classes: number or name of a class, for a class prior; `--class` may be given several times. Default all classes
            of up to 16, else the first 8.
        texts: a text, for a text prior; `--text` may be given several times.
        prompts: a file in place of them: lines (`.txt`), GenEval's prompts (`.jsonl`) or COCO's captions (`.json`); or
            a shard set, for its captions and classes.
        limit: number of its prompts to use, from the first; default all.
        samples: searches per prompt, with different draws.
        prior: a file, folder or Hub id, or `uniform` for equally likely tokens; default the demo prior. The
            configuration of a published prior sets the defaults of guidance, sampling and decoding.
        tokenizer: tokenizer of the prior's tokens; default the one that the prior names, else the demo tokenizer.
        text_encoder: replaces the prior's own, for example by a local copy of it.
        trees: number of prompts, from the first, to draw the kept candidates of; this decodes them once more.
        out: folder for the results.
        device: default a GPU if available.
    """

    classes: list[str] | None = None
    texts: list[str] | None = None
    prompts: str | None = None
    limit: int | None = None
    samples: int = 1
    prior: str | None = None
    tokenizer: str | None = None
    text_encoder: str | None = None
    trees: int = 8
    out: str = "runs/search"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.trees < 0:
            raise ValueError(f"trees={self.trees} must be 0 or more")
        if not self.out:
            raise ValueError("out='' names no folder: leave it out, or name one")


def run(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok search`."""
    (chosen, options, verifiers), given = instances(command, arguments, RunOptions, SearchOptions, VerifierOptions)
    models = load_models(chosen)
    search_images(models, chosen, with_defaults(options, models, given), verifiers)


def with_defaults(options: SearchOptions, models: Models, given: Collection[str]) -> SearchOptions:
    """Complete the options that are not given, from a published prior and the tokenizer's own decoding."""
    names = {each.name for each in fields(Decoding)}
    asked = {name: getattr(options.decoding, name) for name in names.intersection(given)}
    decoding = chosen_decoding(models.tokenizer.config, chosen_decoding(models.published, options.decoding), **asked)
    own = {name: value for name, value in asdict(models.published).items() if value is not None}
    own = {name: value for name, value in own.items() if name not in names.union(given)}
    return replace(options, decoding=decoding, **own)


def search_images(models: Models, given: RunOptions, options: SearchOptions, verifiers: VerifierOptions) -> None:
    """Search with these options, and print where the results are."""
    file = None if given.prompts is None else Path(given.prompts)
    prompts = prompts_from_options(models.known, given.classes, given.texts, file, given.limit, given.samples)
    tok = models.tokenizer
    decoding = options.decoding.under(tok.config.objective)
    verifier = build_verifiers(verifiers, prompts, models.known, tok, picture_size(tok), decoding, tok.device)
    protocol = {
        **{each.name: getattr(options, each.name) for each in fields(options) if each.name not in NOT_RECORDED},
        **decoding_facts(tok, options.decoding),
        **models.facts,
        "verifier": {**verifier.facts, **_given(verifiers)},
        "device": tok.device.type,
        "versions": versions(),
        "class_names": models.known.class_names,
    }
    folder = RunFolder(Path(given.out), protocol)
    searcher = Searcher(models.prior, tok, verifier, models.condition, options)
    records = search_prompts(searcher, prompts, folder, given.trees)
    if records is not None:
        print(_summary(records, folder.path))


def load_models(given: RunOptions) -> Models:
    """Load the prior and the tokenizer that the options name."""
    place = default_device(given.device)
    if given.prior == UNIFORM:
        path = given.tokenizer or str(DEMO_TOKENIZER)
        tok = FlexTok.from_pretrained(path, device=place)
        uniform = UniformPrior(tok.config.vocab_size, tok.num_registers, place)
        facts: dict[str, Any] = {"prior": UNIFORM, "tokenizer": _named(path), **model_hashes(tok)}
        return Models(uniform, tok, Conditions("none"), lambda prompt: None, facts, GenerationConfig())
    name = given.prior or str(DEMO_PRIOR)
    module = SavedPrior(name, given.tokenizer, given.text_encoder, str(DEMO_TOKENIZER)).eval().to(place)
    facts = {
        "prior": _named(name),
        "tokenizer": _named(module.tokenizer_name or ""),
        "text_encoder": None if module.text_encoder is None else _named(module.text_encoder.name),
        "condition": module.condition_kind,
        **model_hashes(module.reconstructor, module.prior),
    }

    def condition(prompt: Prompt) -> Condition:
        return module.encoded_condition(as_condition(module.condition_kind, [prompt]))

    known = Conditions(module.condition_kind, module.num_classes, module.class_names)
    return Models(module.prior, module.reconstructor, known, condition, facts, module.prior.config.generation)


def _named(model: str) -> str:
    """The name of a model; of a file, the absolute path."""
    file = Path(model).expanduser()
    return str(file.resolve()) if file.exists() else model


def _given(options: VerifierOptions) -> dict[str, Any]:
    """The options that differ from their default and affect the result."""
    given = {each.name: getattr(options, each.name) for each in fields(options) if each.name != "classifier_cache"}
    defaults = {each.name: each.default for each in fields(options)}
    return {name: value for name, value in given.items() if value != defaults[name]}


def _summary(records: Sequence[Record], folder: Path) -> str:
    score = mean_score(records)
    shown = "infinite" if score is None else format_value(score)
    cost = {name: fmean(record["cost"][name] for record in records) for name in COSTS}
    spent = ", ".join(f"{value:.0f} {name.replace('_', ' ')}" for name, value in cost.items())
    return f"{folder}: prompts: {len(records)}, mean score {shown}; for each {spent}"


def measure_searches(
    runs: list[str],
    reference: str | None = None,
    classifier: str | None = None,
    classifier_data: str | None = None,
    classifier_weights: str | None = None,
    clip: str | None = None,
    extractor: str = OFFLINE_EXTRACTOR,
    weights: str | None = None,
    against: Literal["decoder_calls", "decoded_images", "prior_positions", "verifier_calls"] = "decoder_calls",
    batch_size: int = 64,
    seed: int = 0,
    out: str = "runs/quality",
    device: str | None = None,
) -> None:
    """Measure the best image of each prompt of finished searches, and draw quality against cost.

    Measures agreement with the requested class, CLIP score, Frechet and kernel distance, precision and recall, each if
    its option is given. Do not use the classifier that the search optimised. Writes `quality.json` with a record for
    each number, and `quality.png`. The plot has a panel for each metric, a line for each way to search, and points for
    runs of different sizes with their spread over seeds.

    Args:
        runs: folders that `flextok search` wrote.
        reference: real pictures for the distances: a folder, a shard set or a pattern of shard sets, or a `.npz` file.
        classifier: decides whether an image shows its class: `probe`, a linear classifier fitted to the extractor's
            features of `classifier_data` and of its reconstructions, or a timm model.
        classifier_data: shard set of real images with classes, to fit the probe to.
        classifier_weights: local weights file of a timm classifier.
        clip: Hub id or folder of a CLIP model, to score images against texts.
        extractor: feature network of distances and of the probe: `effnet-lite0` (offline), `inception-v3-compat` (FID),
            `dinov2-*` or `clip-*`.
        weights: local weights file of the extractor.
        against: cost on the plot's axis, per prompt.
        batch_size: images per batch.
        seed: seed of the kernel distance's subsets.
        out: folder for the results.
        device: default a GPU if available.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    check_classifier(classifier, classifier_data, classifier_weights)
    folders = list(dict.fromkeys(Path(run).expanduser() for run in runs))
    network = build_extractor(extractor, weights).to(default_device(device))
    clip_score = None if clip is None else CLIPScore(clip)
    judges = _Judges(network, classifier, classifier_data, classifier_weights)
    real, facts = None, None
    if reference is not None:
        real, facts = reference_features(reference, network, image_size(folders[0]))
    protocol = {
        **extractor_facts(network),
        "reference": facts,
        "classifier_data": classifier_data,
        "clip": clip,
        "clip_weights_hash": None if clip_score is None else clip_score.weights_hash,
        "seed": seed,
        "device": network.device.type,
        "versions": versions(),
    }
    records: list[Record] = []
    for folder in folders:
        found = measure_run(folder, network, judges.of, clip_score, real, batch_size, seed)
        records += [{**record, **protocol} for record in found]
    target = Path(out)
    write_json(records, target / "quality.json")
    save_figure(plot_quality(records, against), target / "quality.png")
    print(_table(records, against))
    print(f"{len(folders)} searches; records and the plot: {target}")
    if real is not None and not all(record["full_rank"] for record in records):
        print(
            f"compare {network.metric_name} only between runs of as many images: the covariance of a side with at most "
            f"{network.dim} images is singular; prefer {network.kernel_metric_name}"
        )


def _table(records: Sequence[Record], against: str) -> str:
    """Format one row for each run."""
    metrics = list(dict.fromkeys(record["metric"] for record in records))
    runs: dict[str, dict[str, Record]] = {}
    for record in records:
        runs.setdefault(record["run"], {})[record["metric"]] = record
    rows = [["run", "images", against.replace("_", " "), *metrics]]
    for run, found in runs.items():
        first = next(iter(found.values()))
        values = [format_value(found[m]["value"]) if m in found else "" for m in metrics]
        rows.append([run, str(first["num_samples"]), f"{first[against]:.0f}", *values])
    return format_columns(rows)


class _Judges:
    """The classifier for each run; a probe is fitted to images of the run's tokenizer."""

    def __init__(
        self, network: FeatureExtractor, classifier: str | None, data: str | None, weights: str | None
    ) -> None:
        self._network, self._data = network, data
        self._timm = None if classifier in (None, PROBE) else TimmClassifier(str(classifier), weights)
        self._probes: dict[str, Classifier] = {}

    def of(self, protocol: Mapping[str, Any]) -> Classifier | None:
        """The classifier for a run with this protocol."""
        if self._data is None:
            return self._timm
        stated = {each.name: protocol[each.name] for each in fields(Decoding) if each.name in protocol}
        decoding = Decoding(**stated)  # a record states no interval if it is all times
        key = f"{protocol['tokenizer_hash']} {decoding}"
        if key not in self._probes:
            tok = FlexTok.from_pretrained(protocol["tokenizer"], device=self._network.device)
            if weights_hash(tok) != protocol["tokenizer_hash"]:
                raise ValueError(
                    f"tokenizer={protocol['tokenizer']!r} is not the one that the search used: restore that"
                )
            size, names = picture_size(tok), protocol["class_names"]
            self._probes[key] = tokenizer_probe(
                self._data, size, self._network, tok, decoding, PROBE_SEED, Path(CACHE_DIR).expanduser(), names
            )
        return self._probes[key]
