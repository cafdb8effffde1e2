"""TensorBoard shows evaluations and compares trainings, asked of its server and seen in a browser."""

import json
import multiprocessing
import re
import shutil
import subprocess
import threading
import time
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from tensorboard import program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flextok_pl.callbacks.hparams import write_hparams
from flextok_pl.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVALUATIONS = ("tokenizer/tiny/version_2", "tokenizer/tiny/version_3")


@pytest.fixture(scope="module")
def runs(tiny, tiny_tokenizer, tmp_path_factory):
    """Two trainings, of which the second went on, two evaluations, and a run with other options."""
    folder = tmp_path_factory.mktemp("place")
    quick = {"rfid.cache_dir": None, "rfid.num_steps": 1, "codebook": None}
    budgets = {"rfid.budgets": [1, 2, 4, 16], "rfid.fit_budgets": [1, 2, 4, 16]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(tiny("fit", {"trainer.max_steps": 1, "model.lr": 1e-3, "rfid": None, "codebook": None}))
        for steps, start in ((1, None), (2, "last")):
            main(tiny("fit", quick | budgets | {"trainer.max_steps": steps, "model.lr": 2e-3, "ckpt_path": start}))
        for steps, tested in ((1, [1, 4, 16]), (2, [1, 2, 16])):
            given = {"tokenizer": str(tiny_tokenizer), "rfid.num_steps": steps, "rfid.budgets": tested, "codebook": {}}
            main(tiny("test", quick | given | {"trainer.limit_test_batches": 1.0}))
    write_hparams(folder / "runs/other", {"depth": 3, "nested": {"list": [1, 2]}}, {"val/loss": 0.5, "x": 1.0})
    return folder / "runs"


@pytest.fixture(scope="module")
def server(runs):
    """Address of a TensorBoard, in a process of its own, since its threads never end."""

    def serve(sender):
        board = program.TensorBoard()
        board.configure(argv=["", "--logdir", str(runs), "--port", "0", "--load_fast", "false"])
        sender.send(board.launch())
        threading.Event().wait()

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(sender,))
    process.start()
    sender.close()
    url = receiver.recv()
    for _ in range(200):  # until the server has read the events
        if set(EVALUATIONS) <= json.loads(asked(url, "images/tags")).keys():
            break
        time.sleep(0.1)
    yield url
    process.kill()
    process.join()


def asked(server, path, **options):
    with urlopen(f"{server}data/plugin/{path}?{urlencode(options)}", timeout=60) as answer:
        return answer.read()


def layout(server):
    """Title of each group of charts -> its charts."""
    return {each["title"]: each["chart"] for each in json.loads(asked(server, "custom_scalars/layout"))["category"]}


def matching(chart, scalars):
    """The scalars that a chart shows: those in which one of its patterns is found."""
    return sorted(tag for tag in scalars if any(re.search(pattern, tag) for pattern in chart["multiline"]["tag"]))


def test_the_server_has_layout_curves_and_pictures(server):
    run = EVALUATIONS[0]
    pictures = json.loads(asked(server, "images/tags"))[run]
    assert set(pictures) == {"test/reconstructions", "test/codes/entropy_by_position"}
    for tag in pictures:
        (picture,) = json.loads(asked(server, "images/images", run=run, tag=tag, sample=0))
        with urlopen(f"{server}data/plugin/images/individualImage?{picture['query']}", timeout=60) as answer:
            shown = Image.open(answer)
            assert shown.format == "PNG" and len(shown.convert("RGB").getcolors(1 << 20)) > 10, "it shows something"
    assert json.loads(asked(server, "histograms/tags"))[run].keys() == {"test/codes/tokens"}
    assert set(layout(server)) >= {f"test: reconstructions {by} token budget" for by in ("by", "against")}
    scalars = {tag for each in json.loads(asked(server, "scalars/tags")).values() for tag in each}
    charts = layout(server)["test: reconstructions by token budget"]
    shown = [(chart["title"], matching(chart, scalars)) for chart in charts]
    assert ("mse", [f"test/mse/k={budget:03d}" for budget in (1, 4, 16)]) in shown, "and no mse_over_variance"
    assert all(tags for _, tags in shown)


def test_one_chart_overlays_the_budget_curves_of_several_runs(server):
    (title,) = (each for each in layout(server) if each.startswith("test") and "against" in each)
    charts = {chart["title"]: chart for chart in layout(server)[title]}
    assert len(charts) == len(layout(server)[title]), "the runs share their charts"
    curves = {}
    for run, tags in json.loads(asked(server, "scalars/tags")).items():
        for tag in matching(charts["psnr"], tags):
            points = json.loads(asked(server, "scalars/scalars", run=run, tag=tag))
            curves[run] = {int(step): value for _, step, value in points}
    assert {run: list(curve) for run, curve in curves.items()} == {
        f"{EVALUATIONS[0]}/charts/rfid": [1, 4, 16],
        f"{EVALUATIONS[1]}/charts/rfid": [1, 2, 16],
    }
    points = json.loads(asked(server, "scalars/scalars", run=EVALUATIONS[1], tag="test/psnr/k=002"))
    assert curves[f"{EVALUATIONS[1]}/charts/rfid"][2] == pytest.approx(points[-1][2])


def browsed(address, folder, *options):
    """What Chromium prints of a page."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to open TensorBoard in")
    options = [*options, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    command = [CHROMIUM, *options, "--window-size=1400,3000", "--virtual-time-budget=20000", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_browser_draws_a_line_for_each_run(server, tmp_path):
    browsed(f"{server}#custom_scalars", tmp_path, f"--screenshot={tmp_path}/page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    charts = pixels[100:, 400:].reshape(-1, 3)  # beside the options, below the bar
    colours, counts = np.unique(charts[np.ptp(charts, axis=1) > 80], axis=0, return_counts=True)
    assert (counts > 200).sum() >= 3, f"icons, and lines of two colours: {colours[counts > 200]}"


def test_a_browser_shows_pictures(server, tmp_path):
    page = browsed(f"{server}#timeseries", tmp_path, "--dump-dom")
    assert re.search(r'<img[^>]+src="data/plugin/timeseries/imageData', page), "no picture"
    assert page.count("<line-chart") + page.count("<canvas") >= 3, "no charts"


def posted(server, path, **request):
    headers = {"Content-Type": "application/json"}
    question = Request(f"{server}data/plugin/hparams/{path}", json.dumps(request).encode(), headers)
    with urlopen(question, timeout=60) as answer:
        return json.loads(answer.read())


def rows(server, count):
    """The HParams tab: names of its columns, and each run's options and results."""
    for _ in range(100):
        experiment = posted(server, "experiment", experimentName="")
        groups = posted(server, "session_groups", allowedStatuses=["STATUS_UNKNOWN"], startIndex=0, sliceSize=count + 1)
        if len(groups.get("sessionGroups", [])) == count:
            break
        time.sleep(0.2)
    columns = (
        {each["name"] for each in experiment["hparamInfos"]},
        {m["name"]["tag"] for m in experiment["metricInfos"]},
    )
    found = {
        group["name"]: (group["hparams"], {each["name"]["tag"]: each["value"] for each in group["metricValues"]})
        for group in groups["sessionGroups"]
    }
    return columns, found


def test_the_hparams_tab_compares_trainings(server, runs):
    first, second = (f"runs/tokenizer/tiny/version_{number}" for number in range(2))
    (options, metrics), found = rows(server, 3)
    assert set(found) == {first, second, f"{runs}/other"}, "one row a run, also of one that went on"
    assert {"lr", "net.num_registers", "batch_size", "max_steps", "depth", "nested.list"} <= options
    assert not [name for name in options if name.startswith(("net.vae", "_"))]
    assert metrics == {"train/loss", "val/loss", "x", *(f"val/kd_effnet_lite0/k={k:03d}" for k in (1, 4, 16))}
    assert [found[run][0]["lr"] for run in (first, second)] == [1e-3, 2e-3]
    assert found[second][0]["max_steps"] == 2

    events = EventAccumulator(str(runs.parent / second)).Reload()
    logged = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert "hp_metric" not in logged
    shown = found[second][1]
    assert set(shown) == metrics - {"x"}
    for tag in shown.keys() & logged.keys():
        assert shown[tag] == pytest.approx(logged[tag]), "the last value"
    assert "val/loss" in logged
