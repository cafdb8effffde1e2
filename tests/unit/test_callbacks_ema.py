"""The moving average of the weights: its law, what checkpoints hold, and what is refused."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from flextok_pl.callbacks import EMA


class Line(pl.LightningModule):
    """One weight that a step of SGD lowers by 1, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([8.0]))
        self.fixed = torch.nn.Parameter(torch.tensor([3.0]), requires_grad=False)
        self.validated: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.weight.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1.0)


def loader() -> DataLoader:
    return DataLoader(torch.zeros(4, 1))


def trainer(folder: Path, average: EMA, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[average],
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **options},
    )


def expected(updates: list[float], decay: float) -> float:
    value = updates[0]
    for update in updates[1:]:
        value = decay * value + (1 - decay) * update
    return value


@pytest.mark.parametrize(
    ("options", "fit_options", "updates"),
    [
        ({}, {}, [7.0, 6.0, 5.0, 4.0]),
        ({"update_every_n_steps": 2}, {}, [7.0, 5.0]),
        ({"update_starting_at_step": 2}, {}, [5.0, 4.0]),
        ({}, {"accumulate_grad_batches": 2}, [7.0, 6.0]),
    ],
)
def test_the_law(options: dict[str, int], fit_options: dict[str, int], updates: list[float], tmp_path: Path) -> None:
    model, average = Line(), EMA(decay=0.75, **options)
    trainer(tmp_path, average, **fit_options).fit(model, loader(), loader())
    assert model.weight.item() == pytest.approx(expected(updates, 0.75)), "the fit ends with the average"
    assert model.validated == [pytest.approx(model.weight.item())] * 4, "and validates it"
    assert average.num_updates == len(updates) and model.fixed.item() == 3


def test_checkpoints_hold_both_and_a_resumed_fit_goes_on(tmp_path: Path) -> None:
    whole = Line()
    trainer(tmp_path, EMA(decay=0.75), max_epochs=2).fit(whole, loader())

    half, average = Line(), EMA(decay=0.75)
    first = trainer(tmp_path, average, max_epochs=1)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    first.callbacks.append(Save())
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("within", "after"):
        state = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert state["state_dict"]["weight"].item() == pytest.approx(expected([7.0, 6.0, 5.0, 4.0], 0.75))
        assert state["current_model_state"]["weight"].item() == 4.0
        assert state["state_dict"]["fixed"].item() == 3.0

    resumed = Line()
    trainer(tmp_path, EMA(decay=0.75), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "within.ckpt")
    assert torch.equal(resumed.weight, whole.weight)

    validated = Line()
    trainer(tmp_path, EMA()).validate(validated, loader(), ckpt_path=tmp_path / "within.ckpt", verbose=False)
    assert validated.validated == [pytest.approx(half.weight.item())] * 4


def test_a_checkpoint_without_average_starts_one(tmp_path: Path) -> None:
    model, plain = Line(), trainer(tmp_path, EMA())
    plain.callbacks.clear()
    plain.fit(model, loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="holds no average"):
        trainer(tmp_path, EMA(decay=0.5), max_epochs=2).fit(Line(), loader(), ckpt_path=tmp_path / "plain.ckpt")


def test_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"decay": 1.0}, "decay=1.0"),
        ({"update_every_n_steps": 0}, "update_every_n_steps=0"),
        ({"update_starting_at_step": -1}, "update_starting_at_step=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            EMA(**options)
    never = {"update_starting_at_step": 4}, {"update_starting_at_step": 1, "update_every_n_steps": 4}
    for options in never:
        with pytest.raises(MisconfigurationException, match=r"first update at step 4, but the last step is 3.*lower"):
            trainer(tmp_path, EMA(**options)).fit(Line(), loader())
