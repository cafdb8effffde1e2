"""Files are fetched once, go on where they stopped, and lie where the libraries that use them look."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import timm
import torch
from hub_helpers import Hub, running_hub
from huggingface_hub import constants
from model_helpers import randomized
from safetensors.torch import save_file

from flextok_pl.backbones.extractors import extractor_downloads
from flextok_pl.backbones.networks import LPIPS_NETWORKS, timm_downloads
from flextok_pl.backbones.pretrained import transformers_files
from flextok_pl.config import FlexTokConfig
from flextok_pl.downloads import HubRepository, Part, Places, TorchHubCode, UrlFile, environment
from flextok_pl.interop import TOKENIZER_FORMATS
from flextok_pl.models.pretrained import model_downloads
from flextok_pl.models.text import TextEncoder, text_encoder_downloads
from flextok_pl.models.vae import VAE, autoencoder_downloads

T5 = Path(__file__).parents[1] / "parity" / "golden" / "flexar_text_a" / "t5_tiny"


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `content`, or what is asked of it; `breaks_after` ends a connection after so many bytes."""

    content = bytes(range(256)) * 40
    breaks_after: int | None = None
    ranges = True
    asked: list[tuple[str, str | None]]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        kind = type(self)
        wanted = self.headers.get("Range")
        kind.asked.append((self.command, wanted))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if wanted and start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        if body:
            self.wfile.write(self.content[start : self.breaks_after])
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Files]]]:
    """Its address, and what answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    handler = type("Answering", (Files,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", handler
        running.shutdown()
        thread.join()


def digest() -> str:
    return hashlib.sha256(Files.content).hexdigest()


def test_a_file_comes_once_and_goes_on_where_it_stopped(server: tuple[str, type[Files]], tmp_path: Path) -> None:
    address, handler = server
    places, file = Places.below(tmp_path), UrlFile(f"{address}/net-{digest()[:8]}.pth?v=1")
    assert file.name == f"net-{digest()[:8]}.pth"
    assert file.parts(places) == [Part(file.name, len(Files.content), False)]
    handler.breaks_after = 1000
    with pytest.raises(
        OSError, match=r"net-.* the connection ended after 1,000 of 10,240 bytes; run it again to continue"
    ):
        file.fetch(places)
    handler.breaks_after = None
    path = file.fetch(places)
    assert path.read_bytes() == Files.content and handler.asked[-1] == ("GET", "bytes=1000-")
    assert file.parts(places) == [Part(file.name, len(Files.content), True)]
    asked = len(handler.asked)
    assert file.fetch(places) == path and len(handler.asked) == asked, "it is there"
    assert {each.name for each in path.parent.iterdir()} <= {path.name, f".{path.name}.lock"}


def test_a_server_without_ranges_sends_all_again(server: tuple[str, type[Files]], tmp_path: Path) -> None:
    address, handler = server
    places, file = Places.below(tmp_path), UrlFile(f"{address}/net.pth")
    part = tmp_path / "torch" / "hub" / "checkpoints" / ".net.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"xyz")
    handler.ranges = False
    assert file.fetch(places).read_bytes() == Files.content


def test_a_part_that_is_whole_is_taken(server: tuple[str, type[Files]], tmp_path: Path) -> None:
    """The process was killed between the last byte and the name."""
    address, _ = server
    places, file = Places.below(tmp_path), UrlFile(f"{address}/net-{digest()[:8]}.pth")
    part = tmp_path / "torch" / "hub" / "checkpoints" / f".{file.name}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(Files.content)
    assert file.fetch(places).read_bytes() == Files.content


def test_what_is_damaged_is_not_kept(server: tuple[str, type[Files]], tmp_path: Path) -> None:
    address, _ = server
    places, file = Places.below(tmp_path), UrlFile(f"{address}/net-00000000.pth")
    with pytest.raises(OSError, match=rf"the file has SHA-256 {digest()[:16]}\.\.\., expected 00000000"):
        file.fetch(places)
    assert not [each for each in (tmp_path / "torch" / "hub" / "checkpoints").iterdir() if each.suffix != ".lock"]


def test_without_a_network_sizes_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    places = Places.below(tmp_path)
    assert UrlFile("http://127.0.0.1:9/net.pth").parts(places) == [Part("net.pth", None, False)]
    assert HubRepository("a/b", (("x",),)).parts(places) == []
    assert TorchHubCode("a/b").parts(places) == [Part("a_b_main", None, False)]


def test_torch_finds_what_was_fetched(
    server: tuple[str, type[Files]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.hub, by which torch-fidelity loads, takes the file under the environment that is printed."""
    address, handler = server
    torch.save({"x": torch.ones(1)}, tmp_path / "net.pth")
    handler.content = (tmp_path / "net.pth").read_bytes()
    UrlFile(f"{address}/net.pth").fetch(Places.below(tmp_path))
    UrlFile(f"{address}/net.pth", "clip-other.pt").fetch(Places.below(tmp_path))
    monkeypatch.setenv("TORCH_HOME", environment(tmp_path)["TORCH_HOME"])
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    asked = len(handler.asked)
    for name in (None, "clip-other.pt"):
        assert torch.hub.load_state_dict_from_url(f"{address}/net.pth", file_name=name, weights_only=True)["x"] == 1
    assert len(handler.asked) == asked
    assert Places.usual().torch_hub == Places.below(tmp_path).torch_hub


def test_what_the_extractors_fetch_is_what_torch_fidelity_loads() -> None:
    (inception,) = extractor_downloads("inception-v3-compat")
    assert isinstance(inception, UrlFile) and inception.name == "weights-inception-2015-12-05-6726825d.pth"
    (clip,) = extractor_downloads("clip-vit-b-32")
    assert isinstance(clip, UrlFile) and clip.name.startswith("clip-vit-b-32-") and clip.name.endswith(".pt")
    code, weights = extractor_downloads("dinov2-vit-l-14")
    assert isinstance(code, TorchHubCode) and isinstance(weights, UrlFile)
    assert weights.name == "dinov2_vitl14_pretrain.pth" and not extractor_downloads("effnet-lite0")
    assert {net: file.name for net, file in LPIPS_NETWORKS.items()} == {
        "alex": "alexnet-owt-7be5be79.pth",
        "vgg": "vgg16-397923af.pth",
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(tmp_path / "unused", monkeypatch) as hub:
        yield hub


def moved_to_a_node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network, with the variables that are printed."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path(environment(folder)["HF_HOME"]) / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_models_of_the_hub_load_from_the_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, folder = tmp_path / "made", tmp_path / "to"
    randomized(FlexTokConfig.preset("tiny")).save_pretrained(here / "tok")
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    blocks = {option: (kind,) * 2 for option, kind in kinds.items()}
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=4, **blocks)
    vae.save_pretrained(here / "vae")
    (here / "timm").mkdir()
    network = timm.create_model("test_efficientnet", pretrained=False)
    save_file(network.state_dict(), here / "timm" / "model.safetensors")
    (timm_files,) = timm_downloads("test_efficientnet")
    assert isinstance(timm_files, HubRepository)
    for name, made in (
        ("a/tok", here / "tok"),
        ("a/vae", here / "vae"),
        ("a/t5", T5),
        (timm_files.repository, here / "timm"),
    ):
        hub.add(name, made)
    downloads = [
        *model_downloads("a/tok", TOKENIZER_FORMATS),
        *autoencoder_downloads("a/vae"),
        *text_encoder_downloads("a/t5"),
        timm_files,
    ]
    places = Places.below(folder)
    for download in downloads:
        before = download.parts(places)
        assert before and not any(part.here for part in before) and all(part.size for part in before)
        download.fetch(places)
        assert all(part.here for part in download.parts(places))
    asked = len(hub.asked)
    moved_to_a_node(folder, monkeypatch)
    assert all(download.parts(places) and all(p.here for p in download.parts(places)) for download in downloads)
    assert torch.equal(VAE.from_pretrained("a/vae").network.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    assert TextEncoder("a/t5")(["a house"]).states.shape[0] == 1
    loaded = timm.create_model("test_efficientnet", pretrained=True)
    assert torch.equal(loaded.conv_stem.weight, network.conv_stem.weight)
    assert len(hub.asked) == asked, "nothing was asked of the network"


def test_which_files_of_a_repository() -> None:
    files = transformers_files("a/b")
    sharded = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["pytorch_model.bin", "tf_model.h5", "README.md", "onnx/model.safetensors", "config.json"]
    assert files.chosen([*sharded, *others]) == [*sharded, "config.json"]
    assert files.chosen(["pytorch_model.bin", "spiece.model"]) == ["pytorch_model.bin", "spiece.model"]
    (tokenizer,) = model_downloads("a/b@v1", TOKENIZER_FORMATS)
    assert isinstance(tokenizer, HubRepository) and (tokenizer.repository, tokenizer.revision) == ("a/b", "v1")
    assert tokenizer.title == "a/b@v1"
    assert tokenizer.chosen(["tokenizer.safetensors", "model.safetensors", "x.json"])[0] == "model.safetensors"
    split = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert tokenizer.chosen(split) == split


def test_shards_that_an_index_names_are_missed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    made.mkdir()
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (made / name).write_bytes(name.encode())
    hub.add("a/b", made)
    files, places = transformers_files("a/b"), Places.below(tmp_path / "to")
    files.fetch(places)
    moved_to_a_node(tmp_path / "to", monkeypatch)
    assert all(part.here for part in files.parts(places)) and len(files.parts(places)) == 3
    next((tmp_path / "to").rglob("model-2.safetensors")).unlink()
    assert [part.name for part in files.parts(places) if not part.here] == ["model-2.safetensors"]


def test_a_repository_without_weights_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text("{}")
    hub.add("a/b", tmp_path / "made")
    with pytest.raises(ValueError, match=r"a/b on the Hub has no model\.safetensors or"):
        transformers_files("a/b").fetch(Places.below(tmp_path / "to"))
