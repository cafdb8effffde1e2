"""Publish models, with a card of what their runs have recorded."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.contracts import weights_hash
from flextok_pl.files import write_file
from flextok_pl.interop.tensor_file import with_indices
from flextok_pl.sharing.card import ModelFacts, model_card
from flextok_pl.sharing.publication import Publication
from flextok_pl.sharing.run import RESULTS, read_run, without_places
from flextok_pl.sharing.upload import upload


class Publishable(nn.Module):
    """Base of models that have a configuration, weights to save and a folder layout to publish."""

    config: FlexTokConfig | PriorConfig | VAEConfig
    loaded_from: str = ""
    """`OWNER/NAME@COMMIT` of a model from the Hub; empty for others."""

    def weights_to_save(self, weights: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The tensors of its file, by name. `weights` is its state dict, if the model itself holds only parts."""
        return self.state_dict() if weights is None else weights

    def file_names(self) -> Sequence[str]:
        """Names that its file may have in a folder, in the order in which `from_pretrained` tries them."""
        raise NotImplementedError

    def save_to_publish(self, folder: Path, format: str, max_shard_size: int | str | None) -> Path:
        """Save the model in a folder; returns the file, or the index of several."""
        raise NotImplementedError

    def push_to_hub(self, repository: str, *, send: bool = False, **options: Any) -> str | None:
        """Publish the model on the Hugging Face Hub with a model card; without `send` only show what would be sent.

        Args:
            repository: `OWNER/NAME`.
            send: send it. By default nothing leaves this machine.
            **options: those of `flextok_pl.sharing.publication.Publication`, of which `license` and `data_license` are
                required, and those of `publish`, such as `run`.

        Returns:
            The address of the commit, or None if nothing was sent.

        Raises:
            ValueError: an option is missing or wrong, records belong to other weights, or the Hub refuses.
        """
        known = {field.name for field in dataclasses.fields(Publication)}
        given = Publication(repository, **{name: value for name, value in options.items() if name in known})
        return self.publish(given, send, **{name: value for name, value in options.items() if name not in known})

    def publish(
        self,
        given: Publication,
        send: bool = False,
        run: str | Path | None = None,
        records: str | Path | None = None,
        format: str = "ours",
        max_shard_size: int | str | None = None,
        out: str | Path | None = None,
    ) -> str | None:
        """Run `push_to_hub` with its options in one object.

        The card states what the run has recorded, and marks what it has not. All files go in one commit, with the
        token in HF_TOKEN or that of `hf auth login`.

        Args:
            given: the repository, and the facts that the card needs from you.
            send: see `push_to_hub`.
            run: folder of the run that trained the model.
            records: folder of an evaluation by `flextok test`; default the run's, or the newest one beside it whose
                records belong to these weights.
            format: see `save_pretrained`.
            max_shard_size: see `save_pretrained`.
            out: new or empty folder in which to keep the files for inspection.
        """
        facts = self._facts(format)
        known = read_run(None if run is None else Path(run).expanduser(), facts.kind, facts.digest, records)
        with _folder(out) as folder:
            weights = self.save_to_publish(folder, format, max_shard_size)
            for picture in known.pictures:
                shutil.copy(picture, folder / picture.name)
            if known.records:
                name, _ = RESULTS[facts.kind]
                write_file(folder / f"{name}.json", json.dumps(without_places(known.records), indent=1) + "\n")
            write_file(folder / "README.md", model_card(given, facts, known))
            print(_shown(given, folder))
            if not send:
                print("\nNothing was sent: read the card, then add `send`.")
                return None
            address = upload(folder, given, weights.name, with_indices(self.file_names()))
        print(f"\nsent: {address}")
        return address

    def _facts(self, format: str) -> ModelFacts:
        weights = self.weights_to_save()
        sizes = Counter[str]()
        for name, tensor in weights.items():
            sizes[name.partition(".")[0] if "." in name else "other"] += tensor.numel()
        types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
        digest = weights_hash(self if types == ["float32"] else copy.deepcopy(self).to(torch.float32))
        return ModelFacts(self.config, sizes, ", ".join(types), digest, format)


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The given folder, which must be empty, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="flextok_push_") as temporary:
            yield Path(temporary)
        return
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out={out} exists and is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def _shown(given: Publication, folder: Path) -> str:
    """Describe, as text, what would be sent."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name)
    who = "private" if given.private else "public, unless the repository exists and is private"
    access = "" if given.gated is None else f", gated ({given.gated})"
    lines = [
        f"repository: {given.repository}, branch {given.revision or 'main'}; {who}{access}",
        f"commit: {given.message or f'Add {given.title}'}",
        "files:",
        *(f"  {file.stat().st_size / 1e6:12.3f} MB  {file.name}" for file in files),
        "README.md:",
        *(f"  {line}" for line in (folder / "README.md").read_text(encoding="utf-8").splitlines()),
    ]
    return "\n".join(lines)
