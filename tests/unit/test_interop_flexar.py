"""FlexAR releases: what is read, what is written, and what is refused."""

import copy
import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flextok_pl.config import GenerationConfig, PriorConfig
from flextok_pl.interop.flexar_config import read_config
from flextok_pl.interop.interpolation import Resolver, read_yaml
from flextok_pl.interop.tensor_file import open_tensors
from flextok_pl.models.prior import Prior, TextStates

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"
MODEL = "models.ar_image_model."
SMALL = PriorConfig(num_classes=5, vocab_size=24, num_tokens=6, depth=2, width=32, head_dim=16)
TEXT = dataclasses.replace(SMALL, num_classes=0, text_width=8, text_encoder="google/flan-t5-xl")
EVERYTHING: dict[str, Any] = {
    "norm": "layer",
    "norm_eps": 1e-5,
    "qk_norm": True,
    "qk_norm_kind": "rms",
    "qk_norm_eps": 1e-4,
    "qk_scale": 0.125,
    "qkv_bias": True,
    "bias": True,
    "head_bias": True,
    "gated": False,
    "activation": "gelu_tanh",
    "mlp_hidden_width": 45,
    "fixed_positions": True,
    "final_norm": False,
    "head_norm": True,
    "generation": GenerationConfig(2.5, 0.7, 9, 0.8, "cfg", 3.0, 12),
    "tokenizer_id": "owner/name",
    "tokenizer": "hash",
    "started_from": "elsewhere",
}
CONFIGS = {
    "class": SMALL,
    "class_zero": dataclasses.replace(SMALL, null_class="zero", class_names=tuple("abcde")),
    "class_everything": dataclasses.replace(SMALL, **EVERYTHING),
    "text": TEXT,
    "text_everything": dataclasses.replace(
        TEXT, **EVERYTHING, cross_qk_norm=True, text_hidden_width=8, text_bias=False, text_activation="gelu"
    ),
    "text_unmasked": dataclasses.replace(TEXT, text_mask=False, text_length=4, null_text_length=4, text_hidden_width=9),
    "odd": dataclasses.replace(SMALL, norm="layer_no_bias", activation="gelu", mlp_ratio=3.3, width=48),
    "gated_tanh": dataclasses.replace(SMALL, activation="gelu_tanh", generation=GenerationConfig(temperature=0.0)),
}


def build(config: PriorConfig) -> Prior:
    """A prior in which every weight matters."""
    prior = Prior(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    if config.text_width is not None:
        prior.set_null_text(torch.randn(prior.null_text.shape, generator=generator))
    return prior


def condition_of(config: PriorConfig) -> Tensor | TextStates:
    if config.text_width is None:
        return torch.tensor([0, 4, -1])
    states = torch.randn(3, 4, config.text_width, generator=torch.Generator().manual_seed(1))
    return TextStates(states, torch.arange(4) < torch.tensor([[1], [4], [3]]))


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(3)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    prior, config = build(CONFIGS[kind]), CONFIGS[kind]
    file = prior.save_pretrained(tmp_path, format="flexar")
    assert file == tmp_path / "model.safetensors" and (tmp_path / "config.yaml").is_file()
    loaded = Prior.from_pretrained(tmp_path)
    assert loaded.config == config
    weights, found = prior.state_dict(), loaded.state_dict()
    assert list(found) == list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
    tokens, condition = torch.randint(24, (3, 6)), condition_of(config)
    with torch.no_grad():
        assert torch.equal(loaded(tokens, condition), prior(tokens, condition))
    drawn = [each.generate(condition, cfg_scale=2.0, generator=seeds()) for each in (loaded, prior)]
    assert torch.equal(*drawn)
    loaded.save_pretrained(tmp_path / "again", format="flexar")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == file.read_bytes()


def test_a_null_class_of_its_own_becomes_that_of_the_published_model(tmp_path: Path) -> None:
    """Without our own tensors, as the published loader has it, the function is the same but for rounding."""
    prior = build(SMALL)
    file = prior.save_pretrained(tmp_path, format="flexar")
    tensors = {name: tensor for name, tensor in load_file(file).items() if "image_tokenizer" not in name}
    assert len(load_file(file)) == len(tensors) + 2
    save_file(tensors, file)
    loaded = Prior.from_pretrained(tmp_path)
    assert loaded.config == dataclasses.replace(SMALL, null_class="zero")
    tokens = torch.randint(24, (3, 6))
    with torch.no_grad():
        for condition in (condition_of(SMALL), None):
            torch.testing.assert_close(loaded(tokens, condition), prior(tokens, condition), rtol=0, atol=1e-5)


def test_own_tensors_must_be_those_of_the_published_ones(tmp_path: Path) -> None:
    file = build(SMALL).save_pretrained(tmp_path, format="flexar")
    tensors = load_file(file)
    tensors[f"{MODEL}preprocessor.sos_token_embed"] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"image_tokenizer.flextok_pl.start and .* remove the former"):
        Prior.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes=0 without text_width"),
        ({"num_classes": 0, "text_width": 8}, "text_encoder='' cannot be stated"),
        ({"num_classes": 0, "text_width": 8, "text_encoder": "minilm"}, "text_encoder='minilm' cannot be stated"),
    ],
)
def test_what_cannot_be_written(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    prior = Prior(dataclasses.replace(SMALL, **changes))
    with pytest.raises(ValueError, match=message):
        prior.save_pretrained(tmp_path, format="flexar")
    assert not list(tmp_path.iterdir())


def test_where_it_is_written(tmp_path: Path) -> None:
    prior = Prior(SMALL)
    with pytest.raises(ValueError, match="give a folder"):
        prior.save_pretrained(tmp_path / "prior.safetensors", format="flexar")
    (tmp_path / "config.yaml").write_text("seed_everything: 1\n")
    with pytest.raises(ValueError, match="config.yaml is there and belongs to something else"):
        prior.save_pretrained(tmp_path, format="flexar")
    prior.save_pretrained(tmp_path / "a", format="flexar")
    prior.save_pretrained(tmp_path / "a", format="flexar")


# What is refused


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def parts(config: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Preprocessor, trunk and head."""
    model = config["model"]["meta_model"]["models"]["ar_image_model"]
    return model["preprocessor"], model["trunk"], model["head"]


def changed(kind: str, change: Change, folder: Path) -> Path:
    source = GOLDEN / f"flexar_{kind}_a"
    config, tensors = read_yaml(source / "config.yaml"), load_file(source / "model.safetensors")
    change(config, tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def pre(**values: Any) -> Change:
    return lambda config, tensors: parts(config)[0].update(values)


def trunk(**values: Any) -> Change:
    return lambda config, tensors: parts(config)[1].update(values)


def head(**values: Any) -> Change:
    return lambda config, tensors: parts(config)[2].update(values)


def within(part: str, **values: Any) -> Change:
    return lambda config, tensors: parts(config)[1][part].update(values)


def without(part: str, key: str) -> Change:
    return lambda config, tensors: parts(config)[1][part].pop(key)


def embedder(**values: Any) -> Change:
    return lambda config, tensors: config["model"]["meta_model"]["models"]["text_encoder"]["t5_embedder"].update(values)


def mlp(**values: Any) -> Change:
    return lambda config, tensors: config["model"]["meta_model"]["models"]["text_encoder"]["mlp"].update(values)


def tensor(name: str, *shape: int) -> Change:
    return lambda config, tensors: tensors.update({name: torch.ones(shape)})


def lacking(name: str) -> Change:
    return lambda config, tensors: [tensors.pop(each) for each in list(tensors) if name in each]


def both(*changes: Change) -> Change:
    return lambda config, tensors: [change(config, tensors) for change in changes]


BLOCK = f"{MODEL}trunk.blocks.0."
ROPE = {"_target_": "l3m.model.preprocessors.pos_embed.rope.RoPE", "_partial_": True}
RMS = {"_target_": "l3m.model.layers.normalization.RMSNorm", "_partial_": True, "eps": 1e-6}
REFUSED: list[tuple[str, Change, str]] = [
    # classes
    (
        "class",
        trunk(_target_="l3m.model.trunks.transformer.NonMonolithic"),
        r"trunk._target_=.*NonMonolithic is unknown",
    ),
    ("class", trunk(_target_="os.system"), r"trunk._target_=os.system is unknown; it must be Transformer"),
    ("class", trunk(_target_=["os", "system"]), r"trunk._target_=\['os', 'system'\]"),
    ("class", within("attn_target", _target_="l3m.Attention"), r"attn_target._target_=l3m.Attention is unknown"),
    ("class", within("attn_target", _target_="AttentionWithMask"), "attn_target._target_=AttentionWithMask"),
    ("class", within("norm_layer", _target_="torch.nn.BatchNorm1d"), "norm_layer._target_=torch.nn.BatchNorm1d"),
    ("class", within("ffn_target", _target_="l3m.model.layers.moe.MoE"), "ffn_target._target_=l3m.model.layers.moe"),
    ("class", pre(_target_="x.Other"), "preprocessor._target_=x.Other"),
    ("class", head(_target_="x.TransformerClassifier"), "head._target_=x.TransformerClassifier"),
    ("text", within("cross_attn_target", _target_="x.Flex"), "cross_attn_target._target_=x.Flex"),
    ("text", embedder(_target_="x.CLIP"), "t5_embedder._target_=x.CLIP"),
    ("class", trunk(act_layer={"_target_": "torch.nn.ReLU"}, ffn_target={"_target_": "GatedFFN"}), "act_layer._targ"),
    # what we have not
    ("class", within("attn_target", rope_pos_embed=ROPE), "attn_target.rope_pos_embed=.*rotary positions"),
    ("class", within("attn_target", is_causal=False), "attn_target.is_causal=False must be True"),
    ("class", without("attn_target", "is_causal"), "attn_target.is_causal=None must be True"),
    ("class", within("attn_target", head_dim=16), "attn_target.head_dim=16 must be 32"),
    ("class", within("attn_target", new_option=1), "attn_target has an unknown option new_option=1"),
    ("class", trunk(new_option=1), "trunk has an unknown option new_option=1"),
    ("class", pre(pos_embed_type=None), "preprocessor.pos_embed_type=None must be absolute"),
    ("class", head(use_batchnorm=True), "head.use_batchnorm=True is not supported"),
    ("text", within("cross_attn_target", relative_pos_embed=ROPE), "relative_pos_embed"),
    ("text", within("cross_attn_target", is_causal=True), "cross_attn_target.is_causal=True"),
    ("text", trunk(self_attn_mask_read_key=None), "encoder_seqlen_max=None: padding would be seen"),
    ("text", trunk(self_attn_mask_read_key="other"), "self_attn_mask_read_key=other differs from"),
    ("text", trunk(encoder_output_key="other"), "encoder_output_key=other must be text_embeddings"),
    ("text", within("self_attn_target", _target_="x.GenericAttention"), "GenericAttention cannot take the mask"),
    # heads
    ("class", within("attn_target", num_heads=3), "attn_target.num_heads=3 does not fit: the width is 64"),
    ("class", within("attn_target", num_heads="2"), "attn_target.num_heads=2 must be a positive integer"),
    ("class", without("attn_target", "num_heads"), "attn_target.num_heads is missing"),
    ("text", within("cross_attn_target", num_heads=4), "num_heads=4 differs from the 2 heads of self-attention"),
    ("class", within("attn_target", num_kv_heads=1), "attn_target.num_kv_heads=1 must be 2"),
    # silent
    ("class", within("norm_layer", eps="1e-5x"), "norm_layer.eps=1e-5x must be a positive number"),
    ("class", lambda config, tensors: parts(config)[1].pop("ffn_target"), "ffn_target._target_=MLP, but there is a"),
    ("text", mlp(act_layer=None), "mlp.act_layer is missing"),
    # contradictions
    ("class", within("norm_layer", **RMS), "norm_layer is rms, but there is a tensor .*norm_1.bias"),
    ("class", lacking("norm_1.bias"), "norm_layer is layer, but there is no tensor"),
    ("class", within("attn_target", qk_norm=RMS), "qk_norm is given, but there is no tensor"),
    ("class", tensor(f"{BLOCK}attn.q_norm.weight", 32), "q_norm.weight but no .*k_norm.weight"),
    ("class", within("attn_target", qkv_bias=True), "attn_target.qkv_bias=True must be False"),
    ("class", trunk(use_bias=True), "trunk.use_bias=True must be False"),
    ("class", trunk(post_trunk_norm=False), "trunk.post_trunk_norm=False must be True"),
    ("class", trunk(num_blocks=3), "trunk.num_blocks=3 must be 2"),
    ("class", trunk(embed_dim=32), "trunk.embed_dim=32 must be 64"),
    ("class", trunk(mlp_ratio=8), "make a hidden width of 512, but .*fc1.weight has 256 rows"),
    ("class", within("ffn_target", multiple_of=100), "make a hidden width of 200"),
    ("class", within("ffn_target", _target_="l3m.model.layers.ffn.MLP"), "but there is a tensor .*fc3.weight"),
    ("class", lacking("fc3"), "but there is no tensor .*fc3.weight"),
    ("class", pre(codebook_size=81), "preprocessor.codebook_size=81 must be 80"),
    ("class", pre(token_grid_size=[4, 5]), r"token_grid_size=\[4, 5\] does not have the 16 positions"),
    ("class", pre(num_classes=11), "preprocessor.num_classes=11 must be 10"),
    ("class", pre(num_classes=None), "preprocessor.num_classes=None must be 10"),
    ("text", pre(num_classes=11), "preprocessor.num_classes=11 is not supported"),
    ("class", head(use_bias=True), "head.use_bias=True must be False"),
    ("class", head(use_layernorm=True), "head.use_layernorm=True must be False"),
    ("class", head(out_features=81), "head.out_features=81 must be 80"),
    ("text", within("cross_attn_target", encoder_dim=32), "cross_attn_target.encoder_dim=32 must be 128"),
    ("text", mlp(use_bias=True), "mlp.use_bias=True must be False"),
    ("text", mlp(text_dim=64), "mlp.text_dim=64 must be 32"),
    (
        "class",
        lambda c, t: c["generation"].update(model_type="ar_text_to_image_model"),
        "generation.model_type=ar_text",
    ),
    ("class", lambda c, t: c["generation"].update(cfg_factor="3"), "generation.cfg_factor=3 must be a number"),
    ("class", lambda c, t: c["generation"].update(top_k=1.5), "generation.top_k=1.5"),
    ("class", lambda c, t: c["generation"].update(temperature=-1), "generation.temperature=-1 must be a positive"),
    ("class", lambda c, t: c.update(generation=[]), "generation is a list instead of a mapping"),
    # tensors
    ("class", tensor(f"{MODEL}trunk.blocks.0.mlp.norm.weight", 64), "unexpected tensors: .*mlp.norm.weight"),
    ("class", tensor("models.other.weight", 3), "unexpected tensors: models.other.weight"),
    ("class", tensor(f"{MODEL}trunk.blocks.4.norm_1.weight", 64), r"blocks \['0', '1', '4'\]"),
    ("class", lacking("blocks.1.norm_2.weight"), "missing tensors: .*blocks.1.norm_2.weight"),
    ("class", tensor(f"{BLOCK}norm_1.weight", 63), r"wrong shapes: .*norm_1.weight is \[63\] instead of \[64\]"),
    ("class", tensor(f"{MODEL}preprocessor.sos_token_embed", 1, 1, 63), "sos_token_embed is .*which make no"),
    ("class", lacking("sos_token_embed"), "missing tensors: .*sos_token_embed"),
    ("class", lacking("cls_embedding"), "num_classes=10 is not supported: there are no class embeddings"),
    (
        "class",
        both(lacking("cls_embedding"), pre(num_classes=None)),
        "neither of cross-attention over a",
    ),
    ("text", tensor(f"{MODEL}preprocessor.cls_embedding.weight", 10, 128), "num_classes=None must be 10"),
    ("class", lacking("positional_embedding"), "missing tensors: .*positional_embedding"),
    ("text", lacking("text_encoder.mlp"), "missing tensors: models.text_encoder.mlp.fc1.weight"),
    ("text", lacking("text_encoder.mlp.fc2"), "missing tensors: models.text_encoder.mlp.fc2.weight"),
    ("class", tensor(f"{BLOCK}attn.qkv.weight", 128, 64), "has 128 rows instead of 192"),
    # sections
    ("class", lambda config, tensors: config.pop("model"), "model.meta_model._target_=None"),
    ("class", lambda c, t: c["model"]["meta_model"]["models"].pop("ar_image_model"), "ar_image_model is missing"),
    ("text", lambda c, t: c["model"]["meta_model"]["models"].pop("text_encoder"), "text_encoder is missing"),
    ("class", trunk(norm_layer=[1]), "trunk.norm_layer is a list instead of a mapping"),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED, ids=[f"{k}-{m[:40]}" for k, _, m in REFUSED])
def test_contradictions_and_silence_are_refused(kind: str, change: Change, message: str, tmp_path: Path) -> None:
    folder = changed(kind, change, tmp_path / "release")
    with pytest.raises(ValueError, match=message) as refusal:
        Prior.from_pretrained(folder)
    assert str(folder) in str(refusal.value)


def test_no_configuration(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "flexar_class_a" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"there is no config.yaml beside it"):
        Prior.from_pretrained(tmp_path)


VALUES = (None, -1, 0, 1e308, 2**40, "x", [], [1], {}, True, {"_target_": "os.system"}, float("nan"), "${model}")


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that is in a configuration."""
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(tree[key], (*path, key))


@pytest.mark.parametrize("kind", ["class", "text"])
def test_any_value_anywhere_is_read_or_refused(kind: str) -> None:
    folder = GOLDEN / f"flexar_{kind}_a"
    config, results = read_yaml(folder / "config.yaml"), set()
    with open_tensors(folder / "model.safetensors", {}) as file:
        for path, value in itertools.product(places(config), VALUES):
            tree = copy.deepcopy(config)
            functools.reduce(lambda node, key: node[key], path[:-1], tree)[path[-1]] = value
            try:
                read_config(Resolver(tree), file.shapes, folder)
            except ValueError as error:
                results.add(str(error).split("=")[0])
    assert len(results) > 50


# What may be otherwise


def same_logits(a: Prior, b: Prior) -> None:
    tokens = torch.randint(80, (2, 16), generator=torch.Generator().manual_seed(0))
    states = None if a.config.text_width is None else torch.ones(2, 3, a.config.text_width)
    condition = torch.tensor([3, 9]) if states is None else (states, torch.ones(2, 3, dtype=torch.bool))
    with torch.no_grad():
        assert torch.equal(a(tokens, condition), b(tokens, condition))


def split_qkv(out: str, name: str) -> Change:
    """Separate projections, as GenericAttention and HFAttention have them."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        parts(config)[1]["attn_target"]["_target_"] = f"l3m.model.layers.attention.{name}"
        for i in range(2):
            attn = f"{MODEL}trunk.blocks.{i}.attn."
            for letter, part in zip("qkv", tensors.pop(f"{attn}qkv.weight").chunk(3), strict=True):
                tensors[f"{attn}{letter}_proj.weight"] = part.clone()
            tensors[f"{attn}{out}.weight"] = tensors.pop(f"{attn}proj.weight")

    return change


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("class", split_qkv("proj", "GenericAttention")),
        ("class", split_qkv("o_proj", "HFAttention")),
        ("class", within("attn_target", _target_="l3m.model.layers.attention.DCLMAttention", qk_scale=3.0)),
        ("class", within("norm_layer", _target_="flextok.model.layers.norm.Fp32LayerNorm")),
        ("class", trunk(drop_path_rate=0.1, weight_init_style="fan_in_depth_scaled")),
        ("class", trunk(act_layer={"_target_": "torch.nn.ReLU"})),  # a SwiGLU has its own
        ("text", trunk(act_layer={"_target_": "torch.nn.ReLU"})),  # the decoder does not pass it on
        ("text", within("cross_attn_target", qk_scale=0.5, anything="else")),  # the class takes no notice
        ("text", embedder(decoder_seqlen=99, encoder_seqlen_max=20)),
        ("class", tensor("models.image_tokenizer.flextok_model.weight", 3)),
        ("text", tensor("models.text_encoder.t5_embedder.model.shared.weight", 3)),
        ("class", lambda config, tensors: config.update(optim={"lr": "${oc.env:HOME}", "date": "2026-04-28"})),
        ("class", lambda config, tensors: config.pop("generation")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the model does not use")
def test_other_releases_of_the_same_function(kind: str, change: Change, tmp_path: Path) -> None:
    same_logits(
        Prior.from_pretrained(changed(kind, change, tmp_path / "other")),
        Prior.from_pretrained(GOLDEN / f"flexar_{kind}_a"),
    )


def test_defaults_of_the_published_classes(tmp_path: Path) -> None:
    """Without a norm_layer it is LayerNorm of eps 1e-6; a plain MLP's activation is GELU, whose place differs."""

    def plain(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del parts(config)[1]["norm_layer"], parts(config)[1]["ffn_target"]
        for name in [name for name in tensors if "fc3" in name]:
            del tensors[name]
        hidden = 4 * parts(config)[1]["embed_dim"]
        for name in [name for name in tensors if ".mlp.fc" in name and "trunk" in name]:
            wide = "fc1" in name
            tensors[name] = torch.ones(hidden, hidden // 4) if wide else torch.ones(hidden // 4, hidden)

    config = Prior.from_pretrained(changed("class", plain, tmp_path / "a")).config
    assert (config.norm, config.norm_eps, config.gated, config.activation) == ("layer", 1e-6, False, "gelu")
    tanh = {"_target_": "torch.nn.GELU", "_partial_": True, "approximate": "tanh"}

    def with_tanh(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        plain(config, tensors)
        parts(config)[1]["act_layer"] = copy.deepcopy(tanh)

    assert Prior.from_pretrained(changed("class", with_tanh, tmp_path / "b")).config.activation == "gelu_tanh"
    assert Prior.from_pretrained(changed("text", with_tanh, tmp_path / "c")).config.activation == "gelu"

    def in_the_block(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        plain(config, tensors)
        parts(config)[1]["block"]["act_layer"] = copy.deepcopy(tanh)

    assert Prior.from_pretrained(changed("text", in_the_block, tmp_path / "d")).config.activation == "gelu_tanh"
    assert Prior.from_pretrained(changed("class", in_the_block, tmp_path / "e")).config.activation == "gelu"
    silent = Prior.from_pretrained(changed("class", without("norm_layer", "eps"), tmp_path / "f"))
    assert silent.config.norm_eps == 1e-5, "LayerNorm's own"


def test_what_a_release_says_of_its_use(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["generation"] |= {"top_k": 7, "top_p": 0.5, "sample": False, "tokenizer_perform_norm_guidance": False}
        config["model"]["meta_model"]["models"]["image_tokenizer"] = {"_target_": "x.ImageResamplerTokenizer"}

    config = Prior.from_pretrained(changed("class", change, tmp_path / "a")).config
    assert config.generation == GenerationConfig(1.5, 0.0, 7, 0.5, "cfg", 7.5, 25)
    assert config.tokenizer_id == "EPFL-VILAB/flextok_d18_d28_dfn" and config.tokenizer == ""
    own = {"model_id": "tok"}
    named = lambda c, t: (change(c, t), c["model"]["meta_model"]["models"]["image_tokenizer"].update(own))  # noqa: E731
    (tmp_path / "b" / "tok").mkdir(parents=True)
    assert Prior.from_pretrained(changed("class", named, tmp_path / "b")).config.tokenizer_id == str(tmp_path / "b/tok")
    assert Prior.from_pretrained(changed("class", named, tmp_path / "c")).config.tokenizer_id == "tok"
    assert Prior.from_pretrained(GOLDEN / "flexar_class_a").config.tokenizer_id == ""
    none = lambda c, t: c["generation"].update(cfg_factor=None)  # noqa: E731
    assert Prior.from_pretrained(changed("class", none, tmp_path / "d")).config.generation.cfg_scale == 1.0


def test_releases_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if name == "prior.safetensors":
            raise EntryNotFoundError("no prior.safetensors")
        return str(GOLDEN / "flexar_class_a" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    same_logits(Prior.from_pretrained("owner/FlexAR"), Prior.from_pretrained(GOLDEN / "flexar_class_a"))
    assert asked == [("owner/FlexAR", name) for name in ("prior.safetensors", "model.safetensors", "config.yaml")]


def test_grid_releases_have_rows_of_columns(tmp_path: Path) -> None:
    """GridAR: the same model over tokens in raster order."""
    loaded = Prior.from_pretrained(changed("text", pre(token_grid_size=[4, 4]), tmp_path / "grid"))
    same_logits(loaded, Prior.from_pretrained(GOLDEN / "flexar_text_a"))


def test_texts_without_a_mask(tmp_path: Path) -> None:
    """Padding is seen, so that all texts have one length."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        trunk(self_attn_mask_read_key=None)(config, tensors)
        embedder(encoder_seqlen_max=5)(config, tensors)

    prior = Prior.from_pretrained(changed("text", change, tmp_path / "a"))
    assert (prior.config.text_mask, prior.config.text_length, prior.config.null_text_length) == (False, 5, 5)
    tokens, states = torch.zeros(1, 4, dtype=torch.int64), torch.randn(1, 5, 32)
    with torch.no_grad():
        seen = [prior(tokens, (states, torch.arange(5)[None] < count)) for count in (2, 5)]
    assert torch.equal(*seen)
    with pytest.raises(ValueError, match=r"all texts must have text_length=5 positions"):
        prior(tokens, (states[:, :4], torch.ones(1, 4, dtype=torch.bool)))


def test_the_null_text_must_be_known() -> None:
    prior = Prior.from_pretrained(GOLDEN / "flexar_text_a")
    assert not prior.knows_null
    tokens, text = torch.zeros(1, 4, dtype=torch.int64), (torch.ones(1, 2, 32), torch.ones(1, 2, dtype=torch.bool))
    assert prior(tokens, text).isfinite().all()
    assert prior.generate(text, 3, temperature=0).shape == (1, 3)
    for call in (lambda: prior(tokens), lambda: prior.generate(text, cfg_scale=2.0), lambda: prior.generate(None)):
        with pytest.raises(ValueError, match=r"TextEncoder\(.*text_length, pad=not prior.config.text_mask\)"):
            call()
    prior.set_null_text(torch.ones(1, 32))
    assert prior.knows_null and prior.generate(text, 3, cfg_scale=2.0).shape == (1, 3)


# Hostile files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: !!python/object/apply:os.system ['touch ran']",
            "not YAML of plain data: could not determine a constructor",
        ),
        ("a: !!python/name:os.system", "not YAML of plain data"),
        ("!!python/object/new:os.system ['touch ran']", "not YAML of plain data"),
        (
            "model: {meta_model: {_target_: os.system, command: touch ran}}",
            "model.meta_model._target_=os.system is unknown",
        ),
        ("a: &a [*a, *a]", "too large or too deeply nested"),
        ("a: {a: 1, a: 2}", "key 'a' occurs twice"),
        ("- 1", "holds a list instead of a mapping"),
        ("a: [", "not YAML of plain data"),
        ("a: " + "x" * 60_000, "has 60003 characters"),
        ("1: 2", "has a key 1 that is not a string"),
    ],
)
def test_hostile_yaml(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.system", lambda command: pytest.fail("a command ran"))
    shutil.copy(GOLDEN / "flexar_class_a" / "model.safetensors", tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Prior.from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]
