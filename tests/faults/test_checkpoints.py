"""Damaged, foreign and hostile checkpoints: one clear error, and nothing in a file runs."""

import copy
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flextok_pl.config import FlexTokConfig
from flextok_pl.interop import official_to_config
from flextok_pl.interop.plain_data import MAX_CHARACTERS, parse_text
from flextok_pl.models.tokenizer import FlexTok

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def tree(golden_dir: Path) -> Tree:
    return json.loads((golden_dir / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors(golden_dir: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(golden_dir / "model.safetensors"), "pt") as handle:
        return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a checkpoint could name to do harm raises here."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("code named by a checkpoint ran")

    monkeypatch.setattr("os.system", forbidden)
    monkeypatch.setattr("os.popen", forbidden)
    monkeypatch.setattr("subprocess.Popen", forbidden)


def official(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Path:
    save_file(tensors, file, {key: str(value) for key, value in metadata.items()})
    return file


def ours(file: Path, config: str, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    save_file(
        tensors or {"x": torch.zeros(1)}, file, {"format": "flextok_pl", "version": "1", "config": config} | metadata
    )
    return file


# Files


def _truncate(file: Path, golden: Path) -> None:
    content = golden.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _header_only(file: Path, golden: Path) -> None:
    content = golden.read_bytes()
    file.write_bytes(content[: 8 + struct.unpack("<Q", content[:8])[0]])


class _Bomb:
    """Leaves a folder where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


FILES: dict[str, Callable[[Path, Path], Any]] = {
    "truncated": _truncate,
    "only a header": _header_only,
    "empty": lambda file, _: file.write_bytes(b""),
    "wrong magic": lambda file, _: file.write_bytes(b"GIF89a" + bytes(1000)),
    "header length beyond the file": lambda file, _: file.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
    "header no JSON": lambda file, _: file.write_bytes(struct.pack("<Q", 8) + b"{{{{{{{{"),
    "deeply nested header": lambda file, _: file.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000),
    "pickle": lambda file, _: file.write_bytes(pickle.dumps(_Bomb())),
    "torch pickle": lambda file, _: torch.save({"a": torch.ones(3), "b": _Bomb()}, file),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_and_foreign_files(
    kind: str, golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.safetensors"
    FILES[kind](file, golden_dir / "model.safetensors")
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match="model.safetensors is not an intact safetensors file"):
            FlexTok.from_pretrained(path)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("path", ["nowhere.safetensors", "/nowhere/model", "a/b/c", "https://host/x", "../up", "name"])
def test_no_such_checkpoint(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint .*Hub id"):
        FlexTok.from_pretrained(path)
    with pytest.raises(ValueError, match="no checkpoint"):
        FlexTok.from_pretrained(Path(path))


def test_folder_without_weights_and_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        FlexTok.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no folder 'owner/model' here, and it could not be fetched"):
        FlexTok.from_pretrained("owner/model")


def test_another_architecture(tmp_path: Path) -> None:
    save_file({"bert.embeddings": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is not a FlexTok checkpoint"):
        FlexTok.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "hidden_size": 768}')
    with pytest.raises(ValueError, match="unknown part 'architectures'"):
        FlexTok.from_pretrained(tmp_path)


# Our format


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "not JSON"),
        ("{" * 90_000, "not JSON"),
        ("[" * 90_000, "not JSON"),
        ("[]", "a list instead of a mapping"),
        ("{" + " " * 200_000 + "}", "too long"),
        ('{"width": 3}', "no option 'width'"),
        ('{"encoder_depth": "2"}', "encoder_depth='2' has the wrong type"),
        ('{"encoder_depth": true}', "encoder_depth=True has the wrong type"),
        ('{"vae": {"kind": "kl", "evil": 1}}', "no option 'evil'"),
        ('{"encoder_depth": 1000000000}', "too few for encoder_depth=1000000000"),
        ('{"num_registers": 10000000000000000000000}', "does not describe a model|does not fit"),
        ('{"encoder_width": 4000000000000000000, "encoder_head_dim": 4}', "does not describe a model|does not fit"),
        ('{"mlp_ratio": Infinity}', "does not describe a model|mlp_ratio"),
        ('{"vae": {"block_out_channels": [0, 0]}}', "does not describe a model|wrong|does not fit"),
    ],
)
def test_wrong_configurations_of_ours(config: str, message: str, tmp_path: Path) -> None:
    dummies = {f"x{i}": torch.zeros(1) for i in range(30)}  # enough tensors for the default depth
    with pytest.raises(ValueError, match=message):
        FlexTok.from_pretrained(ours(tmp_path / "model.safetensors", config, dummies))


def test_version_of_the_future(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format version '2'"):
        FlexTok.from_pretrained(ours(tmp_path / "m.safetensors", "{}", version="2"))


def test_vae_config_with_our_format(tmp_path: Path) -> None:
    file = FlexTok(FlexTokConfig.preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vae_config is for official checkpoints"):
        FlexTok.from_pretrained(file, vae_config={})


# Tensors


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


REGISTERS = "encoder.module_dict.enc_register_module.registers"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (_drop(REGISTERS), f"missing tensors: {REGISTERS}"),
    "missing of the VAE": (_drop("vae.vae.quant_conv.bias"), "missing tensors: vae.vae.quant_conv.bias"),
    "extra": (lambda t: t.update(evil=torch.zeros(1)), "unexpected tensors: evil"),
    "wrong shape": (lambda t: t.update({REGISTERS: torch.zeros(3, 128)}), r"is \[3, 128\] instead of \[16, 128\]"),
    "wrong type": (lambda t: t.update({REGISTERS: torch.zeros(16, 128, dtype=torch.int64)}), "not floating point"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit(
    kind: str, tree: Tree, tensors: dict[str, torch.Tensor], golden_dir: Path, tmp_path: Path
) -> None:
    change, message = TENSORS[kind]
    changed = dict(tensors)
    change(changed)
    with pytest.raises(ValueError, match=message):
        FlexTok.from_pretrained(
            official(tmp_path / "m.safetensors", changed, tree), vae_config=golden_dir / "vae_config.json"
        )


def test_repa_heads_are_left_out(
    tree: Tree, tensors: dict[str, torch.Tensor], golden_dir: Path, tmp_path: Path
) -> None:
    head = {"_target_": "flextok.model.postprocessors.heads.MLPHead", "read_key": "a", "write_key": "b"}
    changed = copy.deepcopy(tree)
    changed["decoder"]["module_dict"]["dec_repa_head"] = head
    more = tensors | {"decoder.module_dict.dec_repa_head.mlp.0.weight": torch.zeros(2)}
    file = official(tmp_path / "m.safetensors", more, changed)
    with pytest.warns(UserWarning, match=r"does not use .*dec_repa_head.mlp.0.weight"):
        FlexTok.from_pretrained(file, vae_config=golden_dir / "vae_config.json")


def test_the_autoencoder_that_the_file_does_not_describe(golden_dir: Path) -> None:
    file = golden_dir / "model.safetensors"
    with pytest.raises(ValueError, match="give vae_config"):
        FlexTok.from_pretrained(file)
    for wrong, message in (
        ({"latent_channels": 8}, "latent_channels"),
        ({"_class_name": "VQModel"}, "VQModel"),
        ({"evil": 1}, "evil"),
        (golden_dir / "nowhere.json", "no configuration file"),
        (golden_dir / "golden.npz", "not JSON"),
        (golden_dir / "state_dict_keys.json", "a list instead of a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            FlexTok.from_pretrained(file, vae_config=wrong)


# Hostile text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('echo ran')",
        "{'a': __import__('os').system('echo ran')}",
        "!!python/object/apply:os.system ['echo ran']",
        "[" * 40_000,
        "(" * 20_000 + ")" * 20_000,
        "-" * 40_000 + "1",
        "1+" * 20_000 + "1",
        "{'a':" * 3_000 + "1" + "}" * 3_000,
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]",
        str(list(range(6_000))),
        "a" * (MAX_CHARACTERS + 1),
        "2024-01-01",
        "{1: 2}",
        "b'x'",
        "1j",
        "{1, 2}",
        "\x00",
        "a: &a [x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n"
        "e: [*d,*d,*d,*d,*d,*d,*d,*d]",
        "&a [*a]",
    ],
    ids=lambda text: text[:24],
)
def test_text_that_is_no_plain_data(text: str, no_code: None) -> None:
    try:
        parsed = parse_text("metadata 'encoder'", text)
    except ValueError as error:
        assert "metadata 'encoder'" in str(error) and len(str(error)) < 500
    else:  # YAML takes a call for a plain string, which no module accepts
        assert parsed in (text, {"a": text[len("{'a': ") : -1]})


def _set(path: str, value: Any) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        *folders, last = path.split("/")
        for name in folders:
            tree = tree[name]
        tree[last] = value

    return change


def _remove(path: str) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        *folders, last = path.split("/")
        for name in folders:
            tree = tree[name]
        del tree[last]

    return change


def _swap_modules(tree: Tree) -> None:
    entries = tree["decoder"]["module_dict"]
    names = list(entries)
    i, j = names.index("dec_nested_dropout"), names.index("dec_latent_dropout")
    names[i], names[j] = names[j], names[i]
    tree["decoder"]["module_dict"] = {name: entries[name] for name in names}


ENC, DEC = "encoder/module_dict/", "decoder/module_dict/"
CONFIGS: dict[str, tuple[Callable[[Tree], None], str]] = {
    "top target": (_set("_target_", "os.system"), "names os.system"),
    "encoder target": (_set("encoder/_target_", "subprocess.Popen"), "encoder names subprocess.Popen"),
    "module target": (_set(f"{ENC}enc_patch_emb/_target_", "builtins.exec"), "enc_patch_emb names builtins.exec"),
    "function target": (
        _set(f"{ENC}enc_channels_to_last/per_sample_op/_target_", "shutil.rmtree"),
        "per_sample_op names shutil.rmtree",
    ),
    "known target in the wrong place": (
        _set(f"{ENC}enc_patch_emb/_target_", "flextok.model.preprocessors.linear.LinearLayer"),
        "enc_patch_emb names flextok.model.preprocessors.linear.LinearLayer",
    ),
    "target is no string": (_set("vae/_target_", ["os.system"]), "vae names"),
    "nested target in an option": (
        _set(f"{DEC}dec_transformer/norm_layer", {"_target_": "os.system", "_args_": ["x"]}),
        "unknown option 'norm_layer'",
    ),
    "positional arguments": (_set("vae/_args_", ["echo ran"]), "unknown option '_args_'"),
    "repa module target": (_set(f"{DEC}dec_repa_unpacker/_target_", "os.system"), "dec_repa_unpacker names os.system"),
    "unknown part": (_set("hook", {"_target_": "os.system"}), "unknown part 'hook'"),
    "unknown module": (_set(f"{DEC}dec_extra", {"_target_": "os.system"}), "unknown module 'dec_extra'"),
    "missing module": (_remove(f"{DEC}dec_nested_dropout"), "lacks 'dec_nested_dropout'"),
    "missing part": (_remove("regularizer"), "regularizer is a NoneType"),
    "order": (_swap_modules, "in another order"),
    "module dict is a list": (_set("encoder/module_dict", []), "module_dict"),
    "string for a number": (_set(f"{ENC}enc_patch_emb/dim", "128"), "enc_patch_emb.dim=.*positive integer"),
    "boolean for a number": (_set(f"{ENC}enc_patch_emb/dim", True), "enc_patch_emb.dim=True"),
    "negative": (_set(f"{DEC}dec_transformer/depth", -1), "dec_transformer.depth=-1"),
    "enormous": (_set(f"{ENC}enc_transformer/depth", 10**30), "enc_transformer.depth="),
    "not finite": (_set(f"{DEC}dec_time_embedder/max_timestep", float("nan")), "max_timestep=nan"),
    "zero time": (_set(f"{DEC}dec_time_embedder/max_timestep", 0), "max_timestep=0 must be a positive number"),
    "odd frequencies": (_set(f"{DEC}dec_time_embedder/frequency_embedding_size", 255), "frequency_embedding_size=255"),
    "zero scale": (_set("vae/scaling_factor", 0.0), "scaling_factor=0.0"),
    "probability": (_set(f"{DEC}dec_latent_dropout/dropout_prob", 1.5), "dropout_prob=1.5"),
    "levels": (_set("regularizer/levels", [8, "8"]), "regularizer.levels"),
    "one level": (_set("regularizer/levels", [1] * 6), "fsq_levels"),
    "mask mode": (_set(f"{ENC}enc_seq_packer/mask_mode", "full"), "enc_seq_packer.mask_mode"),
    "decoder mask mode": (_set(f"{DEC}dec_seq_packer/mask_mode", "causal"), "dec_seq_packer.mask_mode"),
    "shared modulation": (_set(f"{DEC}dec_seq_packer/per_subseq_embs", False), "per_subseq_embs"),
    "expansion": (_set(f"{DEC}dec_transformer/adaLN_expansion", 1), "adaLN_expansion"),
    "no time": (_remove(f"{DEC}dec_transformer/adaLN_emb_read_key"), "adaLN_emb_read_key"),
    "rotary positions": (_set(f"{ENC}enc_transformer/rope_forward_read_key", "rope"), "rope_forward_read_key"),
    "qk norm": (_set(f"{ENC}enc_transformer/qk_norm", False), "enc_transformer.qk_norm"),
    "plain MLP": (_set(f"{DEC}dec_transformer/gated_mlp", False), "dec_transformer.gated_mlp"),
    "bias": (_set(f"{DEC}dec_transformer/qkv_bias", True), "dec_transformer.qkv_bias"),
    "muP": (_set(f"{DEC}dec_to_patches/use_mup_readout", True), "use_mup_readout"),
    "half precision": (_set("vae/dtype_override", "bf16"), "vae.dtype_override"),
    "positions": (_set(f"{ENC}enc_posemb_module/posemb_type", "learnable_sum"), "posemb_type"),
    "scaled positions": (_set(f"{DEC}dec_patches_posemb_module/posemb_scaling", "relative"), "posemb_scaling"),
    "registers": (_set(f"{ENC}enc_register_module/n_min", 1), "n_min=1 and .*n_max=16 differ"),
    "grid": (_set(f"{DEC}dec_patches_posemb_module/max_sizes", [8, 9]), "max_sizes.* differ"),
    "patches": (_set(f"{DEC}dec_to_patches/patch_sizes", [2, 1]), "patch_sizes.* differ"),
    "widths": (_set(f"{DEC}dec_from_latents/dim", 64), "dim.* differ"),
    "channels": (_set("vae/latent_channels", 4), "latent_channels=4 and .* differ"),
    "budget law": (_set(f"{DEC}dec_nested_dropout/size_sampling_mode", "evil"), "size_sampling_mode='evil'"),
    "features of several blocks": (_set(f"{DEC}dec_transformer/intermediate_layers", [0, 1]), "intermediate_layers"),
    "features of no block": (_set(f"{DEC}dec_transformer/intermediate_layers", [7]), "repa_layer=7"),
    "logvar": (_set("vae/learnable_logvar", True), "learnable_logvar"),
    "single null token": (
        _set(f"{DEC}dec_latent_dropout/replace_with_single_token", True),
        "replace_with_single_token",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_official_configurations_that_are_not_ours(kind: str, tree: Tree, no_code: None) -> None:
    change, message = CONFIGS[kind]
    changed = copy.deepcopy(tree)
    change(changed)
    with pytest.raises(ValueError, match=message):
        official_to_config(changed)


def test_hostile_metadata_in_a_file(
    tree: Tree, tensors: dict[str, torch.Tensor], golden_dir: Path, tmp_path: Path, no_code: None
) -> None:
    hostile = {
        "encoder": "{'_target_': 'os.system', 'command': 'echo ran'}",
        "decoder": "__import__('os').system('echo ran')",
        "pipeline": "!!python/object/apply:os.system ['echo ran']",
        "vae": "[" * 40_000,
        "regularizer": "{'_target_': 'flextok.regularizers.quantize_fsq.FSQ', 'levels': " + "9" * 60_000 + "}",
    }
    for key, text in hostile.items():
        file = official(tmp_path / f"{key}.safetensors", tensors, tree | {key: text})
        with pytest.raises(ValueError, match=f"{key}"):
            FlexTok.from_pretrained(file, vae_config=golden_dir / "vae_config.json")
