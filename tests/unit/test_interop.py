"""Checkpoints of both formats: what is written is what is read."""

import ast
import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_helpers import SMALL, SMALL_VAE, SMALL_VAE_FILE, assert_same, metadata, official_tree, small_tokenizer
from safetensors import safe_open

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.interop import config_to_official, official_to_config
from flextok_pl.interop.format import Contents, Format, Made
from flextok_pl.interop.official import official_name, parse_metadata
from flextok_pl.interop.plain_data import parse_text
from flextok_pl.interop.tensor_file import TensorFile, write_tensors
from flextok_pl.layers.frozen import Frozen
from flextok_pl.models.pretrained import load_model, save_model
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> FlexTok:
    return FlexTok.from_pretrained(golden_dir / "model.safetensors", vae_config=golden_dir / "vae_config.json")


# Ours


@pytest.mark.parametrize("kind", ["kl", "pixel", "none"])
def test_our_format_keeps_every_bit(kind: str, tmp_path: Path) -> None:
    vae = {"kl": SMALL_VAE, "pixel": VAEConfig(kind="pixel", latent_channels=12), "none": None}[kind]
    config = dataclasses.replace(SMALL, vae=vae, latent_channels=4 if vae is None else vae.latent_channels)
    tok = small_tokenizer(config)
    assert tok.save_pretrained(tmp_path / "folder") == tmp_path / "folder" / "model.safetensors"
    loaded = FlexTok.from_pretrained(tmp_path / "folder")
    assert_same(tok, loaded)
    tok.save_pretrained(tmp_path / "run" / "tokenizer.safetensors")
    assert_same(tok, FlexTok.from_pretrained(tmp_path / "run"))
    assert not loaded.training and isinstance(loaded.config.fsq_levels, tuple)
    frozen = {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.patch_posemb", "decoder.patch_posemb"}
    assert tok.save_pretrained(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    assert_same(tok, FlexTok.from_pretrained(str(tmp_path / "a.safetensors")))


def test_our_format_keeps_how_a_model_decodes(tmp_path: Path) -> None:
    own = {"num_steps": 4, "guidance": "none", "guidance_scale": 1.0}
    tok = FlexTok(dataclasses.replace(SMALL, **own))  # type: ignore[arg-type]
    found = FlexTok.from_pretrained(tok.save_pretrained(tmp_path)).config
    assert found == tok.config and {name: getattr(found, name) for name in own} == own
    for wrong in ({"num_steps": 0}, {"guidance": "cgf"}, {"guidance_scale": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            dataclasses.replace(SMALL, **wrong)  # type: ignore[arg-type]


def test_metadata_of_our_format(tmp_path: Path) -> None:
    found = metadata(small_tokenizer().save_pretrained(tmp_path))
    assert found["format"] == "flextok_pl" and found["version"] == "1"
    assert json.loads(found["config"])["grid_size"] == [3, 6]


def test_the_configuration_is_that_of_the_autoencoder(tmp_path: Path) -> None:
    tok = FlexTok(SMALL, VAE(SMALL_VAE).rescaled(0.25, 1.5))
    loaded = FlexTok.from_pretrained(tok.save_pretrained(tmp_path))
    assert loaded.config.vae is not None
    assert (loaded.config.vae.scaling_factor, loaded.config.vae.shift_factor) == (0.25, 1.5)
    assert loaded.require_vae().config == loaded.config.vae


def test_weights_of_other_precisions_become_float32(tmp_path: Path) -> None:
    tok = small_tokenizer()
    loaded = FlexTok.from_pretrained(tok.bfloat16().save_pretrained(tmp_path))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.encoder.registers, tok.encoder.registers.float())


def test_loaded_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    tok = small_tokenizer()
    file = tok.save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(file)
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.seek(size // 2)
        handle.write(b"\xff" * (size // 2))
    assert_same(tok, loaded)


def test_saving_is_atomic_and_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small_tokenizer().save_pretrained(tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flextok_pl.interop.tensor_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        small_tokenizer().save_pretrained(tmp_path)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


# Theirs


def test_official_configuration_is_read(golden: FlexTok) -> None:
    assert golden.config == FlexTokConfig(
        vae=VAEConfig(latent_channels=16, block_out_channels=(32,) * 4, norm_num_groups=8, scaling_factor=0.88),
        latent_channels=16,
        encoder_width=128,
        encoder_depth=2,
        decoder_width=128,
        decoder_depth=2,
        num_registers=16,
        grid_size=(8, 8),
        repa_layer=1,
        nested_dropout="pow2",
        null_dropout=0.5,
    )


def test_official_names_and_shapes(golden: FlexTok, golden_dir: Path) -> None:
    listed = json.loads((golden_dir / "state_dict_keys.json").read_text())
    ours = {official_name(name): list(tensor.shape) for name, tensor in golden.state_dict().items()}
    assert ours == {name: shape for name, shape, _ in listed}


def test_official_tensors_are_read_unchanged(golden: FlexTok, golden_dir: Path) -> None:
    with safe_open(str(golden_dir / "model.safetensors"), "pt") as handle:
        for name, tensor in golden.state_dict().items():
            assert torch.equal(tensor, handle.get_tensor(official_name(name))), name


@pytest.mark.filterwarnings("ignore:vae.")
def test_official_format_keeps_every_bit(golden: FlexTok, golden_dir: Path, tmp_path: Path) -> None:
    file = golden.save_pretrained(tmp_path / "official.safetensors", format="official")
    again = FlexTok.from_pretrained(file, vae_config=json.loads((golden_dir / "vae_config.json").read_text()))
    assert_same(golden, again)
    with safe_open(str(file), "pt") as handle:
        assert set(handle.keys()) == {
            name for name, *_ in json.loads((golden_dir / "state_dict_keys.json").read_text())
        }
    second = again.save_pretrained(tmp_path / "second.safetensors", format="official")
    assert metadata(second) == metadata(file)
    assert_same(again, FlexTok.from_pretrained(second, vae_config=golden_dir / "vae_config.json"))


@pytest.mark.filterwarnings("ignore:vae.")
def test_official_metadata_is_what_their_loader_parses(golden: FlexTok, golden_dir: Path, tmp_path: Path) -> None:
    found = metadata(golden.save_pretrained(tmp_path / "official.safetensors", format="official"))
    theirs = official_tree(golden_dir)
    assert set(found) == set(theirs) and found["_target_"] == theirs["_target_"]
    for key in set(theirs) - {"_target_"}:
        ours = ast.literal_eval(found[key])
        for side, trunk in (("encoder", "enc_transformer"), ("decoder", "dec_transformer")):
            if key == side:  # their file leaves these at the defaults of their code
                assert ours["module_dict"][trunk].pop("head_dim") == 64
                assert ours["module_dict"][trunk].pop("mlp_ratio") == 4.0
        assert ours == theirs[key]
        assert list(ours) == list(theirs[key])
        if "module_dict" in ours:
            assert list(ours["module_dict"]) == list(theirs[key]["module_dict"])


@pytest.mark.filterwarnings("ignore:vae.")
def test_official_round_trip_of_another_architecture(tmp_path: Path) -> None:
    tok = small_tokenizer()
    again = FlexTok.from_pretrained(tok.save_pretrained(tmp_path, format="official"), vae_config=SMALL_VAE_FILE)
    assert_same(tok, again)


def test_config_beside_weights_without_metadata(golden: FlexTok, golden_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {official_name(k): v for k, v in golden.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text((golden_dir / "config.json").read_text())
    assert_same(golden, FlexTok.from_pretrained(tmp_path, vae_config=golden_dir / "vae_config.json"))


def test_yaml_metadata(golden_dir: Path) -> None:
    theirs = official_tree(golden_dir)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in theirs.items()}
    assert parse_metadata(texts) == theirs


@pytest.mark.filterwarnings("ignore:nested_dropout")
@pytest.mark.parametrize("name", ["d12_d12", "d18_d18", "d18_d28"])
@pytest.mark.parametrize("law", ["logit_normal", "uniform", "mode"])
def test_published_architectures_survive_the_official_configuration(name: str, law: str) -> None:
    config = dataclasses.replace(FlexTokConfig.preset(name), timestep_law=law)
    back = official_to_config(config_to_official(config))
    assert back == (dataclasses.replace(config, mode_scale=0.0) if law == "uniform" else config)


def test_options_only_the_official_defaults_state(golden_dir: Path) -> None:
    tree = official_tree(golden_dir)
    del tree["decoder"]["module_dict"]["dec_time_embedder"]["max_timestep"]
    del tree["decoder"]["module_dict"]["dec_nested_dropout"]["size_sampling_mode"]
    tree["decoder"]["module_dict"]["dec_transformer"]["intermediate_layers"] = []
    tree["flow_matching_noise_module"]["ln"] = True
    tree["encoder"]["module_dict"]["enc_transformer"] |= {"head_dim": 32, "drop_path_rate": 0.0}
    config = official_to_config(tree)
    assert config.max_timestep == 1000.0 and config.nested_dropout == "uniform" and config.repa_layer is None
    assert config.timestep_law == "logit_normal" and (config.encoder_head_dim, config.decoder_head_dim) == (32, 64)
    assert config.vae is not None and config.vae.block_out_channels == (128, 256, 512, 512)


def test_what_affects_training_only_is_warned_about(golden_dir: Path) -> None:
    tree = official_tree(golden_dir)
    tree["regularizer"]["drop_quant_p"] = 0.1
    with pytest.warns(UserWarning, match="regularizer.drop_quant_p=0.1"):
        official_to_config(tree)


def test_null_scaling_factor_is_the_autoencoders(golden_dir: Path) -> None:
    tree = official_tree(golden_dir)
    tree["vae"]["scaling_factor"] = None
    config = official_to_config(tree, {"block_out_channels": [32, 32], "scaling_factor": 0.5, "latent_channels": 16})
    assert config.vae is not None and config.vae.scaling_factor == 0.5
    with pytest.raises(ValueError, match="scaling_factor is null"):
        official_to_config(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": VAEConfig(kind="pixel", latent_channels=12), "latent_channels": 12}, "vae.kind='pixel'"),
        ({"vae": None}, "vae.kind='none'"),
        ({"vae": dataclasses.replace(SMALL_VAE, shift_factor=0.5)}, "shift_factor=0.5"),
        ({"num_steps": 4}, "num_steps=4 does not exist in the official format; it must be None, or save.* in our own"),
    ],
)
def test_what_the_official_format_cannot_say(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FlexTok(dataclasses.replace(SMALL, **change)).save_pretrained(tmp_path / "x.safetensors", format="official")


def test_what_the_official_format_does_not_say_of_an_autoencoder() -> None:
    told = {"latent_channels": 4, "scaling_factor": 0.5, "down_block_types": ("DownEncoderBlock2D",) * 4}
    untold = {"act_fn": "relu", "mid_block_add_attention": False, "use_quant_conv": False, "layers_per_block": 1}
    config = FlexTokConfig(vae=VAEConfig(**told, **untold), latent_channels=4, nested_dropout="pow2")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="this file needs the autoencoder's configuration beside it") as warned:
        config_to_official(config)
    assert {str(each.message).split("=")[0] for each in warned} == {f"vae.{name}" for name in untold}


def test_the_official_format_refuses_options_that_it_never_heard_of() -> None:
    @dataclasses.dataclass(frozen=True)
    class Newer(FlexTokConfig):
        gate: str = "silu"

    assert official_to_config(config_to_official(Newer(nested_dropout="pow2"))).nested_dropout == "pow2"
    with pytest.raises(ValueError, match="gate='gelu' does not exist in the official format; it must be 'silu'"):
        config_to_official(Newer(gate="gelu"))


@pytest.mark.filterwarnings("ignore:vae.")
def test_a_budget_law_the_official_code_lacks(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, nested_dropout="exponential")
    with pytest.warns(UserWarning, match="nested_dropout='exponential'"):
        assert (
            config_to_official(config)["decoder"]["module_dict"]["dec_nested_dropout"]["size_sampling_mode"]
            == "uniform"
        )


def test_a_format_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='theirs' is unknown; use one of .'ours', 'official'."):
        small_tokenizer().save_pretrained(tmp_path, format="theirs")


def test_priors_are_fetched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = Prior(PriorConfig(vocab_size=8, num_tokens=4, depth=1, width=32, head_dim=16))
    file = prior.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    loaded = Prior.from_pretrained("owner/prior")
    assert file.name == "prior.safetensors" and loaded.config == prior.config
    assert all(map(torch.equal, loaded.state_dict().values(), prior.state_dict().values()))


def test_a_frozen_autoencoder_is_saved(tmp_path: Path) -> None:
    vae = VAE(SMALL_VAE)
    tok = FlexTok(SMALL, Frozen(vae))
    assert not any(name.startswith("vae.") for name in tok.state_dict())
    loaded = FlexTok.from_pretrained(tok.save_pretrained(tmp_path))
    assert all(map(torch.equal, loaded.require_vae().state_dict().values(), vae.state_dict().values()))


def test_hub_ids_are_fetched(golden: FlexTok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = golden.save_pretrained(tmp_path / "hub")
    asked = []

    def download(repository: str, name: str) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        asked.append((repository, name))
        if name == "config.json":
            raise EntryNotFoundError("no config.json")
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert_same(golden, FlexTok.from_pretrained("owner/model"))
    assert asked == [("owner/model", "model.safetensors"), ("owner/model", "config.json")]
    (tmp_path / "owner").mkdir()
    small_tokenizer().save_pretrained(tmp_path / "owner" / "model")
    assert FlexTok.from_pretrained("owner/model").config == SMALL  # a folder here comes first
    assert len(asked) == 2


# Another


class Merged(Format[PriorConfig]):
    """Priors whose file splits, transposes and reshapes what is one tensor of ours, and has no null class."""

    file_name, companion = "weights.safetensors", "config.yaml"

    def recognises(self, file: TensorFile) -> bool:
        return "out" in file.shapes

    def read(self, file: TensorFile, vae_config: Any = None) -> Contents[PriorConfig]:
        heads = parse_text("config.yaml", file.beside["config.yaml"].read_text())["heads"]
        (vocabulary, width), classes = file.shapes["tokens"], file.shapes["classes"][0]
        config = PriorConfig(classes, None, vocabulary, file.shapes["rows"][0], 1, width, width // heads, 6.0)
        return Contents(config, self.source, ignorable=lambda name: name.startswith("tokenizer."))

    def source(self, ours: str) -> str | Made:
        odd = {
            "start": Made(("start",), torch.flatten),
            "class_embedding.weight": Made(("classes",), lambda rows: torch.cat([rows, 0 * rows[:1]])),
            "blocks.0.attn.wqkv.weight": Made(("q", "kv"), lambda q, kv: torch.cat([q, kv])),
            "blocks.0.mlp.fc1.weight": Made(("fc13",), lambda both: both.chunk(2)[0]),
            "blocks.0.mlp.fc3.weight": Made(("fc13",), lambda both: both.chunk(2)[1]),
            "blocks.0.mlp.fc2.weight": Made(("fc2",), lambda weight: weight.T),
            "norm.weight": Made((), lambda: torch.ones(32)),
        }
        names = {"token_embedding.weight": "tokens", "positions": "rows", "head.weight": "out"}
        return odd.get(ours) or names.get(ours, ours)

    def write(self, config: PriorConfig, weights: Any) -> Any:
        raise ValueError("the format is only read")


def test_a_format_whose_tensors_are_others(tmp_path: Path) -> None:
    ours = Prior(PriorConfig(3, None, 8, 4, 1, 32, 16, 6.0)).state_dict()
    ours["class_embedding.weight"][-1] = 0
    theirs = dict(ours)
    wqkv, classes = theirs.pop("blocks.0.attn.wqkv.weight"), theirs.pop("class_embedding.weight")
    fc1, fc2, fc3 = (theirs.pop(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2, 3))
    theirs |= {
        "q": wqkv[:32].clone(),
        "kv": wqkv[32:],
        "classes": classes[:-1],
        "fc13": torch.cat([fc1, fc3]),
        "fc2": fc2.T,
    }
    theirs |= {"start": theirs["start"][None, None], "tokens": theirs.pop("token_embedding.weight").half()}
    theirs |= {"rows": theirs.pop("positions"), "out": theirs.pop("head.weight"), "tokenizer.x": torch.zeros(1)}
    del theirs["norm.weight"]
    file, formats = tmp_path / "weights.safetensors", {"merged": Merged()}
    write_tensors(theirs, file, {})
    (tmp_path / "config.yaml").write_text("heads: 2")
    with pytest.warns(UserWarning, match=r"does not use tokenizer.x$"):
        loaded = load_model(tmp_path, formats, Prior).state_dict()
    ours["token_embedding.weight"] = ours["token_embedding.weight"].half().float()
    for name, tensor in ours.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor), name
        assert loaded[name].is_contiguous(), name

    write_tensors(theirs | {"kv": wqkv[:1, :5]}, file, {})
    with pytest.raises(ValueError, match=r"q is \[32, 32\] and kv is \[1, 5\], which make no \[96, 32\]"):
        load_model(tmp_path, formats, Prior)
    del theirs["kv"]
    write_tensors(theirs, file, {})
    with pytest.raises(ValueError, match="missing tensors: kv$"):
        load_model(tmp_path, formats, Prior)
    with pytest.raises(ValueError, match="only read"):
        save_model(ours, PriorConfig(), tmp_path, formats, "merged")
