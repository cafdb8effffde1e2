"""`flextok report`: the page holds what the evaluation left, and a browser shows it."""

import base64
import json
import re
import shutil
import subprocess

import pytest
import torch

from flextok_pl.cli import main
from flextok_pl.evaluation.pictures import save_png

BUDGETS, SIZE = (1, 4, 16), 64
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def records(metrics, **protocol):
    protocol = {"num_samples": 9, "image_size": [SIZE, SIZE], "guidance": "cfg", "seed": 0, **protocol}
    return [
        {"metric": metric, "value": number + 1 / budget, "num_tokens": budget, **protocol}
        for budget in BUDGETS
        for number, metric in enumerate(metrics)
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rfid.json").write_text(json.dumps(records(["fd_x", "psnr"], extractor="<x>")))
    (tmp_path / "gfid.json").write_text(json.dumps(records(["fd_x", "precision", "recall"])))
    tokens = [{"metric": "codes_use", "value": 0.25, "num_samples": 9}]
    tokens += [{"metric": "position_entropy", "value": 1.5, "position": 1, "num_samples": 9}]
    (tmp_path / "codes.json").write_text(json.dumps(tokens))
    for name in ("grid.png", "extremes.png", "gfid_grid.png", "codes.png"):
        save_png(torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8), tmp_path / name)
    return tmp_path


def page_of(folder, *options):
    main(["report", str(folder), *options])
    return (folder / "report.html").read_text()


def test_the_page_is_complete_and_stands_alone(folder):
    page = page_of(folder)
    assert page.count("<svg") == 2
    assert [text in page for text in ("fd_x", "psnr", "precision", "1.2500")] == [True] * 4
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    files = [(folder / name).read_bytes() for name in ("grid.png", "extremes.png", "gfid_grid.png", "codes.png")]
    assert pictures == files
    assert "&quot;&lt;x&gt;&quot;" in page, "what records say is escaped"
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]+", page), "nothing is fetched"
    assert page_of(folder) == page, "the same results make the same page"


def test_published_numbers_only_where_they_compare(folder, capsys):
    assert "TiTok" not in page_of(folder)
    with pytest.raises(SystemExit, match=r"images of \[64, 64\] and \['fd_x', 'psnr'\]"):
        main(["report", str(folder), "--dataset", "imagenet256"])
    (folder / "gfid.json").unlink()
    few = records(["frechet_inception_distance"], image_size=[256, 256], num_samples=10_000)
    (folder / "rfid.json").write_text(json.dumps(few))
    with pytest.raises(SystemExit, match=r"10000 images of \[256, 256\].*of 50000"):
        main(["report", str(folder), "--dataset", "imagenet256"])
    comparable = records(["frechet_inception_distance"], image_size=[256, 256], num_samples=50_000)
    (folder / "rfid.json").write_text(json.dumps(comparable))
    page = page_of(folder, "--dataset", "imagenet256")
    assert page.count("TiTok L-32") >= 2, "in the chart and in the table"
    assert "arXiv 2406.07550" in page and "2.77" not in page, "no gFID beside an rFID"


def test_nothing_to_report(tmp_path):
    with pytest.raises(SystemExit, match=r"has neither rfid.json nor gfid.json: run .*make eval-fid"):
        main(["report", str(tmp_path)])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
def test_a_browser_shows_charts_and_pictures(folder, tmp_path):
    script = (
        "<script>addEventListener('load', () => {const shown = [...document.querySelectorAll('img, svg')]"
        ".map(e => e.getBoundingClientRect()).filter(r => r.width > 20 && r.height > 10).length;"
        "const loaded = [...document.images].filter(i => i.naturalWidth == 30).length;"
        "document.title = `shown ${shown} loaded ${loaded}`})</script>"
    )
    file = tmp_path / "tested.html"
    file.write_text(page_of(folder).replace("</body>", f"{script}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>shown 6 loaded 4</title>" in done.stdout
