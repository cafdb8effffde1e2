"""Official checkpoints of 2-D tokens: what is written is what is read."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_helpers import SMALL, SMALL_VAE_FILE, assert_same, metadata, official_tree, small_tokenizer
from safetensors import safe_open

from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.interop import official_to_config
from flextok_pl.interop.official import official_name, parse_metadata
from flextok_pl.interop.tensor_file import write_tensors
from flextok_pl.models.tokenizer import FlexTok


@pytest.fixture(scope="module")
def grid_dir(golden_dir: Path) -> Path:
    return golden_dir.parent / "flextok_grid_a"


@pytest.fixture(scope="module")
def grid(grid_dir: Path) -> FlexTok:
    return FlexTok.from_pretrained(grid_dir / "model.safetensors", vae_config=grid_dir / "vae_config.json")


def test_official_grid_is_read(grid: FlexTok, grid_dir: Path) -> None:
    assert grid.config == FlexTokConfig(
        vae=VAEConfig(
            latent_channels=8,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.88,
        ),
        latent_channels=8,
        encoder_width=64,
        encoder_depth=2,
        encoder_head_dim=32,
        decoder_width=96,
        decoder_depth=2,
        decoder_head_dim=32,
        num_registers=16,
        grid_size=(4, 4),
        repa_layer=None,
        nested_dropout="none",
        null_dropout=0.5,
        layout="grid",
        missing_tokens="zero",
    )
    listed = json.loads((grid_dir / "state_dict_keys.json").read_text())
    ours = {official_name(name): list(tensor.shape) for name, tensor in grid.state_dict().items()}
    assert ours == {name: shape for name, shape, _ in listed}


@pytest.mark.filterwarnings("ignore:vae.")
def test_official_format_keeps_every_bit_of_a_grid(grid: FlexTok, grid_dir: Path, tmp_path: Path) -> None:
    file = grid.save_pretrained(tmp_path / "official.safetensors", format="official")
    assert_same(grid, FlexTok.from_pretrained(file, vae_config=grid_dir / "vae_config.json"))
    with safe_open(str(file), "pt") as ours, safe_open(str(grid_dir / "model.safetensors"), "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118
    found, tree = parse_metadata(metadata(file)), official_tree(grid_dir)
    for side, trunk in (("encoder", "enc_transformer"), ("decoder", "dec_transformer")):
        assert list(found[side]["module_dict"]) == list(tree[side]["module_dict"])
        assert found[side]["module_dict"][trunk].pop("mlp_ratio") == 4.0  # theirs leave defaults out
    assert found["decoder"]["module_dict"]["dec_seq_packer"].pop("per_subseq_embs") is False
    assert found["decoder"]["module_dict"]["dec_transformer"].pop("intermediate_layers") == []
    assert found == tree


@pytest.mark.filterwarnings("ignore:vae.")
@pytest.mark.parametrize("law", ["pow2", "none"])
def test_official_grid_with_nested_dropout(law: str, tmp_path: Path) -> None:
    tok = small_tokenizer(dataclasses.replace(SMALL, layout="grid", num_registers=18, nested_dropout=law))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = tok.save_pretrained(tmp_path, format="official")
    assert any("nested_dropout='none'" in str(each.message) for each in caught) == (law == "none")
    again = FlexTok.from_pretrained(file, vae_config=SMALL_VAE_FILE)
    assert again.config == dataclasses.replace(tok.config, nested_dropout="uniform" if law == "none" else law)
    assert all(map(torch.equal, again.state_dict().values(), tok.state_dict().values()))


def test_grid_of_other_names_in_another_order(grid: FlexTok, grid_dir: Path, tmp_path: Path) -> None:
    """The same function: the sum before the positions, time first, and modules with names of their own."""
    names = {"dec_from_latents": "dec_code_proj", "enc_to_latents": "enc_to_codes", "dec_channels_to_first": "dec_out"}
    tree = official_tree(grid_dir)
    modules = tree["decoder"]["module_dict"]
    modules["dec_patches_posemb_module"] |= {"read_key": "dec_patches", "write_key": "dec_patches"}
    order = ["dec_time_embedder", "dec_noise_channels_to_last", "dec_noise_patch_emb", "dec_from_latents"]
    order += ["dec_latent_dropout", "dec_add_noise_and_latents", "dec_patches_posemb_module"]
    order += [each for each in modules if each not in order]
    tree["decoder"]["module_dict"] = {names.get(each, each): modules[each] for each in order}
    encoder = tree["encoder"]["module_dict"]
    tree["encoder"]["module_dict"] = {names.get(each, each): entry for each, entry in encoder.items()}
    tensors = {}
    for ours, tensor in grid.state_dict().items():
        part, folder, module, *rest = official_name(ours).split(".")
        tensors[".".join([part, folder, names.get(module, module), *rest])] = tensor
    write_tensors(tensors, tmp_path / "model.safetensors", {key: str(value) for key, value in tree.items()})
    assert_same(grid, FlexTok.from_pretrained(tmp_path, vae_config=grid_dir / "vae_config.json"))


DECODER, ENCODER = ("decoder", "module_dict"), ("encoder", "module_dict")
SUM = (*DECODER, "dec_add_noise_and_latents")
OF_REGISTERS = {"_target_": "flextok.model.utils.posembs.PositionalEmbeddingAdder", "dim": 96, "max_sizes": [16]}
GRIDS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "no sum": (SUM, None, "decoder lacks 'dec_add_noise_and_latents'"),
    "product": (
        (*SUM, "per_sample_op"),
        {"_target_": "flextok.model.utils.dict_ops.multiply_tensors", "_partial_": True},
        "per_sample_op names flextok.model.utils.dict_ops.multiply_tensors",
    ),
    "sum of one": (
        (*SUM, "read_keys"),
        ["dec_latents_proj"],
        r"read_keys=.'dec_latents_proj'.: that is written by dec_la",
    ),
    "sum of noise alone": ((*SUM, "read_keys"), ["vae_latents_noised_patched"] * 2, "must name the output of"),
    "sum of three": (
        (*SUM, "read_keys"),
        ["vae_latents_noised_patched", "dec_latents_proj", "dec_temb"],
        "no module before it and dec_latent_dropout and dec_patches_posemb_module; it must name",
    ),
    "sum of unheard of": ((*SUM, "read_keys"), [{"a": 1}], "must name the output of dec_latent_dropout"),
    "sum without keys": ((*SUM, "read_keys"), None, "read_keys=None: it is missing"),
    "a sum that is not decoded": ((*DECODER, "dec_seq_packer", "input_list_read_keys"), ["x"], "input_list_read_keys"),
    "positions of tokens": (
        (*DECODER, "dec_patches_posemb_module"),
        {"read_key": "dec_latents_proj", "write_key": "dec_latents_proj"},
        "dec_patches_posemb_module.read_key='dec_latents_proj'.*must name the output of dec_noise_patch_emb",
    ),
    "two tables of positions": ((*DECODER, "dec_table"), OF_REGISTERS, "unknown module 'dec_table'"),
    "tokens beside patches": (
        (*DECODER, "dec_seq_packer", "input_list_read_keys"),
        ["dec_patches", "dec_latents_proj"],
        "dec_latent_dropout; it must name the output of dec_add_noise_and_latents",
    ),
    "null condition of the sum": ((*DECODER, "dec_latent_dropout", "read_write_key"), "dec_patches", "read_write_key"),
    "causal patches": ((*ENCODER, "enc_seq_packer", "mask_mode"), "causal_last", "enc_seq_packer.mask_mode"),
    "two modulations": ((*DECODER, "dec_transformer", "adaLN_expansion"), 2, "adaLN_expansion=2 must be 1"),
    "packed codes": (("regularizer", "packed_call"), True, "packed_call=True must be False"),
    "packed codes by default": (("regularizer", "packed_call"), None, "packed_call=True must be False"),
    "zero null condition": (
        (*DECODER, "dec_latent_dropout", "_target_"),
        "flextok.model.preprocessors.nullcond.ZeroNullCond",
        "dec_latent_dropout names flextok.model.preprocessors.nullcond.ZeroNullCond",
    ),
    "no null condition": ((*DECODER, "dec_latent_dropout"), None, "decoder lacks 'dec_latent_dropout'"),
    "flat patches": ((*ENCODER, "enc_patch_emb", "flatten_patches"), True, "flatten_patches=True"),
    "hostile": ((*SUM, "per_sample_op", "_target_"), "os.system", "per_sample_op names os.system"),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_official_grids_that_are_not_ours(kind: str, grid_dir: Path) -> None:
    path, value, message = GRIDS[kind]
    tree = official_tree(grid_dir)
    *folders, last = path
    place = tree
    for folder in folders:
        place = place[folder]
    if value is None:
        del place[last]
    elif isinstance(value, dict) and "_target_" not in value:
        place[last] |= value
    else:
        place[last] = value
    with pytest.raises(ValueError, match=message):
        official_to_config(tree)
