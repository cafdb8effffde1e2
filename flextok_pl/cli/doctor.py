"""`flextok doctor`: check a run, with numbers and remedies."""

from __future__ import annotations

import datetime
import json as json_module
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap

import torch
from torch import Tensor

from flextok_pl.cli.run_contents import RunContents, planned_speed
from flextok_pl.cli.tools import default_device
from flextok_pl.contracts import Batch
from flextok_pl.diagnosis import tokens as token_checks
from flextok_pl.diagnosis import training as training_checks
from flextok_pl.diagnosis.finding import Finding
from flextok_pl.diagnosis.latents import latent_scale
from flextok_pl.diagnosis.logged import of_logged
from flextok_pl.diagnosis.probe import TokenizerProbe, own_loss, probe_latents, probe_tokenizer
from flextok_pl.diagnosis.reference import Reference, against_reference, decides, differing, shipped, window_of, windows
from flextok_pl.evaluation.protocol import versions
from flextok_pl.files import write_file
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.progress import announced

WRONG = 3
"""Exit status if a check finds something wrong; 1 and 2 mean that the command could not do its work."""

VERDICTS = ("wrong", "look", "ok")

COMPARED = ("train/loss", "val/loss")
"""Curves in a reference."""

Outcome = Finding | tuple[str, str]
"""A finding of a check, or the check's name and why it was left out."""


def diagnose_run(
    run: str,
    data: str | None = None,
    num_samples: int = 192,
    plan: str | None = None,
    reference: str | None = None,
    json: str | None = None,
    device: str | None = None,
) -> None:
    """Check a run for problems: token and codebook use, budgets, latents, loss, speed, averaged weights.

    Reads the logs of a training, its checkpoint and its finished model, also while it runs, and runs the model on some
    pictures. Each check says ok, look or wrong, with numbers and a remedy; docs/doctor.md explains them. The exit
    status is 3 if something is wrong, else 0.

    Args:
        run: folder of the run, such as runs/tokenizer/demo/version_0.
        data: shard set of pictures to run the model on; default the run's own validation set.
        num_samples: number of these pictures; 0 looks at logs and weights only.
        plan: file from `flextok plan --json` for this run's machine, to compare the speed with.
        reference: file from `flextok doctor reference` with loss curves of other runs of the experiment; default the
            packaged one, which covers the demo's experiments.
        json: file to write the findings to.
        device: where to run the model; default a GPU if available.
    """
    if num_samples < 0 or num_samples == 1:
        raise ValueError(f"num_samples={num_samples} must be at least 2, or 0 to run no model")
    contents, place = RunContents.open(Path(run)), default_device(device)
    batches, no_data = _batches(contents, data, num_samples)
    outcomes: list[Outcome] = [
        *_of_logs(contents, batches),
        *_of_speed(contents, plan),
        *_of_reference(contents, reference),
    ]
    if no_data is None:
        outcomes += _of_model(contents, batches, place)
    else:
        outcomes.append(("running the model", no_data))
    outcomes += _of_weights(contents, batches, place)
    # If a check has two findings, the later one is from the model itself.
    findings = list({each.check: each for each in outcomes if isinstance(each, Finding)}.values())
    left_out = dict(each for each in outcomes if not isinstance(each, Finding))
    left_out = {name: why for name, why in left_out.items() if name not in {each.check for each in findings}}
    of_all = "" if contents.max_steps is None else f" of {contents.max_steps:,}"
    looked = sum(len(batch["key"]) for batch in batches)
    print(f"{contents.kind} run {contents.folder}: step {contents.steps:,}{of_all}; {looked} pictures")
    print("\n".join(_lines(findings, left_out)))
    if json is not None:
        held = {"run": run, "steps": contents.steps, "findings": [each.as_dict() for each in findings]}
        write_file(Path(json), json_module.dumps({**held, "left_out": left_out}, indent=1) + "\n")
    if any(each.verdict == "wrong" for each in findings):
        raise SystemExit(WRONG)


def make_reference(runs: list[str], *, out: str, experiment: str | None = None, note: str = "") -> None:
    """Write the loss curves of several runs of an experiment, to compare others with by `flextok doctor --reference`.

    Args:
        runs: folders of at least two runs that differ only in their seeds.
        out: JSON file to write.
        experiment: its name; default that of the runs.
        note: other facts about the runs, such as command and machine.
    """
    if len(runs) < 2:
        raise ValueError(f"runs={runs}: the spread over seeds needs at least two runs")
    found = [RunContents.open(Path(run).expanduser()) for run in runs]
    first = found[0]
    options = decides(first.options)
    width = window_of(min(run.steps for run in found))
    curves = {name: [windows(run.curves[name], width) for run in found if name in run.curves] for name in COMPARED}
    curves = {name: runs for name, runs in curves.items() if sum(len(each) > 1 for each in runs) > 1}
    made = {"date": datetime.date.today().isoformat(), "versions": versions(), "note": note}
    made_of = Reference(experiment or first.experiment, options, width, curves, made)
    for run in found[1:]:
        if others := differing(decides(run.options), made_of):
            name, (one, other) = next(iter(others.items()))
            raise ValueError(f"{first.folder} has {name}={one}, {run.folder} {other}: give runs of one experiment")
    if not made_of.curves:
        short = f"fewer than two of them have logged {' or '.join(COMPARED)} over {2 * width} steps"
        raise ValueError(f"runs={runs}: {short}: train longer, or log more often (trainer.log_every_n_steps)")
    seeds = [run.model.get("seed") for run in found]
    if len(set(map(str, seeds))) < len(seeds):
        raise ValueError(f"the runs have model.seed={seeds}: give runs with different seeds")
    target = Path(out)
    made_of.write(target)
    print(target)


def _batches(contents: RunContents, source: str | None, samples: int) -> tuple[list[Batch], str | None]:
    """Pictures for the model, or the reason why there are none."""
    if samples == 0:
        return [], "num_samples is 0"
    if contents.kind == "prior":
        return [], "a prior is checked by its logs"
    if contents.kind == "other":
        return [], f"there are no checks for the model of {contents.group('model').get('class_path')}"
    try:
        batches = list(contents.data(source, samples).val_dataloader())
    except ValueError as error:
        if source is not None:
            raise
        return [], str(error)
    if not batches or "image" not in batches[0]:
        return [], "the validation set holds no pictures: give --data"
    return batches, None


def _of_logs(contents: RunContents, batches: Sequence[Batch]) -> Iterator[Outcome]:
    """Checks of logged values, and of the options."""
    curves = contents.curves
    if not curves:
        yield "what is logged", f"{contents.folder} has no events of TensorBoard, no metrics.csv and no metrics.jsonl"
    else:
        bad = {name: math.nan for name, curve in curves.items() if not all(math.isfinite(value) for _, value in curve)}
        yield training_checks.finite({**dict.fromkeys(curves, 0.0), **bad})
    latest = {name: curve[-1][1] for name, curve in curves.items()}
    if "train/data_share" in curves:
        latest["train/data_share"] = median(value for _, value in curves["train/data_share"])
    facts = contents.facts(sum(len(batch["key"]) for batch in batches) or None)
    progress = facts.progress
    yield from of_logged(latest, facts)
    errors = contents.errors_by_budget()
    if len(errors) > 1:
        yield token_checks.budgets_of_means(errors, progress, "squared error")
    model, warmup = contents.model, int(contents.model.get("warmup_steps") or 0)
    clip = contents.group("trainer").get("gradient_clip_val")
    few = "the run has logged too few values"
    falls = training_checks.loss_falls(contents.curve("train/loss"), warmup, progress, _started_trained(contents))
    yield falls or ("loss-falls", few)
    yield training_checks.overfitting(contents.curve("val/loss")) or ("overfitting", few)
    yield training_checks.gradient_norm(contents.curve("train/grad_norm"), clip) or ("gradient-norm", few)
    if model.get("mup_base_width") is not None:
        yield "learning-rate", "model.mup_base_width sets a different one for each group of weights"
    else:
        rates, lr = contents.learning_rates, float(model.get("lr") or 0.0)
        found = training_checks.learning_rate(rates, lr, warmup, contents.max_steps)
        yield found or ("learning-rate", "the run has not logged it")


def _of_speed(contents: RunContents, plan: str | None) -> Iterator[Outcome]:
    speeds = [value for _, value in contents.curve("train/images_per_s")]
    if plan is None:
        yield "throughput", "give --plan, a file that `flextok plan --json` wrote for the run's machine"
    elif not speeds:
        yield "throughput", "the run has logged no train/images_per_s"
    else:
        yield training_checks.throughput(median(speeds), planned_speed(Path(plan)))


def _started_trained(contents: RunContents) -> bool:
    return bool(contents.model.get("init_from") or contents.model.get("init"))


def _of_reference(contents: RunContents, given: str | None) -> Iterator[Outcome]:
    file = shipped(contents.experiment) if given is None else Path(given)
    if file is None:
        yield "reference", f"there are no curves of {contents.experiment}: give --reference"
        return
    if given is None and _started_trained(contents):
        yield "reference", "the packaged runs started from untrained weights, and this one did not: give --reference"
        return
    found = against_reference(contents.curves, contents.options, Reference.read(file))
    yield found if isinstance(found, Finding) else ("reference", found)


def _of_model(contents: RunContents, batches: Sequence[Batch], place: torch.device) -> Iterator[Outcome]:
    """Checks of the model on pictures."""
    if contents.kind == "autoencoder":
        vae = contents.autoencoder()
        if vae is None:
            yield "latent-scale", "the scale of the latents is measured at the end of the training"
            return
        moments = probe_latents(vae.to(place), batches, place)
        yield latent_scale(moments.means, moments.stds, moments.overall)
        return
    tok = contents.tokenizer()
    if tok is None:
        yield "running the model", "there is no tokenizer.safetensors and no checkpoint yet"
        return
    bad = {name: math.nan for name, weight in tok.named_parameters() if not weight.isfinite().all()}
    if bad:
        yield training_checks.finite({**dict.fromkeys(dict(tok.named_parameters()), 0.0), **bad})
        return
    with announced("running the tokenizer"):
        probe = probe_tokenizer(tok.to(place), batches, place)
    yield from _of_probe(probe, tok, contents.facts(None).progress)


def _of_probe(probe: TokenizerProbe, tok: FlexTok, progress: float | None) -> Iterator[Finding]:
    """Checks of a tokenizer's tokens and images."""
    yield latent_scale(probe.latents.means, probe.latents.stds, probe.latents.overall)
    yield token_checks.token_use(probe.own, probe.other, progress)
    yield token_checks.token_positions(probe.positions, progress)
    if probe.gains:
        yield token_checks.budgets(probe.at_budget, probe.gains, progress, "loss")
    yield token_checks.codebook_use(probe.entropies, probe.samples, tok.config.vocab_size, progress)
    yield token_checks.fsq_levels(probe.level_shares, probe.codes)
    yield token_checks.null_condition(probe.own, probe.null, probe.other_over_null)


def _of_weights(contents: RunContents, batches: Sequence[Batch], place: torch.device) -> Iterator[Outcome]:
    """Compare the averaged weights of the newest checkpoint with the raw ones."""
    states = contents.states()
    if states is None:
        yield "ema-distance", "there is no checkpoint with averaged weights"
        return
    average, raw = states
    names = [n for n in raw if n in average and raw[n].is_floating_point()]
    distance, size = _norm(average[n] - raw[n] for n in names), _norm(raw[n] for n in names)
    losses = None
    tok = contents.tokenizer() if contents.kind == "tokenizer" and batches else None
    if tok is not None and math.isfinite(distance):
        one, other = (_loss_with(tok.to(place), state, batches, place) for state in (average, raw))
        losses = (one, other)
    yield training_checks.ema_distance(distance / size if size else math.nan, losses)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(each.cpu().double().square().sum()) for each in tensors))


def _loss_with(tok: FlexTok, state: Mapping[str, Tensor], batches: Sequence[Batch], place: torch.device) -> float:
    """The loss of a tokenizer with the weights of a module's state."""
    own = {name.removeprefix("tokenizer."): value for name, value in state.items() if name.startswith("tokenizer.")}
    tok.load_state_dict(own, strict=False)  # its autoencoder is not in there
    return own_loss(tok, batches, place)


def _lines(findings: Sequence[Finding], left_out: Mapping[str, str]) -> Iterator[str]:
    """Format the findings for a terminal, the wrong ones first."""
    for each in sorted(findings, key=lambda each: VERDICTS.index(each.verdict)):
        head = f"  {each.verdict:<6}{each.check:<17}"
        yield from _wrapped(each.says, head, len(head))
        if each.remedy:
            yield from _wrapped(f"-> {each.remedy} ({each.link})", " " * len(head), len(head) + 3)
    for name, why in left_out.items():
        yield from _wrapped(f"not checked: {name}: {why}", "  ", 15)
    count = Counter(each.verdict for each in findings)
    yield f"{count['ok']} ok, {count['look']} to look at, {count['wrong']} wrong"


def _wrapped(text: str, head: str, margin: int) -> list[str]:
    """Wrap text into lines; links and options stay whole."""
    return wrap(
        text,
        118,
        initial_indent=head,
        subsequent_indent=" " * margin,
        break_on_hyphens=False,
        break_long_words=False,
    )
