"""`flextok fid` and `flextok compare` through the front door, on real pictures.

Tolerance against torch-fidelity: 1e-5, relative or absolute: 24 images leave the covariance singular, where its matrix
root turns rounding of 1e-16 into 1e-8 for each of 2,048 eigenvalues. It shuffles before it splits for the inception
score, so one split is compared.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import calculate_metrics

from flextok_pl.backbones.extractors import build_extractor
from flextok_pl.cli import main
from flextok_pl.data import write_folder
from flextok_pl.metrics.frechet import features_to_statistics

EFFNET = ("--extractor", "effnet-lite0")


def measure(tmp_path, *arguments):
    """Metric -> record."""
    file = tmp_path / "records.json"
    main(["fid", *map(str, arguments), "--num-workers", "0", "--json", str(file)])
    return {record["metric"]: record for record in json.loads(file.read_text())}


def values(records):
    return {name: record["value"] for name, record in records.items()}


def refused(capsys, *arguments):
    """The message with which the command refuses."""
    with pytest.raises(SystemExit) as stop:
        main(["fid", *map(str, arguments), "--num-workers", "0"])
    return str(stop.value)


def test_agrees_with_torch_fidelity(tmp_path, emoji_folder, inception_file):
    a, b = emoji_folder / "a", emoji_folder / "b"
    theirs = calculate_metrics(
        input1=str(a),
        input2=str(b),
        cuda=False,
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        **{"isc_splits": 1, "kid_subsets": 1, "kid_subset_size": 24},
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        save_cpu_ram=True,
        verbose=False,
        cache=False,
    )
    ours = values(measure(tmp_path, a, b, "--weights", inception_file, "--inception-splits", 1))
    expected = {
        "frechet_inception_distance": theirs["frechet_inception_distance"],
        "kernel_inception_distance": theirs["kernel_inception_distance_mean"],
        "inception_score": theirs["inception_score_mean"],
        "precision": theirs["precision"],
        "recall": theirs["recall"],
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert set(ours) - set(expected) == {"density", "coverage"}


def test_sources_batches_and_workers_change_nothing(tmp_path, emoji_folder, capsys):
    a, b = emoji_folder / "a", emoji_folder / "b"
    records = measure(tmp_path, a, b, *EFFNET)
    printed = capsys.readouterr().out
    assert "fd_effnet_lite0" in printed and "(24 images)" in printed and "covariance is singular" in printed
    first = records["fd_effnet_lite0"]
    assert first["num_samples"] == first["reference"]["num_samples"] == 24
    assert first["image_size"] == [48, 48] and not first["full_rank"] and first["crop"] is None
    again = measure(tmp_path, a, b, *EFFNET)
    assert again == records, "bit-equal"

    expected = pytest.approx(values(records), rel=1e-6)
    assert values(measure(tmp_path, a, b, *EFFNET, "--batch-size", 7)) == expected
    assert values(measure(tmp_path, a, b, *EFFNET, "--num_workers", 2, "--batch-size", 5)) == expected
    shards = tmp_path / "shards"
    write_folder(a, shards, labels="none", num_workers=1, samples_per_shard=10)
    from_shards = measure(tmp_path, f"{shards}/*.tar", b, *EFFNET, "--image-size", 48)
    assert values(from_shards) == expected
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(b.iterdir())])
    np.savez(tmp_path / "b.npz", arr_0=pixels)
    from_array = measure(tmp_path, a, tmp_path / "b.npz", *EFFNET)
    assert values(from_array) == pytest.approx(values(records), rel=1e-6)


def test_reference_statistics(tmp_path, emoji_folder):
    a, b = emoji_folder / "a", emoji_folder / "b"
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(b.iterdir())])
    features = build_extractor("effnet-lite0")(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    statistics = features_to_statistics(features)
    moments = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    np.savez(tmp_path / "b.npz", **moments)
    whole = measure(tmp_path, a, b, *EFFNET)
    alone = measure(tmp_path, a, tmp_path / "b.npz", *EFFNET)
    assert list(alone) == ["fd_effnet_lite0"]
    assert alone["fd_effnet_lite0"]["value"] == pytest.approx(whole["fd_effnet_lite0"]["value"], rel=1e-6)
    assert alone["fd_effnet_lite0"]["reference"]["num_samples"] is None
    # A file with both: the statistics are the distance's, the pictures all other metrics'.
    moments["mu"] = moments["mu"] + 1
    np.savez(tmp_path / "both.npz", arr_0=pixels, **moments)
    both = values(measure(tmp_path, a, tmp_path / "both.npz", *EFFNET))
    assert both.pop("fd_effnet_lite0") > whole["fd_effnet_lite0"]["value"] + 100
    assert both == pytest.approx({name: v for name, v in values(whole).items() if name in both}, rel=1e-6)
    assert len(both) == 5


def test_what_cannot_be_measured_is_refused(tmp_path, emoji_folder, capsys):
    a = emoji_folder / "a"

    def message(source, *options):
        return refused(capsys, source, a, *EFFNET, *options)

    one = tmp_path / "one"
    one.mkdir()
    assert "holds no images" in message(one)
    Image.new("RGB", (48, 48)).save(one / "1.png")
    assert "has 1 image; a distance needs two" in message(one)
    Image.new("RGB", (20, 30)).save(one / "2.png")
    assert "2.png 20 x 30; give image_size" in message(one)
    (one / "2.png").write_bytes((one / "1.png").read_bytes()[:60])
    assert f"{one / '2.png'}: not a complete picture" in message(one)
    assert "nowhere: there is no such file or folder" in message(tmp_path / "nowhere")
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert "statistics of 5 features, but extractor='effnet-lite0' has 1280" in message(tmp_path / "narrow.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(1280, np.nan), sigma=np.eye(1280))
    assert "NaN" in message(tmp_path / "nan.npz")
    np.savez(tmp_path / "other.npz", data=np.zeros(5))
    assert "holds ['data']; it needs pictures (arr_0) or mu and sigma" in message(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    assert "arr_0 is float64 (2, 4, 4, 3)" in message(tmp_path / "floats.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    assert "cannot be read as a .npz file" in message(tmp_path / "broken.npz")
    np.save(tmp_path / "array.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    assert "write it with numpy.savez" in message(tmp_path / "array.npz")
    assert "image_size=0 must be a side of at least 1 pixel" in message(a, "--image-size", 0)
    assert "batch_size=0 must be at least 1" in message(a, "--batch-size", 0)
    assert "extractor='vgg' is unknown" in refused(capsys, a, a, "--extractor", "vgg")
    assert "weights=none.pth: there is no such file" in refused(capsys, a, a, "--weights", "none.pth")


def test_inception_weights_are_not_to_be_had_offline(capsys, emoji_folder, monkeypatch):
    monkeypatch.setattr("urllib.request._opener", None)  # which keeps the proxies of its first use
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    message = refused(capsys, emoji_folder / "a", emoji_folder / "b")
    assert "cannot be loaded" in message and "weights=PATH" in message and "effnet-lite0" in message


def test_records_are_compared(tmp_path, emoji_folder, capsys):
    a, b = emoji_folder / "a", emoji_folder / "b"
    measure(tmp_path, a, b, *EFFNET)
    first = (tmp_path / "records.json").rename(tmp_path / "first.json")
    measure(tmp_path, a, b, *EFFNET, "--image-size", "[32,48]")
    capsys.readouterr()
    main(["compare", str(first), str(tmp_path / "records.json")])
    printed = capsys.readouterr().out
    assert "differs in image_size: [48, 48] and [32, 48]" in printed
    assert "differs in crop: None and largest centre window of height to width 32:48, antialiased bicubic" in printed
    assert "differs in extractor" not in printed
    main(["compare", str(first), str(first)])
    assert "the protocols are the same" in capsys.readouterr().out
    for content, complaint in (("[{}]", "is not a list of records"), ("[", "cannot be read as records")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SystemExit, match=complaint):
            main(["compare", str(first), str(tmp_path / "bad.json")])


def test_records_of_many_settings_are_compared_one_by_one(tmp_path, capsys):
    """Positions of tokens, or steps of the decoder, are no differences of protocol within a file."""
    records = [
        {"metric": "kd", "value": float(steps + k), "num_tokens": k, "num_steps": steps, "bits_per_image": k, "seed": 0}
        for k in (1, 4)
        for steps in (5, 25)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(records))
    (tmp_path / "one.json").write_text(json.dumps([{**records[3], "value": 7.0, "bits_per_image": 64, "seed": 1}]))
    main(["compare", str(tmp_path / "sweep.json"), str(tmp_path / "sweep.json")])
    printed = capsys.readouterr().out
    assert printed.count("kd") == 4 and "the protocols are the same" in printed
    main(["compare", str(tmp_path / "sweep.json"), str(tmp_path / "one.json")])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["metric", "num_steps", "tokens", "first", "second"]
    assert rows[0].split() == ["kd", "25", "4", "29.0000", "7.0000"]
    assert rows[1:] == ["differs in bits_per_image: 4 and 64", "differs in seed: 0 and 1"]


def test_either_side_has_a_pool_of_its_own(tmp_path, emoji_folder):
    """Of a large set only some features are kept, and of a small one all, which a manifold needs at least six of."""
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted((emoji_folder / "b").iterdir())[:8]:
        (few / file.name).write_bytes(file.read_bytes())
    assert "recall" in measure(tmp_path, emoji_folder / "a", few, *EFFNET, "--pool-size", 8)
