"""`model.init_from` through the front door: a fit that starts from a model, goes on without it, and says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flextok_pl.assets import DEMO_TOKENIZER
from flextok_pl.cli import main
from flextok_pl.config import PriorConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.models.prior import Prior
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules import PriorModule

QUICK = {"rfid": None, "codebook": None}
RUNS = Path("runs") / "tokenizer" / "tiny"


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)


def validated(run: Path) -> float:
    return EventAccumulator(str(run)).Reload().Scalars("val/loss")[-1].value  # type: ignore[no-any-return]


def exported(run: Path) -> FlexTok:
    return FlexTok.from_pretrained(run / "tokenizer.safetensors")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    return f"{capsys.readouterr().err}{stop.value}"


def test_a_tokenizer_starts_from_another_runs_export(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a step of its own it is validated and exported as that one was."""
    main(tiny("fit", QUICK | {"trainer.max_steps": 4, "seed_everything": 1}))
    source = RUNS / "version_0" / "tokenizer.safetensors"
    still = QUICK | {"trainer.max_steps": 1, "model.lr": 0.0}
    main(tiny("fit", still | {"model.init_from": str(source)}))
    main(tiny("fit", still))
    first, started, new = (validated(RUNS / f"version_{number}") for number in range(3))
    assert first == started and new > first + 1e-3
    weights = exported(RUNS / "version_0").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in exported(RUNS / "version_1").state_dict().items())

    note = f"{source} ({weights_hash(FlexTok.from_pretrained(source))})"
    assert f"starting from the weights of {note}" in capsys.readouterr().out
    assert exported(RUNS / "version_1").config.started_from == note
    stored = torch.load(RUNS / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["started_from"] == note
    config = yaml.safe_load((RUNS / "version_1" / "config.yaml").read_text())
    assert config["model"]["init_args"]["init_from"] == str(source)
    assert note.encode() in next((RUNS / "version_1" / "hparams").glob("events*")).read_bytes()
    assert exported(RUNS / "version_2").config.started_from == ""


def test_a_fit_goes_on_without_the_file(tiny: Any, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And ends like one that was not interrupted; before its first checkpoint `last` starts from the file, too."""
    file = Path("start.safetensors")
    file.write_bytes(tiny_tokenizer.read_bytes())
    start = QUICK | {"model.init_from": str(file), "model.init_parts": "[decoder]", "checkpoint.every_n_train_steps": 1}
    main(tiny("fit", start | {"trainer.max_steps": 2, "run": "whole"}))
    main(tiny("fit", start | {"trainer.max_steps": 1, "run": "part", "ckpt_path": "last"}))
    assert capsys.readouterr().out.count("starting from the weights of") == 2
    file.unlink()
    main(tiny("fit", start | {"trainer.max_steps": 2, "run": "part", "ckpt_path": "last"}))
    assert "starting from the weights" not in capsys.readouterr().out
    whole, part = exported(RUNS / "whole"), exported(RUNS / "part")
    assert all(torch.equal(value, part.state_dict()[name]) for name, value in whole.state_dict().items())
    assert whole.config == part.config and whole.config.started_from.endswith("): decoder")
    assert "there is no such file or folder" in error_of(tiny("fit", start), capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.net.decoder_depth": 3}, "decoder_depth is 2 there and 3 here; set model.net.decoder_depth=2"),
        ({"model.init_parts": "[encodr]"}, "'encodr', which is not a part of the model; it has decoder, encoder"),
        ({"model.init_from": str(DEMO_TOKENIZER)}, "latent_channels is 16 there and 12 here"),
    ],
)
def test_what_does_not_fit(
    options: dict[str, Any], message: str, tiny: Any, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = QUICK | {"model.init_from": str(tiny_tokenizer), "trainer.max_steps": 1} | options
    assert message in error_of(tiny("fit", given), capsys)
    assert not list(RUNS.glob("version_*")), "a start that fails leaves nothing"


def test_a_prior_starts_from_a_file(image_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the first step is the finished model's on the same tokens."""
    net = {"num_classes": 2, "num_tokens": 64, "vocab_size": 4375, "depth": 1, "width": 32, "head_dim": 16}
    torch.manual_seed(5)
    file = Prior(PriorConfig(**net)).save_pretrained(Path("given") / "prior.safetensors")  # type: ignore[arg-type]
    data = {"train": str(image_shards / "train"), "val": str(image_shards / "val"), "image_size": 64, "batch_size": 8}
    options = {"tokenizer": str(DEMO_TOKENIZER), "init_from": "given", "condition_dropout": 0.0, "warmup_steps": 0}
    model = {"class_path": "PriorModule", "init_args": {"net": net, **options}}
    trainer = {"max_steps": 1, "limit_val_batches": 0, "enable_progress_bar": False}
    base = yaml.safe_load((Path(__file__).parents[2] / "experiments" / "base.yaml").read_text())
    given = {**base, "data": {**data, "num_workers": 0}, "model": model, "trainer": base["trainer"] | trainer}
    Path("prior.yaml").write_text(yaml.safe_dump(given))
    seen, real = [], PriorModule.training_step

    def training_step(module: PriorModule, batch: Any, batch_idx: int) -> Any:
        outputs = real(module, batch, batch_idx)
        seen.append((module.tokens(batch), batch["label"], outputs["loss"].detach()))
        return outputs

    monkeypatch.setattr(PriorModule, "training_step", training_step)
    main(["fit", "--config", "prior.yaml", "--ema.decay", "0.5"])
    ((tokens, labels, loss),) = seen
    prior = Prior.from_pretrained(file)
    expected = token_loss(prior.hidden(tokens, labels), prior.head.weight, tokens).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (run,) = Path("runs").glob("**/prior.safetensors")
    made = Prior.from_pretrained(run).config
    assert made.started_from == f"given ({weights_hash(prior)})" and made.class_names == ("left", "right")
