"""What experiments fetch, from their files; and what the command says of it."""

import ast
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import constants

from flextok_pl import modules
from flextok_pl.cli import main
from flextok_pl.cli.prefetch import GROUPS, MODELS, PrefetchCLI, Wanted, prefetch, wanted
from flextok_pl.cli.training import run_cli
from flextok_pl.data import ShardDataModule
from flextok_pl.data.shards.copies import SetCopy
from flextok_pl.data.shards.index import INDEX_NAME, ShardError, ShardIndex
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.downloads import Download, Part, Places
from flextok_pl.errors import UserError

ROOT = Path(__file__).parents[2]
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
FETCHED = {
    "experiments/tokenizer/d18_d28_imagenet.yaml": {
        "model.vae": "EPFL-VILAB/flextok_vae_c16",
        "model.teacher": "timm/vit_large_patch14_dinov2.lvd142m",
        "rfid.extractor": INCEPTION,
    },
    "experiments/vae/imagenet_c16.yaml": {
        "model.perceptual_network": "https://download.pytorch.org/models/vgg16-397923af.pth"
    },
    "experiments/prior/imagenet_class.yaml": {
        "model.tokenizer": "EPFL-VILAB/flextok_d18_d28_in1k",
        "gfid.extractor": INCEPTION,
        "gfid.classifier": "timm/resnet50.a1_in1k",
    },
    "experiments/prior/text_t5.yaml": {
        "model.tokenizer": "EPFL-VILAB/flextok_d18_d28_dfn",
        "model.text_encoder": "google/flan-t5-xl",
        "gfid.extractor": INCEPTION,
        "gfid.clip": "openai/clip-vit-large-patch14",
    },
}
"""Experiment -> option -> what it fetches; `smoke/test_experiments.py` asks all experiments."""


def listed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Wanted]:
    found: list[Wanted] = []
    monkeypatch.setattr(PrefetchCLI, "run", lambda cli: found.extend(wanted(cli.config)))
    run_cli(PrefetchCLI, "fit", arguments)
    return found


@pytest.mark.parametrize("experiment", FETCHED)
def test_large_experiments_say_what_it_fetches(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = {option: download.title for option, download in listed(monkeypatch, "--config", experiment)}
    assert found == FETCHED[experiment]


def test_options_that_change_what_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = {
        "model.teacher": "null",
        "model.vae": "flextok_pl/assets/vae_demo",
        "model.init_from": "me/mine@v2",
        "rfid.extractor": "dinov2-vit-b-14",
        "rfid.lpips": "true",
        "rfid.dreamsim": "ensemble",
        "data.train": '["https://host/a","data/b","pipe:cat {name}"]',
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    found = listed(monkeypatch, "--config", "experiments/tokenizer/d18_d28_imagenet.yaml", *arguments)
    assert [(option, download.title) for option, download in found] == [
        ("model.init_from", "me/mine@v2"),
        ("rfid.extractor", "https://github.com/facebookresearch/dinov2"),
        ("rfid.extractor", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
        ("rfid.lpips", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
        ("rfid.dreamsim", "https://github.com/ssundaram21/dreamsim/releases: ensemble"),
        ("data.train", "https://host/a"),
        ("data.train", "pipe:cat {name}"),
    ]


def test_no_loader_and_no_model_is_forgotten() -> None:
    """Each option by which `Pretrained` names a network is known here, but for those of a search."""
    options = set()
    for file in (ROOT / "flextok_pl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Pretrained" and node.args:
                name = node.args[0]
                options.add(name.value if isinstance(name, ast.Constant) else "clip")
    known = {option for group in (*MODELS.values(), *GROUPS.values()) for option in group}
    assert options - {"verifier", "image_reward_tokenizer"} <= known | {"lpips_network"}
    assert set(MODELS) == set(modules.__all__)


class Pretended(Download):
    """A download whose network fails a number of times."""

    def __init__(self, title: str, failures: int = 0, size: int | None = 1_234_567) -> None:
        self.name, self.failures, self.size, self.here = title, failures, size, False

    @property
    def title(self) -> str:
        return self.name

    def parts(self, places: Places) -> list[Part]:
        return [Part("a", self.size, self.here), Part("b", 0, True)]

    def fetch(self, places: Places) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host")
        self.here = True


def test_a_failure_names_the_item_and_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = [Wanted("model.vae", Pretended("a/vae", failures=1)), Wanted("rfid.extractor", Pretended("an/extractor"))]
    with pytest.raises(UserError, match=r"2 of 2 are missing: a/vae, an/extractor; run it without --check"):
        prefetch(items, str(tmp_path), check=True)
    said = capsys.readouterr().out
    assert "model.vae: a/vae: missing a, 1.23 MB" in said and f"export HF_HOME={tmp_path}/huggingface" in said
    with pytest.raises(UserError, match=r"1 of 2 are missing: a/vae; run the same command again"):
        prefetch(items, str(tmp_path))
    said = capsys.readouterr().out
    assert "model.vae: a/vae: failed, ConnectionError: no route to host" in said
    assert "rfid.extractor: an/extractor: fetched, 1.23 MB" in said
    prefetch(items)
    said = capsys.readouterr().out
    assert "a/vae: fetched" in said and "an/extractor: is here" in said and "export" not in said
    prefetch(items, str(tmp_path), check=True)
    prefetch([], str(tmp_path))
    assert capsys.readouterr().out.endswith("this experiment fetches nothing\n")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main(["prefetch", "--config", "experiments/tokenizer/tiny.yaml", "--to", str(tmp_path)])
    assert capsys.readouterr().out == "this experiment fetches nothing\n"
    with pytest.raises(SystemExit, match=r"3 of 3 are missing: EPFL-VILAB/flextok_vae_c16, timm/vit_large"):
        main(["prefetch", "--config", "experiments/tokenizer/d18_d28_imagenet.yaml", "--to", str(tmp_path), "--check"])
    assert "model.vae: EPFL-VILAB/flextok_vae_c16: missing, of unknown size\n" in capsys.readouterr().out


@pytest.fixture
def address(image_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the shards are served."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    handler: Any = partial(Quiet, directory=str(image_shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_shard_sets_are_copied(
    address: str,
    image_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = SetCopy(f"{address}/{{train,val}}")
    places = Places.below(tmp_path)
    assert copy.parts(places) and not any(part.here for part in copy.parts(places))
    prefetch([Wanted("data.train", copy)], str(tmp_path))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  --data.train"))
    pattern = line.split()[1].strip("'")
    assert [index.digest() for index in load_indices(pattern)] == [
        ShardIndex.load(image_shards / split).digest() for split in ("train", "val")
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert all(part.here for part in copy.parts(places)), "the copy says so itself"
    data = ShardDataModule(test=pattern, image_size=32)
    assert data.num_samples("test") == sum(index.num_samples for index in load_indices(pattern))


def test_a_copy_goes_on_and_a_set_that_was_written_again_comes_anew(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, places = SetCopy(f"{address}/train"), Places.below(tmp_path)
    copy.fetch(places)
    place = copy.folder(places) / "000"
    index = ShardIndex.load(place)
    (place / INDEX_NAME).replace(place / f".{INDEX_NAME}")  # as a kill before the last shard leaves it
    (place / index.shards[-1].name).unlink()
    kept = {shard.name: (place / shard.name).stat().st_mtime_ns for shard in index.shards[:-1]}
    assert [part.here for part in copy.parts(places)].count(False) == 1
    copy.fetch(places)
    assert {name: (place / name).stat().st_mtime_ns for name in kept} == kept
    assert ShardIndex.load(place).digest() == index.digest()
    text = (place / INDEX_NAME).read_text()
    (place / INDEX_NAME).write_text(text.replace('"fields"', '"fields" '))
    (place / "left.tar").touch()
    item = Wanted("data.train", copy)
    prefetch([item], str(tmp_path))
    assert (place / INDEX_NAME).read_text() == text and not (place / "left.tar").exists()
    (place / index.shards[0].name).write_bytes(b"cut")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [part.here for part in copy.parts(places)].count(False) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    prefetch([item], str(tmp_path))
    assert ShardIndex.load(place).digest() == index.digest()
    monkeypatch.setattr("flextok_pl.data.shards.copies.load_indices", Mock(side_effect=ShardError("unreachable")))
    assert all(part.here for part in copy.parts(places))


def test_a_copy_needs_a_folder(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="1 of 1 are missing"):
        prefetch([Wanted("data.val", SetCopy(f"{address}/val"))])
    assert "failed, ValueError: a copy of a shard set needs --to FOLDER" in capsys.readouterr().out
