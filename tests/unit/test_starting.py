"""Models that start from the weights of finished ones: what they take, and what they refuse by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from model_helpers import randomized
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA
from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.contracts import same_maker, weights_hash
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.data.shards.sources import require_same_origin
from flextok_pl.interop.official import config_to_official
from flextok_pl.models import starting as tables_of
from flextok_pl.models.objective import TrainingDraws, flow_loss
from flextok_pl.models.prior import Prior
from flextok_pl.models.starting import check_frozen, start_from, train_only
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import PriorModule, TokenizerModule
from flextok_pl.runtime import Trainer

PRIOR = PriorConfig(num_classes=4, vocab_size=30, num_tokens=8, depth=2, width=32, head_dim=16)
TOKENIZER = dataclasses.replace(FlexTokConfig.preset("tiny"), encoder_depth=1, decoder_depth=1)


def saved(folder: Path, config: PriorConfig | FlexTokConfig, seed: int = 1, **changes: Any) -> str:
    """The file of a new model."""
    torch.manual_seed(seed)
    kind = Prior if isinstance(config, PriorConfig) else FlexTok
    return str(kind(dataclasses.replace(config, **changes)).save_pretrained(folder / f"{seed}.safetensors"))  # type: ignore


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are equal, of two models of one kind."""
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if torch.equal(value, other[name])}


@pytest.mark.parametrize("config", [PRIOR, TOKENIZER], ids=["prior", "tokenizer"])
def test_all_weights(config: Any, tmp_path: Path) -> None:
    file, network = saved(tmp_path, config), type(config)(**vars(config))
    model = Prior(network) if config is PRIOR else FlexTok(network)
    given = type(model).from_pretrained(file)
    start = start_from(model, file)
    assert same(weights(model), weights(given)) == {*weights(given)}
    assert start.notes["started_from"] == f"{file} ({weights_hash(given)})" and model.config == config


def test_parts(tmp_path: Path) -> None:
    file, model = saved(tmp_path, PRIOR, num_classes=7), Prior(PRIOR)
    before = weights(model)
    start = start_from(model, file, ["blocks.0", "head", "start"])
    given = weights(Prior.from_pretrained(file))
    taken = {name for name in before if name.startswith(("blocks.0.", "head.")) or name == "start"}
    assert start.taken == taken and start.notes["started_from"].endswith("): blocks.0, head, start")
    ones = {name for name in taken if "norm" in name}  # of every new model
    assert same(weights(model), before) & taken == ones
    assert all(torch.equal(model.state_dict()[name], given[name]) for name in taken)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before.keys() - taken)


def test_what_a_training_may_change(tmp_path: Path) -> None:
    """Laws of training, notes, and the fill of tables that are taken; a text prior keeps its own empty string."""
    file = saved(tmp_path, TOKENIZER, nested_dropout="uniform", null_dropout=0.5, repa_layer=0, position_base=10.0)
    model = FlexTok(TOKENIZER)
    start_from(model, file)
    assert torch.equal(model.decoder.patch_posemb, FlexTok.from_pretrained(file).decoder.patch_posemb)
    text = dataclasses.replace(PRIOR, num_classes=0, text_width=6)
    file = saved(tmp_path, text, 2, tokenizer="a" * 16, text_encoder="other", null_text_length=3)
    prior = Prior(text)
    prior.set_null_text(torch.ones(1, 6))
    start_from(prior, file)
    assert torch.equal(prior.null_text, torch.ones(1, 6)) and prior.config == text
    assert torch.equal(prior.text_projection[0].weight, Prior.from_pretrained(file).text_projection[0].weight)


@pytest.mark.parametrize(
    ("there", "parts", "messages"),
    [
        (
            {"depth": 3, "width": 64},
            None,
            ["depth is 3 there and 2 here; width is 64 there and 32 here; set model.net.depth=3 model.net.width=64"],
        ),
        ({"num_classes": 5}, None, ["num_classes is 5 there and 4 here; set model.net.num_classes=5", "init_parts"]),
        ({"num_classes": 0, "text_width": 6}, None, ["text_width is 6 there and null here"]),
        ({"head_dim": 32}, None, ["head_dim is 32 there and 16 here; set model.net.head_dim=32"]),
        ({"head_dim": 32}, ["blocks.1"], ["set model.net.head_dim=32"]),
        ({"mlp_ratio": 2.0}, ["blocks"], ["set model.net.mlp_ratio=2.0"]),
        ({"qk_norm": True}, ["blocks"], ["set model.net.qk_norm=true"]),
    ],
)
def test_priors_that_do_not_fit(there: dict[str, Any], parts: Any, messages: list[str], tmp_path: Path) -> None:
    file, model = saved(tmp_path, PRIOR, **there), Prior(PRIOR)
    before = weights(model)
    with pytest.raises(ValueError, match="init_from=.* does not fit the model: ") as refused:
        start_from(model, file, parts)
    assert all(message in str(refused.value) for message in messages), refused.value
    assert same(weights(model), before) == {*before}


def test_parts_fit_though_others_do_not(tmp_path: Path) -> None:
    file = saved(tmp_path, PRIOR, head_dim=32, depth=1, num_classes=9, num_tokens=16)
    start_from(Prior(PRIOR), file, ["token_embedding", "head", "norm"])
    start_from(Prior(dataclasses.replace(PRIOR, head_dim=32)), file, ["blocks.0"])
    with pytest.raises(ValueError, match=r"positions is \[16, 32\] there and \[8, 32\]|num_tokens is 16 there"):
        start_from(Prior(PRIOR), file, ["positions"])


@pytest.mark.parametrize(
    ("there", "parts", "message"),
    [
        ({"fsq_levels": (7, 5, 5, 5, 5, 5)}, None, r"set model.net.fsq_levels=\[7, 5, 5, 5, 5, 5\]"),
        ({"causal_registers": False}, ["encoder"], "causal_registers is false there and true here"),
        ({"objective": "mse"}, ["decoder.blocks"], 'set model.net.objective="mse"'),
        ({"num_registers": 8}, None, "num_registers is 8 there and 16 here"),
        ({"decoder_head_dim": 16}, None, "decoder_head_dim is 16 there"),
        ({"vae": VAEConfig("pixel", 12, scaling_factor=2.0)}, None, r"set model.vae to .* model.init_parts=\[encoder"),
    ],
)
def test_tokenizers_that_do_not_fit(there: dict[str, Any], parts: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        start_from(FlexTok(TOKENIZER), saved(tmp_path, TOKENIZER, **there), parts)


def test_one_side_of_a_tokenizer(tmp_path: Path) -> None:
    """A decoder of another size, or with another objective, for a finished encoder, on latents of another scale."""
    vae = VAEConfig("pixel", 12, scaling_factor=2.0)
    file = saved(tmp_path, TOKENIZER, decoder_head_dim=16, decoder_depth=3, objective="mse", vae=vae)
    model = FlexTok(TOKENIZER)
    decoder = weights(model.decoder)
    start_from(model, file, ["encoder"])
    given = FlexTok.from_pretrained(file)
    assert same(weights(model.encoder), weights(given.encoder)) == {*weights(given.encoder)}
    assert same(weights(model.decoder), decoder) == {*decoder}


def test_an_official_tokenizer(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the published format, with a small autoencoder in the place of the published one."""
    source = FlexTok.from_pretrained(golden_dir, vae_config=golden_dir / "vae_config.json")
    monkeypatch.setattr("flextok_pl.interop.official.PUBLISHED_VAE", source.config.vae)
    model = FlexTok(source.config, source.vae)
    assert not torch.equal(model.decoder.head.proj.weight, source.decoder.head.proj.weight)
    start_from(model, str(golden_dir))
    assert same(weights(model), weights(source)) == {*weights(source)}


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_published_prior(kind: str, golden_dir: Path) -> None:
    """The options that it needs are told all at once; the states of its empty string, which it lacks, are not taken."""
    folder = golden_dir.with_name(f"flexar_{kind}_a")
    source = Prior.from_pretrained(folder)
    config = source.config
    sizes = ("num_classes", "text_width", "vocab_size", "num_tokens", "depth", "width", "head_dim")
    bare = PriorConfig(**{name: getattr(config, name) for name in sizes})
    with pytest.raises(ValueError, match="does not fit the model: .*; set ") as refused:
        start_from(Prior(bare), str(folder))
    options = dict(each.split("=") for each in str(refused.value).split("; set ")[1].split(", or")[0].split(" "))
    told = {name.removeprefix("model.net."): json.loads(value) for name, value in options.items()}
    model = Prior(dataclasses.replace(bare, **told))
    start_from(model, str(folder))
    states = {name: value for name, value in weights(source).items() if name != "null_text"}
    assert {*states} <= same(weights(model), weights(source))


def test_the_tables_name_options() -> None:
    known = {field.name for config in (PriorConfig, FlexTokConfig, VAEConfig) for field in dataclasses.fields(config)}
    tables = (
        tables_of.NOTES,
        tables_of.OF_NEW_MODELS,
        tables_of.OF_TRAINING,
        tables_of.OF_SHAPES,
        {*tables_of.OF_PARTS},
    )
    assert all(table <= known for table in tables) and sum(map(len, tables)) == len(frozenset().union(*tables))


def test_official_files_have_no_place_for_the_note() -> None:
    config = dataclasses.replace(FlexTokConfig(), started_from="x (0123456789abcdef)", same_tokens_as=("a", "b"))
    assert config_to_official(config) == config_to_official(FlexTokConfig())


@pytest.mark.parametrize(
    ("source", "parts", "message"),
    [
        ("x", ["encodr"], "init_parts has 'encodr', which is not a part of the model; it has decoder, encoder"),
        ("x", ["encoder", "encoder.block"], "'encoder.block'"),
        ("x", ["vae"], "'vae'"),
        ("x", [], "null takes everything"),
        (None, ["encoder"], "needs model.init_from"),
    ],
)
def test_parts_that_there_are_not(source: str | None, parts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerModule(TOKENIZER, init_from=source, init_parts=parts)


def test_sources_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init_from='nowhere': no checkpoint 'nowhere'"):
        start_from(Prior(PRIOR), "nowhere")
    with pytest.raises(ValueError, match="is a training checkpoint: give the .safetensors file"):
        start_from(Prior(PRIOR), "runs/mine/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="init_from=.* is not a Prior checkpoint"):
        start_from(Prior(PRIOR), saved(tmp_path, TOKENIZER))


class Sequences(pl.LightningDataModule):
    """Token shards of one batch, made by a tokenizer."""

    def __init__(self, sha256: str = "a" * 16, classes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.tokenizer = {"sha256": sha256, "vocab_size": 30, "num_tokens": 8}
        self.classes = classes

    def train_dataloader(self) -> DataLoader:
        batch = {"tokens": torch.arange(8).repeat(4, 1), "label": torch.arange(4), "key": list("abcd")}
        return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader = train_dataloader


def starting(file: str, **options: Any) -> PriorModule:
    return PriorModule(options.pop("net", PRIOR), init_from=file, lr=1e-2, warmup_steps=0, **options)


def trainer(path: Path, max_steps: int = 1) -> Trainer:
    options = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    return Trainer(accelerator="cpu", max_steps=max_steps, default_root_dir=path, log_every_n_steps=1, **options)


def test_weights_stay_what_a_run_or_a_checkpoint_made_them(tmp_path: Path) -> None:
    """The source is read once, in whatever is run first, and never where a checkpoint was loaded."""
    file = saved(tmp_path, PRIOR)
    expected = weights(Prior.from_pretrained(file))
    module = starting(file)
    trainer(tmp_path / "a").test(module, Sequences(), verbose=False)
    assert same(weights(module.prior), expected) == {*expected}, "an evaluation begins with them, too"
    run = trainer(tmp_path / "a")
    run.fit(module, Sequences())
    trained = weights(module.prior)
    assert not torch.equal(trained["head.weight"], expected["head.weight"])
    run.test(module, Sequences(), verbose=False)
    (checkpoint,) = {each.resolve() for each in (tmp_path / "a" / "checkpoints").glob("*.ckpt")}
    loaded = PriorModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.prior.config.started_from == loaded.hparams["started_from"] == module.hparams["started_from"]
    Path(file).unlink()
    again = starting(file)
    trainer(tmp_path / "a").test(again, Sequences(), ckpt_path=checkpoint, verbose=False)
    for each in (module, loaded, again):
        trainer(tmp_path / "a").test(each, Sequences(), verbose=False)
        assert same(weights(each.prior), trained) == {*trained}
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer(tmp_path / "b").fit(starting(file), Sequences())


def test_tokens_and_classes_that_the_weights_know(tmp_path: Path) -> None:
    named = saved(tmp_path, PRIOR, tokenizer="a" * 16, class_names=("p", "q", "r", "s"))
    module = starting(named)
    trainer(tmp_path / "a").fit(module, Sequences())
    assert module.class_names == ("p", "q", "r", "s") and module.prior.config.tokenizer == "a" * 16
    for data, message in (
        (Sequences("b" * 16), "belongs to tokenizer b+, the prior to tokenizer a+"),
        (Sequences(classes=("p", "r", "q", "s")), "the prior and the shards differ in classes"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "b").fit(starting(named), data)
    other = starting(named, init_parts=["blocks", "norm", "positions", "start"])
    trainer(tmp_path / "c").fit(other, Sequences("b" * 16, ("w", "x", "y", "z")))
    assert other.class_names == ("w", "x", "y", "z") and other.prior.config.tokenizer == "b" * 16
    net = dataclasses.replace(PRIOR, class_names=("s", "q", "r", "p"))
    with pytest.raises(ValueError, match="the prior and init_from=.* differ in classes"):
        trainer(tmp_path / "d").fit(starting(named, net=net), Sequences())


def test_the_tokenizer_beside_the_prior_is_that_of_its_weights(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, TOKENIZER, 5, fsq_levels=(5, 3, 2), num_registers=8)
    module = starting(saved(tmp_path, PRIOR, tokenizer="a" * 16), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer=.* belongs to tokenizer .*, the prior to tokenizer a+"):
        trainer(tmp_path / "a").fit(module, Sequences(FlexTok.from_pretrained(tokenizer).identity()["sha256"]))


def test_the_average_begins_with_them(tmp_path: Path) -> None:
    file = saved(tmp_path, PRIOR)
    averaging = EMA(decay=0.5, update_starting_at_step=1)
    run = trainer(tmp_path / "a", 2)
    run.callbacks.append(averaging)

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            head = averaging._weights["prior.head.weight"]  # type: ignore[index]
            assert torch.equal(head, Prior.from_pretrained(file).head.weight)
            self.looked = True

    run.callbacks.append(look := Look())
    run.fit(starting(file), Sequences())
    assert look.looked


def test_an_export_says_where_it_started(tmp_path: Path) -> None:
    file = saved(tmp_path, PRIOR)
    trainer(tmp_path / "a").fit(starting(file), Sequences())
    exported = Prior.from_pretrained(tmp_path / "a" / "prior.safetensors")
    assert exported.config.started_from == f"{file} ({weights_hash(Prior.from_pretrained(file))})"
    again = starting(str(tmp_path / "a"))
    trainer(tmp_path / "b").fit(again, Sequences())
    assert again.prior.config.started_from == f"{tmp_path / 'a'} ({weights_hash(exported)})"
    assert "started_from" not in PriorModule(PRIOR).hparams


# Some parts only


class Pictures(pl.LightningDataModule):
    """The same four random pictures of 32 px in each batch."""

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        batch = {"image": torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1, "key": list("abcd")}
        return DataLoader([batch] * 3, batch_size=None)  # type: ignore


def decoding(file: str, **options: Any) -> TokenizerModule:
    given = {"train": ["decoder"], "init_from": file, "lr": 1e-2, "warmup_steps": 0, "weight_decay": 0.5} | options
    return TokenizerModule(given.pop("net", TOKENIZER), **given)


class Seen(EMA):
    """What is averaged, and what has a gradient."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        self.averaged = set(self._weights or ())
        self.with_gradient = {name for name, weight in pl_module.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("base_width", [None, 32])
def test_what_is_not_named_is_frozen(base_width: int | None, tmp_path: Path) -> None:
    """No gradient, no optimizer state, no decay, no average; a training that goes on ends with the same weights."""
    file = saved(tmp_path, TOKENIZER)
    before, ends = weights(FlexTok.from_pretrained(file)), []
    for ckpt_path in (None, tmp_path / "step=1.ckpt"):
        net = dataclasses.replace(TOKENIZER, null_dropout=0.5)
        module, seen = decoding(file, net=net, mup_base_width=base_width), Seen(decay=0.5)
        run = trainer(tmp_path, 3)
        run.callbacks += [seen, ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)]
        run.fit(module, Pictures(), ckpt_path=ckpt_path)
        ends.append(weights(FlexTok.from_pretrained(tmp_path / "tokenizer.safetensors")))
        trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
        assert trained == {name for name in trained if name.startswith("tokenizer.decoder.")}
        assert seen.averaged == seen.with_gradient == trained
        assert sum(len(group["params"]) for group in run.optimizers[0].param_groups) == len(trained)
    changed = {*before} - same(ends[0], before)
    assert changed == {name.removeprefix("tokenizer.") for name in trained}
    assert same(*ends) == {*before}
    stored = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["train"] == ["decoder"]
    with pytest.raises(ValueError, match=r"model.train was \['decoder'\], and is None now"):
        trainer(tmp_path / "b").fit(decoding(file, train=None), Pictures(), ckpt_path=tmp_path / "step=1.ckpt")


def test_the_decoder_alone_keeps_the_tokens(tmp_path: Path) -> None:
    """Records of the tokenizer before hold for that after, also those of earlier versions, and after a second time."""
    files = [saved(tmp_path, TOKENIZER)]
    for turn, parts in enumerate((["decoder"], ["decoder.head"], ["encoder.head", "decoder"])):
        trainer(tmp_path / f"{turn}").fit(decoding(files[-1], train=parts), Pictures())
        files.append(str(tmp_path / f"{turn}" / "tokenizer.safetensors"))
    first, second, third, last = (FlexTok.from_pretrained(file) for file in files)
    old = {"sha256": weights_hash(first), "vocab_size": first.config.vocab_size, "num_tokens": 16}
    images = next(iter(Pictures().train_dataloader()))["image"]
    assert torch.equal(first.tokenize(images), third.tokenize(images))
    assert len({weights_hash(each) for each in (first, second, third)}) == 3
    for tok in (first, second, third):
        assert same_maker(tok.identity(), old) and same_maker(tok.identity(), first.identity())
    assert third.identity()["same_as"] == [weights_hash(second), weights_hash(first)]
    assert not same_maker(last.identity(), old) and not same_maker(last.identity(), first.identity())
    assert last.config.same_tokens_as == ()
    # Token shards of an earlier version and of today are read together, and a prior learns both.
    sets = [ShardIndex(tmp_path, ("tokens",), (), provenance={"tokenizer": each}) for each in (old, third.identity())]
    require_same_origin(*sets)
    with pytest.raises(ShardError, match="hold tokens of different tokenizers"):
        require_same_origin(sets[0], dataclasses.replace(sets[1], provenance={"tokenizer": last.identity()}))
    net = dataclasses.replace(PRIOR, vocab_size=64000, num_tokens=16, depth=1)
    for data, named, accepted in ((old, 3, True), (first.identity(), 3, True), (old, 4, False), (old, 1, True)):
        module, shards = PriorModule(net, tokenizer=files[named - 1]), Sequences()
        shards.tokenizer = data
        if accepted:
            trainer(tmp_path / "prior").test(module, shards, verbose=False)
            assert module.prior.config.tokenizer == first.identity()["sha256"]
        else:
            with pytest.raises(ValueError, match="the set of token shards belongs to tokenizer"):
                trainer(tmp_path / "prior").test(module, shards, verbose=False)


def test_a_frozen_encoder_gives_the_tokens_that_tokenize_gives(tmp_path: Path) -> None:
    """In training mode and under autocast, without a graph; the decoder computes as in any training."""
    tok = randomized(TOKENIZER).train()
    latents = tok.encode_latents(next(iter(Pictures().train_dataloader()))["image"])
    draws = TrainingDraws(
        torch.randn_like(latents), torch.rand(4), torch.tensor([16, 3, 16, 9]), torch.zeros(4, dtype=torch.bool)
    )
    expected = torch.cat([row[:k] for row, k in zip(tok.tokenize_latents(latents), (16, 3, 16, 9), strict=True)])
    codes: list[torch.Tensor] = []
    tok.decoder.register_forward_pre_hook(lambda module, inputs: codes.append(inputs[2]))
    for parts in (["decoder"], None):
        tok.requires_grad_(True)
        train_only(tok, parts)
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_loss(tok, latents, draws).loss.mean()
        loss.backward()
    assert torch.equal(tok.quantizer.codes_to_tokens(codes[0]), expected)
    assert not codes[0].requires_grad and codes[1].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ["decodr"]}, "train has 'decodr', which is not a part of the model; it has decoder, encoder"),
        ({"train": []}, "trains nothing; null trains everything"),
        ({"train": ["decoder.patch_posemb"]}, "trains nothing: positions of patches are fixed"),
    ],
)
def test_parts_that_cannot_be_trained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoding("x", **options)


@pytest.mark.parametrize("options", [{"init_from": None}, {"init_parts": ["decoder"]}])
def test_new_weights_are_not_frozen(options: dict[str, Any], tmp_path: Path) -> None:
    module = decoding(saved(tmp_path, TOKENIZER), **options)
    with pytest.raises(ValueError, match=r"train=\['decoder'\] freezes encoder, whose weights are new: name a"):
        trainer(tmp_path).fit(module, Pictures())


@pytest.mark.parametrize("config", [dataclasses.replace(PRIOR, fixed_positions=True), TOKENIZER], ids=["prior", "tok"])
def test_fixed_positions_are_no_new_weights(config: Any) -> None:
    with torch.device("meta"):
        network: Any = Prior(config) if isinstance(config, PriorConfig) else FlexTok(config)
    trained = [name for name, weight in network.named_parameters() if weight.requires_grad]
    assert len(trained) < len(list(network.parameters()))
    check_frozen(network, trained, None)
    with pytest.raises(ValueError, match=f"freezes {trained[0].split('.')[0]}, whose weights are new"):
        check_frozen(network, trained[1:], None)


def test_parts_of_a_prior(tmp_path: Path) -> None:
    module = starting(saved(tmp_path, PRIOR), train=["blocks.1", "head"])
    before = weights(Prior.from_pretrained(tmp_path / "1.safetensors"))
    trainer(tmp_path / "a").fit(module, Sequences())
    changed = {*before} - same(weights(module.prior), before)
    assert changed == {name for name in before if name.startswith(("blocks.1.", "head."))}
