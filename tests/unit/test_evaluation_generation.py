"""An evaluation of a prior whose samples are known, without a trainer: what it measures, writes, and refuses."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from flextok_pl.evaluation.budget_evaluation import Context
from flextok_pl.evaluation.generation import GenerationEvaluation
from flextok_pl.evaluation.options import GenerationOptions
from flextok_pl.metrics.images import to_uint8
from flextok_pl.metrics.linear_probe import LinearProbe

SIDE, LENGTH, CLASSES = 16, 4, 3


class Killed(Exception):
    pass


def colour(label):
    """(3, 1, 1): red, green or blue; grey for none."""
    return torch.full((3, 1, 1), -0.5) + 1.2 * torch.eye(4)[label, :3].view(3, 1, 1)


class BandTokenizer:
    """Token i is the class whose colour band i has; the rest is noise."""

    num_registers = LENGTH

    def tokenize(self, images, num_tokens=None):
        raise AssertionError("real images need no tokens")

    def detokenize(
        self, tokens, num_tokens=None, num_steps=25, guidance="apg", guidance_scale=7.5, generator=None, **_
    ):
        images = torch.stack([0.4 * torch.randn(3, SIDE, SIDE, generator=g) for g in generator])
        height = SIDE // LENGTH
        for image, row, kept in zip(images, tokens.tolist(), num_tokens.tolist(), strict=True):
            for i, label in enumerate(row[:kept]):
                image[:, i * height : (i + 1) * height] = colour(label)
        return images


class BandPrior:
    """The first token is the class asked for, the others are drawn. It dies when it is asked the `deadline`-th time."""

    condition_kind, num_classes, class_names = "class", CLASSES, ("red", "green", "blue")
    reconstructor = BandTokenizer()

    def __init__(self, deadline=None):
        self.asked, self.deadline = [], deadline

    def generate_tokens(self, condition, cfg_scale=1.0, temperature=1.0, top_k=None, top_p=None, generator=None):
        if len(self.asked) + 1 == self.deadline:
            raise Killed
        if condition is None:
            condition = torch.zeros(len(generator), dtype=torch.int64)
        elif not isinstance(condition, torch.Tensor):
            condition = torch.tensor([self.class_names.index(text) for text in condition])
        self.asked.append((condition, cfg_scale, temperature, top_k, top_p))
        drawn = torch.stack([torch.randint(CLASSES, (LENGTH,), generator=g) for g in generator])
        drawn[:, 0] = condition
        return drawn


def pictures(count=12, **fields):
    """Samples, each with its class, or with other fields by class."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        image = colour(i % CLASSES) + 0.1 * torch.randn(3, SIDE, SIDE, generator=generator)
        own = {name: of_class[i % CLASSES] for name, of_class in (fields or {"label": range(CLASSES)}).items()}
        samples.append({"image": image.clamp(-1, 1), "key": f"picture{i}", **own})
    return samples


WITH_TEXT = {"label": range(CLASSES), "text": BandPrior.class_names}


class MeanColour:
    """Mean colour of the first band and of the rest."""

    name, metric_name, kernel_metric_name = "bands", "fd_bands", "kd_bands"
    dim, weights_hash, resize = 6, "0" * 16, "none"
    device = torch.device("cpu")

    def __call__(self, images):
        height = SIDE // LENGTH
        parts = [images[:, :, :height], images[:, :, height:]]
        return torch.cat([part.float().mean((2, 3)) for part in parts], 1) / 255

    def class_logits(self, features):
        return None

    def to(self, device):
        return self


def probe():
    """Looks at the first band."""
    noise = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    features = 0.5 + 0.2 * noise
    features[:, :3] = 0.25 + 0.6 * torch.eye(3).repeat(20, 1) + 0.05 * noise[:, :3]
    return LinearProbe.fit(features, torch.arange(3).repeat(20), CLASSES, "bands")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("flextok_pl.evaluation.budget_evaluation.build_extractor", lambda *_: MeanColour())
    monkeypatch.setattr("flextok_pl.evaluation.generation.tokenizer_probe", lambda *_: probe())


def evaluate(tmp_path, prior=None, samples=None, split=5, **options):
    """The results of an evaluation by batches of `split`, which leaves its files."""
    samples = samples or pictures()
    evaluation = GenerationEvaluation(GenerationOptions(**{"cache_dir": None, **options}))
    evaluation.start(prior or BandPrior(), Context(len(samples), image_size=SIDE, data_hash="one"))
    for i in range(0, len(samples), split):
        evaluation.update(default_collate(samples[i : i + split]))
    results = evaluation.finish()
    results.write(tmp_path, "gfid")
    print(results.table(tmp_path))
    evaluation.forget()
    return results


WITH_PROBE = {"classifier": "probe", "classifier_data": "somewhere"}


def test_a_probe_is_of_the_tokenizer_that_is_measured(monkeypatch):
    fitted = []
    monkeypatch.setattr(
        "flextok_pl.evaluation.generation.tokenizer_probe", lambda *given: fitted.append(given[3]) or probe()
    )
    evaluation = GenerationEvaluation(GenerationOptions(cache_dir=None, **WITH_PROBE))
    first, other = BandPrior(), BandPrior()
    other.reconstructor = BandTokenizer()
    for prior in (first, first, other):
        evaluation.start(prior, Context(12, image_size=SIDE, data_hash="one"))
        evaluation.forget()
    assert fitted == [first.reconstructor, other.reconstructor]


def test_values_files_and_table(tmp_path, capsys):
    results = evaluate(tmp_path, num_samples=300, cfg_scale=1.5, **WITH_PROBE)
    assert list(results.values) == [1, 2, 4]
    manifold = ["precision", "recall", "density", "coverage"]
    names = ["fd_bands", "kd_bands", "score_probe_bands", *manifold, "class_agreement"]
    assert list(results.values[1]) == [*names, "class_mean_agreement"]
    assert all(results.values[k]["class_agreement"] == 1 for k in (1, 2, 4)), "the first band is the class"
    assert 1.5 < results.values[1]["score_probe_bands"] < 3, "three classes, balanced, the probe not quite sure"
    records = json.loads((tmp_path / "gfid.json").read_text())
    assert len(records) == 3 * (len(names) + 1)
    first = records[0]
    assert (first["metric"], first["num_tokens"], first["num_samples"], first["full_rank"]) == (
        "fd_bands",
        1,
        300,
        True,
    )
    assert (first["cfg_scale"], first["conditions"], first["classifier"]) == (1.5, "balanced", "probe_bands")
    assert first["complete"] and first["image_size"] == [SIDE, SIDE]
    with (tmp_path / "gfid.csv").open() as file:
        assert [row["num_tokens"] for row in csv.DictReader(file)] == ["1", "2", "4"]
    for name in ("gfid.png", "gfid_grid.png"):
        assert Image.open(tmp_path / name).size[0] > 3 * SIDE
    assert "300 generated images, 12 real ones of test" in capsys.readouterr().out


def test_one_rollout_serves_every_budget(tmp_path):
    module = BandPrior()
    evaluate(tmp_path, module, num_samples=7, batch_size=4, budgets=[1, 2, 3, 4], temperature=0.9, top_k=5, top_p=0.8)
    sizes = [len(condition) for condition, *_ in module.asked]
    assert sizes == [3, 4, 3], "the picture's rows, then seven samples in two batches"
    assert {call[1:] for call in module.asked} == {(1.0, 0.9, 5, 0.8)}
    assert torch.cat([c for c, *_ in module.asked[1:]]).tolist() == [0, 1, 2, 0, 1, 2, 0], "balanced"


def test_results_do_not_depend_on_batches(tmp_path):
    options = {"num_samples": 20, **WITH_PROBE}
    first = evaluate(tmp_path, batch_size=20, **options).values
    second = evaluate(tmp_path, split=12, batch_size=3, **options).values
    for budget, metrics in first.items():
        for name, value in metrics.items():
            assert second[budget][name] == pytest.approx(value, rel=1e-6, abs=1e-9), (budget, name)
    assert evaluate(tmp_path, seed=1, **options).values != first


@pytest.mark.parametrize("kind", ["class", "text"])
def test_conditions_of_the_data(tmp_path, kind):
    module = BandPrior()
    module.condition_kind = kind
    results = evaluate(tmp_path, module, pictures(10, **WITH_TEXT), conditions="data", **WITH_PROBE)
    asked = torch.cat([condition for condition, *_ in module.asked[1:]])
    assert asked.tolist() == [i % CLASSES for i in range(10)]
    assert results.values[1]["class_agreement"] == 1
    with pytest.raises(ValueError, match="num_samples=5 is for balanced classes"):
        evaluate(tmp_path, module, pictures(10, **WITH_TEXT), conditions="data", num_samples=5)
    with pytest.raises(ValueError, match="these shards hold"):
        evaluate(tmp_path, module, pictures(10, other=range(CLASSES)), conditions="data")


def test_without_conditions(tmp_path):
    module = BandPrior()
    module.condition_kind, module.num_classes = "none", 0
    results = evaluate(tmp_path, module, grid_samples=2)
    assert "class_agreement" not in results.values[1]
    assert [len(condition) for condition, *_ in module.asked] == [2, 12]


def test_rows_of_the_picture(tmp_path):
    module = BandPrior()
    evaluate(tmp_path, module, shown=["blue", 0])
    assert module.asked[0][0].tolist() == [2, 0]
    assert Image.open(tmp_path / "gfid_grid.png").size[1] in range(2 * SIDE, 3 * SIDE + 10), "two rows"
    with pytest.raises(ValueError, match="class 'pink' is unknown"):
        evaluate(tmp_path, shown=["pink"])
    with pytest.raises(ValueError, match=r"class 3 is not in 0..2"):
        evaluate(tmp_path, shown=[3])


def test_a_classifier_of_other_classes(tmp_path):
    module = BandPrior()
    module.num_classes, module.class_names = 2, ("red", "green")
    with pytest.raises(ValueError, match="has 3 classes, but the prior has 2"):
        evaluate(tmp_path, module, **WITH_PROBE)


def test_captions_come_with_a_prior_of_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("flextok_pl.evaluation.generation.CLIPScore", lambda name: object())
    with pytest.raises(ValueError, match="clip='some' .*the prior's condition is 'class': leave clip out"):
        evaluate(tmp_path, clip="some")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": "some"}, "conditions='some'"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"classifier": "probe"}, "a probe needs real images"),
        ({"classifier_data": "x"}, "a probe needs real images"),
        ({"classifier_weights": "x.pth"}, r"classifier_weights='x.pth' has no effect with classifier=None: name"),
        ({**WITH_PROBE, "classifier_weights": "x.pth"}, "classifier='probe': name the timm model of the weights"),
        ({"budgets": [0]}, r"budgets=\[0\]"),
        ({"extractor": "nosuch"}, "extractor='nosuch'"),
        ({"guidance_scale": 2.0}, "no effect"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


@pytest.mark.parametrize("conditions", ["balanced", "data"])
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, conditions):
    options = {"conditions": conditions, "batch_size": 4, "save_every_minutes": 0, "budgets": [1, 4], "seed": 3}
    options |= {"num_samples": 22} if conditions == "balanced" else {}

    def run(name, deadline=None, cache="cache"):
        module = BandPrior(deadline)
        evaluate(tmp_path / name, module, cache_dir=tmp_path / cache, **options, **WITH_PROBE)
        files = [(tmp_path / name / file).read_bytes() for file in ("gfid.json", "gfid_grid.png")]
        return [len(asked[0]) for asked in module.asked], files

    whole, files = run("whole", cache="other")
    rows, parts = whole[0], whole[1:]
    for name, deadline in (("first", 4), ("second", 2)):  # within the third part; within the next but one
        with pytest.raises(Killed):
            run(name, deadline)
    rest, resumed_files = run("third")
    assert resumed_files == files
    assert rest == parts[3:], f"of {parts} after a picture of {rows} rows"
    assert not list((tmp_path / "cache").glob("unfinished_*"))


def pixels_of(data):
    return torch.stack([to_uint8(sample["image"]) for sample in data]).permute(0, 2, 3, 1).numpy()


def test_reference_of_a_file(tmp_path):
    """The split's own pictures as a file give the split's numbers; statistics alone only the Frechet distance."""
    data = pictures()
    of_split = evaluate(tmp_path, samples=data).values
    np.savez(tmp_path / "pictures.npz", arr_0=pixels_of(data))
    of_file = evaluate(tmp_path, samples=data, reference=tmp_path / "pictures.npz")
    assert of_file.values == {k: pytest.approx(found, rel=1e-6) for k, found in of_split.items()}
    record = json.loads((tmp_path / "gfid.json").read_text())[0]
    assert record["reference"]["num_samples"] == 12 and record["reference"]["source"].endswith("pictures.npz")

    features = MeanColour()(torch.from_numpy(pixels_of(data)).permute(0, 3, 1, 2)).double()
    statistics = {"mu": features.mean(0).numpy(), "sigma": features.T.cov().numpy()}
    np.savez(tmp_path / "statistics.npz", **statistics)
    evaluate(tmp_path, samples=data, reference=tmp_path / "statistics.npz")
    (record, *_) = json.loads((tmp_path / "gfid.json").read_text())
    assert record["metric"] == "fd_bands" and "kd_bands" not in (tmp_path / "gfid.csv").read_text()
    assert record["value"] == pytest.approx(of_split[1]["fd_bands"], rel=1e-6)
    assert len(record["reference"]["statistics_sha256"]) == 64

    np.savez(tmp_path / "larger.npz", arr_0=np.zeros((3, 20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images of \[20, 20\] and \[16, 16\] pixels are mixed"):
        evaluate(tmp_path, samples=data, reference=tmp_path / "larger.npz")
    with pytest.raises(ValueError, match=r"reference='folder' must be a \.npz file"):
        GenerationOptions(reference="folder")
    np.savez(tmp_path / "five.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="statistics of 5 features"):
        GenerationEvaluation(GenerationOptions(reference=tmp_path / "five.npz"))


def test_images_are_written_under_their_keys(tmp_path):
    evaluate(tmp_path, num_samples=7, images_dir=tmp_path / "images", budgets=[1, 4])
    written = sorted(file.relative_to(tmp_path / "images").as_posix() for file in tmp_path.rglob("images/*/*.png"))
    names = [f"class {i % 3} sample {i // 3}.png" for i in range(7)]
    assert written == sorted(f"k={k:03d}/{name}" for k in (1, 4) for name in names)
    with pytest.raises(ValueError, match="images_dir=.* holds images of an earlier evaluation"):
        evaluate(tmp_path, num_samples=5, images_dir=tmp_path / "images", budgets=[1, 4])
    image = Image.open(tmp_path / "images" / "k=001" / "class 1 sample 0.png")
    assert image.size == (SIDE, SIDE) and np.array(image)[0, 0].argmax() == 1, "green"


def test_all_processes_ask_whether_the_folder_is_empty(tmp_path, monkeypatch):
    """One that resumes asks, too, or the others would wait for it; if one resumes, all go on with its folder."""
    asked = []
    monkeypatch.setattr("flextok_pl.evaluation.generation.all_agree", lambda flag: asked.append(flag) or flag)
    options = {"budgets": [1], "batch_size": 4, "cache_dir": tmp_path, "save_every_minutes": 0}
    options["images_dir"] = tmp_path / "images"

    def start():
        evaluation = GenerationEvaluation(GenerationOptions(**options))
        evaluation.start(BandPrior(), Context(12, image_size=SIDE, data_hash="one"))

    with pytest.raises(Killed):
        evaluate(tmp_path, BandPrior(deadline=3), **options)
    assert asked == [True, True], "no samples yet, and no images"
    start()
    assert asked[2:] == [False]
    (state,) = tmp_path.glob("unfinished_*")
    state.unlink()
    monkeypatch.setattr("flextok_pl.evaluation.generation.all_agree", lambda flag: False)  # another process resumes
    start()


def test_images_that_no_process_made(tmp_path, monkeypatch):
    monkeypatch.setattr("flextok_pl.evaluation.generation.world_size", lambda: 6)
    with pytest.raises(RuntimeError, match="2 images were generated instead of 12.*use fewer devices"):
        evaluate(tmp_path)
    assert not (tmp_path / "gfid.json").exists()
