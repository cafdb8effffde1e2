"""TensorBoard shows an evaluation: layout, curves and pictures, asked of its server and seen in a browser."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from tensorboard import program

from flextok_pl.cli import main
from flextok_pl.interop import save_pretrained
from flextok_pl.models.config import FlexTokConfig
from flextok_pl.models.tokenizer import FlexTok

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "tokenizer" / "tiny.yaml"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(image_shards, tmp_path_factory):
    """Address of a TensorBoard that shows the runs of one evaluation."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = save_pretrained(FlexTok(FlexTokConfig.preset("tiny")), folder / "tiny.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(
            [
                *("test", "--config", str(EXPERIMENT), "--tokenizer", str(tokenizer)),
                *("--data.val", str(image_shards / "val"), "--rfid.num_steps", "1", "--rfid.budgets", "[1,4,16]"),
                *("--rfid.cache_dir", "null", "--trainer.enable_progress_bar", "false", "--trainer.limit_test_batches"),
                *("1.0", "--codebook", "{}"),
            ]
        )
    board = program.TensorBoard()
    board.configure(argv=["", "--logdir", str(folder / "runs"), "--port", "0", "--load_fast", "false"])
    return board.launch()


def asked(server, path, **options):
    with urlopen(f"{server}data/plugin/{path}?{urlencode(options)}", timeout=60) as answer:
        return answer.read()


def when_loaded(server):
    """The runs and their pictures, as soon as the server has read the events."""
    for _ in range(100):
        tags = json.loads(asked(server, "images/tags"))
        if tags:
            return tags
        time.sleep(0.2)
    raise AssertionError("TensorBoard has read nothing")


def test_the_server_has_layout_curves_and_pictures(server):
    ((run, pictures),) = when_loaded(server).items()
    assert set(pictures) == {"test/reconstructions", "test/codes/entropy_by_position"}
    for tag in pictures:
        (picture,) = json.loads(asked(server, "images/images", run=run, tag=tag, sample=0))
        with urlopen(f"{server}data/plugin/images/individualImage?{picture['query']}", timeout=60) as answer:
            content = answer.read()
        assert content.startswith(b"\x89PNG") and len(content) > 2000
    (category,) = json.loads(asked(server, "custom_scalars/layout"))["category"]
    assert category["title"] == "test: reconstructions by token budget"
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    assert charts["psnr"] == [f"test/psnr/k={budget:03d}" for budget in (1, 4, 16)]
    scalars = json.loads(asked(server, "scalars/tags"))[run]
    assert {tag for tags in charts.values() for tag in tags} <= set(scalars), "each curve of the layout has values"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open TensorBoard in")
def test_a_browser_shows_them(server, tmp_path):
    when_loaded(server)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1400,3000"]
    command = [CHROMIUM, *options, "--virtual-time-budget=20000", "--dump-dom", f"{server}#timeseries"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r'<img[^>]+src="data/plugin/timeseries/imageData', page), "no picture"
    assert page.count("<line-chart") + page.count("<canvas") >= 3, "no charts"
