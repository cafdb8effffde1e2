"""An evaluation of a tokenizer whose error is known, without a trainer: what it measures, writes, and refuses."""

import csv
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate

from flextok_pl.evaluation.budget_evaluation import Context
from flextok_pl.evaluation.options import ReconstructionOptions
from flextok_pl.evaluation.reconstruction import ReconstructionEvaluation
from flextok_pl.evaluation.reconstruction_statistics import ReconstructionStatistics
from flextok_pl.metrics.images import to_uint8
from flextok_pl.metrics.kernel import kernel_distance

STRIPS, SIDE, STEPS = 8, 32, 4


class Killed(Exception):
    pass


class StripTokenizer:
    """Token i is the colour of strip i in 4 levels per channel; strips beyond the budget are grey with noise.

    It dies at its `deadline`-th decoding.
    """

    num_registers = STRIPS

    def __init__(self, bias=0.0, deadline=None):
        self.bias, self.deadline, self.decoded = bias, deadline, 0

    def tokenize(self, images, num_tokens=None):
        colours = images.reshape(len(images), 3, STRIPS, -1).mean(-1)
        digits = ((colours + 1) / 2 * STEPS).floor().clamp(0, STEPS - 1).long()
        return (digits * torch.tensor([1, STEPS, STEPS**2])[:, None]).sum(1)[:, :num_tokens]

    def detokenize(
        self, tokens, num_tokens=None, num_steps=25, guidance="apg", guidance_scale=7.5, generator=None, **_
    ):
        assert num_tokens.shape == (len(tokens),) and len(generator) == len(tokens)
        assert tokens.shape[1] == num_tokens.max()
        self.decoded += 1
        self.options = {"num_steps": num_steps, "guidance": guidance, "guidance_scale": guidance_scale, **_}
        if self.decoded == self.deadline:
            raise Killed
        digits = tokens[:, None] // torch.tensor([1, STEPS, STEPS**2])[:, None] % STEPS
        colours = (digits + 0.5) / STEPS * 2 - 1
        noise = torch.stack([torch.randn(3, SIDE, SIDE, generator=g) for g in generator])
        images = 0.3 * noise
        height = SIDE // STRIPS
        for image, strips, kept in zip(images, colours, num_tokens.tolist(), strict=True):
            image[:, : kept * height] = strips[:, :kept].repeat_interleave(height, 1)[..., None]
        return images + self.bias


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(count, 3, STRIPS, generator=generator) * 1.8 - 0.9
    images = colours.repeat_interleave(SIDE // STRIPS, 2)[..., None].expand(-1, -1, -1, SIDE)
    images = images + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return [{"image": image.clamp(-1, 1), "key": f"picture{i}", "label": 0} for i, image in enumerate(images)]


class TinyExtractor:
    """Mean colour of each strip, a feature that can be computed by hand."""

    name, metric_name, kernel_metric_name = "strips", "fd_strips", "kd_strips"
    dim, weights_hash, resize = 3 * STRIPS, "0" * 16, "none"
    device = torch.device("cpu")
    seen = 0

    def __call__(self, images):
        TinyExtractor.seen += len(images)
        return images.float().reshape(len(images), 3, STRIPS, -1).mean(-1).flatten(1) / 255

    def to(self, device):
        return self


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    monkeypatch.setattr("flextok_pl.evaluation.budget_evaluation.build_extractor", lambda *_: TinyExtractor())
    TinyExtractor.seen = 0
    if "files" not in request.node.name:  # a plot takes longer than all the rest
        monkeypatch.setattr("flextok_pl.evaluation.report.plot_budgets", lambda *args: None)


def evaluate(tmp_path, samples=None, tokenizer=None, batch_size=5, claimed=None, data_hash=None, read=None, **options):
    """The results of an evaluation of the first `read` of the samples, which leaves its files."""
    samples = pictures(17) if samples is None else samples
    evaluation = ReconstructionEvaluation(ReconstructionOptions(**{"cache_dir": None, **options}))
    context = Context(claimed or len(samples), limited=read is not None, data_hash=data_hash)
    evaluation.start(tokenizer or StripTokenizer(), context)
    samples = samples[:read]
    for i in range(0, len(samples), batch_size):
        evaluation.update(default_collate(samples[i : i + batch_size]))
    results = evaluation.finish()
    results.write(tmp_path, "rfid")
    print(results.table(tmp_path))
    evaluation.forget()
    return results


def test_values_files_and_table(tmp_path, capsys):
    samples = pictures(17)
    results = evaluate(tmp_path, samples)
    assert list(results.values) == [1, 2, 4, 8]
    by_metric = {m: [results.values[k][m] for k in (1, 2, 4, 8)] for m in results.values[1]}
    for name in ("fd_strips", "mae", "mse", "mse_over_variance"):
        assert by_metric[name] == sorted(by_metric[name], reverse=True), name
    for name in ("psnr", "ssim"):
        assert by_metric[name] == sorted(by_metric[name]), name

    images = to_uint8(torch.stack([sample["image"] for sample in samples])).double() / 255
    variance = images.var(0, correction=0).mean()
    assert by_metric["mse_over_variance"][2] == pytest.approx(by_metric["mse"][2] / float(variance), rel=1e-9)
    # At the full budget only the colour steps and the pictures' own noise are lost: (1/4)^2 / 12 + (0.05 / 2)^2.
    assert by_metric["mse"][-1] == pytest.approx(1 / 16 / 12 + 0.025**2, rel=0.15)

    records = json.loads((tmp_path / "rfid.json").read_text())
    assert len(records) == 4 * len(by_metric)
    (record,) = [r for r in records if r["metric"] == "fd_strips" and r["num_tokens"] == 4]
    assert record["value"] == results.values[4]["fd_strips"]
    wanted = {
        "num_samples": 17,
        "samples_in_split": 17,
        "complete": True,
        "num_steps": 25,
        "guidance": "none",
        "seed": 0,
    }
    wanted |= {"extractor": "strips", "image_size": [32, 32], "precision": "32-true", "model_weights": "loaded"}
    assert wanted.items() <= record.items()
    assert record["full_rank"] is False
    assert len(record["data_hash"]) == 16 and record["versions"]["torch"] == torch.__version__

    rows = list(csv.DictReader((tmp_path / "rfid.csv").open()))
    assert [row["num_tokens"] for row in rows] == ["1", "2", "4", "8"]
    assert float(rows[1]["mse"]) == results.values[2]["mse"]
    assert Image.open(tmp_path / "rfid.png").size[0] > 600
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size[0] == 5 * 34 + 2 and grid.size[1] > 8 * 34

    printed = capsys.readouterr().out
    assert "mse_over_variance" in printed and "of 17 images and 24 features is comparable" in printed
    assert len([line for line in printed.splitlines() if line.strip()[:2] in ("1 ", "2 ", "4 ", "8 ")]) == 4


def test_results_do_not_depend_on_batches_or_order(tmp_path):
    samples = pictures(17)
    first = evaluate(tmp_path / "a", samples, batch_size=17)
    second = evaluate(tmp_path / "b", samples[::-1], batch_size=3)
    for budget, metrics in first.values.items():
        for name, value in metrics.items():
            assert second.values[budget][name] == pytest.approx(value, rel=1e-6), name
    hashes = {json.loads((tmp_path / run / "rfid.json").read_text())[0]["data_hash"] for run in "ab"}
    assert len(hashes) == 1
    assert (tmp_path / "a/grid.png").read_bytes() == (tmp_path / "b/grid.png").read_bytes()
    other = evaluate(tmp_path / "c", samples, seed=1)
    assert other.values[1]["mse"] != first.values[1]["mse"]


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_results_do_not_depend_on_how_many_images_are_decoded_at_once(tmp_path, at_once):
    samples, tokenizer = pictures(17), StripTokenizer()
    first = evaluate(tmp_path / "a", samples, num_seeds=2)
    second = evaluate(tmp_path / "b", samples, tokenizer, num_seeds=2, decode_batch_size=at_once)
    assert tokenizer.decoded == 2 * sum(-(-4 * size // at_once) for size in (5, 5, 5, 2))
    assert second.values == first.values
    for name in ("rfid.json", "grid.png", "extremes.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def in_fit(num_batches, batches=10):
    """An evaluation of about 10 of 40 images, and how many decodings it took."""
    tokenizer, samples = StripTokenizer(), pictures(40)
    evaluation = ReconstructionEvaluation(ReconstructionOptions(max_samples=10, fit_budgets=[8], cache_dir=None))
    evaluation.start(tokenizer, Context(40, in_fit=True, num_batches=num_batches))
    for i in range(batches):
        evaluation.update(default_collate(samples[4 * i : 4 * i + 4]))
    return evaluation.finish(), tokenizer.decoded


def test_few_samples_of_many_batches_are_measured_together():
    (one, at_once), (other, waiting) = in_fit(math.inf), in_fit(10)
    count = one.protocol["num_samples"]
    assert 7 < at_once <= min(10, count) and waiting == -(-count // 4) < at_once
    assert other.values[8] == pytest.approx(one.values[8], rel=1e-6)
    assert other.pictures["grid.png"].equal(one.pictures["grid.png"])
    assert other.protocol == one.protocol and one.protocol["samples_read"] == 40


def test_batches_that_do_not_come():
    with pytest.raises(RuntimeError, match="2 of 12 batches of the test set did not come.*length of its dataloader"):
        in_fit(12)


def test_real_statistics_are_kept_on_disk(tmp_path):
    samples, options = pictures(17), {"cache_dir": tmp_path / "cache", "budgets": [8]}
    first = evaluate(tmp_path, samples, data_hash="a", **options)
    assert TinyExtractor.seen == 34
    second = evaluate(tmp_path, samples, data_hash="a", **options)
    assert TinyExtractor.seen == 34 + 17
    assert second.values == first.values
    with pytest.raises(RuntimeError, match="other images"):
        evaluate(tmp_path, pictures(18)[1:], data_hash="a", **options)
    again = evaluate(tmp_path, pictures(18)[1:], data_hash="a", **options)
    assert again.values != first.values
    evaluate(tmp_path, samples, data_hash="b", **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_limited_batches_whether_statistics_of_all_are_kept_or_not(tmp_path, capsys):
    """Ten of seventeen images are measured against these ten, and the record says that they are not all."""
    options = {"cache_dir": tmp_path / "cache", "budgets": [8], "data_hash": "a"}
    evaluate(tmp_path, **options)
    values = []
    for cache in (tmp_path / "cache", None):
        values.append(evaluate(tmp_path, read=10, **{**options, "cache_dir": cache}).values[8])
        (record, *_) = json.loads((tmp_path / "rfid.json").read_text())
        assert (record["num_samples"], record["samples_in_split"], record["complete"]) == (10, 17, False)
        assert "only 10 of 17 samples were read" in capsys.readouterr().out
    assert values[0] == values[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_each_sample_exactly_once(tmp_path):
    samples = pictures(10)
    with pytest.raises(RuntimeError, match=r"test set gave 10 samples instead of 12.*no number is reported"):
        evaluate(tmp_path, samples, claimed=12)
    with pytest.raises(RuntimeError, match="1 of 11 samples of the test set repeat a key"):
        evaluate(tmp_path, [*samples, samples[3]])
    assert not (tmp_path / "rfid.json").exists()


def test_budgets(tmp_path):
    assert list(evaluate(tmp_path, budgets="all").values) == list(range(1, 9))
    options = ReconstructionOptions(budgets=[1, 9])
    with pytest.raises(ValueError, match="rfid.budgets holds 9, but the tokenizer has 8"):
        options.budgets_up_to(8, in_fit=False)
    assert options.budgets_up_to(9, in_fit=True) == [1, 9]
    with pytest.raises(ValueError, match="rfid.fit_budgets holds 9"):
        ReconstructionOptions(fit_budgets=[1, 9]).budgets_up_to(8, in_fit=True)
    assert ReconstructionOptions().budgets_up_to(8, in_fit=True) == [1, 4, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0, 1]}, "budgets=.0, 1. must be different positive"),
        ({"budgets": [4, 4]}, "different positive"),
        ({"budgets": []}, "different positive"),
        ({"budgets": "some"}, "budgets='some'"),
        ({"num_steps": 0}, "num_steps=0 must be a whole number of at least 1"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"decode_batch_size": 0}, "decode_batch_size=0"),
        ({"guidance": "strong"}, "guidance='strong'"),
        ({"guidance_scale": 2.0}, "no effect with guidance='none'"),
        ({"extractor": "inception"}, "use one of effnet-lite0, effnet-lite2, inception-v3-compat"),
        ({"weights": "/nowhere.pth"}, "not a file"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionOptions(**options)


def test_records_state_how_the_model_decodes(tmp_path):
    """As it was made for, where the options say nothing, and in any case what was really done."""
    student = StripTokenizer()
    student.config = SimpleNamespace(num_steps=2, guidance="none", guidance_scale=1.0)
    given = {"num_steps": 3, "guidance": "cfg", "guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}
    for tokenizer, options, wanted in (
        (StripTokenizer(), {}, (25, "none", 1.0, None)),
        (student, {}, (2, "none", 1.0, None)),
        (student, given, (3, "cfg", 2.0, (0.0, 0.5))),
    ):
        results = evaluate(tmp_path, tokenizer=tokenizer, budgets=[8], **options)
        protocol = results.protocol
        assert any("was made for 2 steps" in note for note in results.notes) == (options == given)
        assert tuple(protocol.get(name) for name in given) == wanted
        assert all(tokenizer.options[name] == protocol[name] for name in given if name in protocol)


def test_a_diverged_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        evaluate(tmp_path, tokenizer=StripTokenizer(bias=math.nan))


def test_the_offline_extractor_in_a_whole_evaluation(tmp_path, monkeypatch):
    monkeypatch.undo()
    results = evaluate(tmp_path, pictures(6), budgets=[1, 8])
    assert results.values[8]["fd_effnet_lite0"] < results.values[1]["fd_effnet_lite0"]
    metrics = {record["metric"] for record in json.loads((tmp_path / "rfid.json").read_text())}
    assert not any("inception" in metric or "fid" in metric for metric in metrics)


def test_the_best_and_the_worst_images_are_shown(tmp_path):
    samples = pictures(9)
    for i, sample in enumerate(samples):  # the more noise in the picture, the larger the error
        noise = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(i))
        sample["image"] = (sample["image"] + 0.1 * (i * 4 % 9) * noise).clamp(-1, 1)
    evaluate(tmp_path, samples, budgets=[8])
    shown = torch.from_numpy(np.asarray(Image.open(tmp_path / "extremes.png")).copy()).permute(2, 0, 1)
    by_noise = sorted(range(9), key=lambda i: i * 4 % 9)
    left, step = 2 * SIDE + 2, SIDE + 2
    for row, i in enumerate([*by_noise[:3], *by_noise[:-4:-1]]):
        top = shown.shape[1] - (6 - row) * step
        original = shown[:, top : top + SIDE, left : left + SIDE]
        assert torch.equal(original, to_uint8(samples[i]["image"])), f"row {row}"
        made = shown[:, top : top + SIDE, left + step : left + step + SIDE]
        assert 1 < (made.float() - original.float()).abs().mean() < 100, "its reconstruction is beside it"


def test_variance_over_seeds(tmp_path):
    """Beyond the budget the strips are noise of deviation 0.3 on [-1, 1], 0.15 on [0, 1]."""
    results = evaluate(tmp_path, budgets=[2, 8], num_seeds=3)
    first = evaluate(tmp_path, budgets=[2, 8])
    assert "seed_variance" not in first.values[2]
    assert results.values[2].pop("seed_variance") == pytest.approx(0.15**2 * 6 / 8, rel=0.05)
    assert results.values[8].pop("seed_variance") == 0
    assert results.values == first.values, "all else is measured on the first seed"


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path):
    samples, cache = pictures(17), tmp_path / "cache"
    options = {"cache_dir": cache, "budgets": [2, 8], "save_every_minutes": 0}

    def run(name, deadline=None, **changes):
        tokenizer = StripTokenizer(deadline=deadline)
        evaluate(tmp_path / name, samples, tokenizer, data_hash="one", **{**options, **changes})
        return (
            tokenizer.decoded,
            (tmp_path / name / "rfid.json").read_text(),
            [(tmp_path / name / file).read_bytes() for file in ("grid.png", "extremes.png")],
        )

    _, records, picture = run("whole", cache_dir=tmp_path / "other")
    for name, deadline in (("first", 6), ("second", 3)):  # in the third batch of four, and in the second of the rest
        with pytest.raises(Killed):
            run(name, deadline)
        assert len(list(cache.glob("unfinished_*"))) == 1
    with pytest.raises(Killed):
        run("another picture", 1, grid_samples=2)  # nothing of the others is taken
    decoded, after, after_picture = run("third")
    assert decoded == 2, "three of four batches were done"
    assert (after, after_picture) == (records, picture)
    assert not list(cache.glob("unfinished_*"))
    assert run("again")[0] == 8


def test_a_resumed_evaluation_still_finds_keys_that_come_twice(tmp_path):
    samples = pictures(10)
    options = {"cache_dir": tmp_path / "cache", "budgets": [8], "save_every_minutes": 0}
    with pytest.raises(Killed):
        evaluate(tmp_path, samples, StripTokenizer(deadline=2), data_hash="one", **options)
    twice = [*samples[:5], *samples[:5]]
    with pytest.raises(RuntimeError, match="repeat a key"):
        evaluate(tmp_path, twice, data_hash="one", **options)


class Colours:
    """Features are the mean colours of the four quarters."""

    metric_name, kernel_metric_name, dim = "fd_colours", "kd_colours", 12
    device = torch.device("cpu")

    def __call__(self, images):
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


def test_the_kernel_distance_takes_originals_and_reconstructions_as_pairs():
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(0, 256, (9, 3, 16, 16), generator=generator, dtype=torch.uint8)
    keys = [str(i) for i in range(9)]
    statistics = ReconstructionStatistics([2], Colours())
    statistics.update_real(originals, keys)
    statistics.update_reconstructions(2, originals, originals // 2, keys)
    a, b = Colours()(originals), Colours()(originals // 2)
    value = statistics.values()[2]["kd_colours"]
    assert value == pytest.approx(kernel_distance(a, b, paired=True)[0], rel=1e-9)
    assert value != pytest.approx(kernel_distance(a, b)[0], rel=1e-3)


def test_measuring_does_not_wait_for_a_device():
    """A meta tensor has no values, so it cannot be looked at, and cannot be copied to the CPU."""
    extractor = Colours()
    extractor.device = torch.device("meta")
    images, keys = torch.zeros(9, 3, 16, 16, dtype=torch.uint8, device="meta"), [str(i) for i in range(9)]
    statistics = ReconstructionStatistics([1, 2], extractor, pool_fraction=0.5)
    for budget in (1, 2, 1):
        errors = statistics.update_reconstructions(budget, images, images, keys, [images])
        assert {name: tuple(values.shape) for name, values in errors.items()} == dict.fromkeys(errors, (9,))
    assert statistics.made[1].statistics.count == 18 and 4 < statistics.made[1].pool_size < 14
    with pytest.raises(NotImplementedError, match="meta"):
        statistics.values()


def test_very_many_budgets_are_kept_on_the_cpu():
    extractor = Colours()
    extractor.device, extractor.dim = torch.device("meta"), 2048
    most, too_many = (ReconstructionStatistics(range(1, count + 1), extractor).home for count in (27, 28))
    assert (most.type, too_many.type) == ("meta", "cpu")


SCRIPT = """
import sys, torch
from flextok_pl.evaluation.budget_evaluation import Context
from flextok_pl.evaluation.options import ReconstructionOptions
from flextok_pl.evaluation.reconstruction import ReconstructionEvaluation
from flextok_pl.models.tokenizer import FlexTok, FlexTokConfig

tokenizer, images = FlexTok(FlexTokConfig.preset("tiny")), torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32)
evaluation = ReconstructionEvaluation(ReconstructionOptions(budgets=[1, 16], num_steps=1, cache_dir=None))
evaluation.start(tokenizer, Context(num_samples=8))
for part in torch.arange(8).split(3):
    evaluation.update({"image": images[part], "key": [f"image {i}" for i in part]})
results = evaluation.finish()
results.write(Path(sys.argv[1]), "rfid")
print(results.table(sys.argv[1]), "lightning" in sys.modules)
"""


def test_a_few_lines_of_python_without_lightning(tmp_path):
    script = f"from pathlib import Path{SCRIPT}"
    asked = [sys.executable, "-c", script, str(tmp_path)]
    printed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert "8 images of test, 1 steps" in printed and printed.endswith("False\n")
    records = json.loads((tmp_path / "rfid.json").read_text())
    assert {record["num_tokens"] for record in records} == {1, 16} and records[0]["complete"]
    assert {"metric", "value", "num_samples", "extractor_weights_hash", "versions"} <= set(records[0])
