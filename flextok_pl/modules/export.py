"""Exports the network of a training at its end."""

from pathlib import Path

import lightning.pytorch as pl
import torch

from flextok_pl.contracts import run_folder
from flextok_pl.runtime.sharding import whole_weights


def export(module: pl.LightningModule, name: str) -> None:
    """Save the network `module.NAME` in the run's folder, as `NAME.safetensors`. All processes must call this.

    The weights are the averaged ones if an averaging callback runs. If another keeps the best checkpoint by a logged
    value, `NAME_best.safetensors` gets that one's weights; a checkpoint in parts, or behind a URL, is left out.
    """
    trainer, network = module.trainer, getattr(module, name)
    folder, weights = run_folder(trainer), whole_weights(network)
    if not trainer.is_global_zero:
        return
    print(f"{name} exported to {network.save_pretrained(folder / f'{name}.safetensors', weights=weights)}")
    for callback in trainer.checkpoint_callbacks:
        best = Path(getattr(callback, "best_model_path", ""))
        if getattr(callback, "monitor", None) in (None, "step") or not best.is_file():
            continue
        state, prefix = torch.load(best, map_location="cpu", weights_only=True, mmap=True)["state_dict"], f"{name}."
        # Frozen weights are not in it; they are still those of `weights`.
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        path = network.save_pretrained(folder / f"{name}_best.safetensors", weights=weights | own)
        print(f"{name} of {best.name} exported to {path}")
