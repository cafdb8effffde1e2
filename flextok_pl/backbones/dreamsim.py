"""DreamSim (https://arxiv.org/abs/2306.09344), computed by its authors' package.

It is a cosine distance of embeddings tuned to human judgements of similarity: 0 for equal images, larger for images
that look less alike to people.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained
from flextok_pl.channels import as_rgb
from flextok_pl.downloads import Download, Part, Places, torch_hub_at
from flextok_pl.precision import as_float64

NETWORKS = ("ensemble", "dino_vitb16", "dinov2_vitb14", "clip_vitb32", "open_clip_vitb32", "synclr_vitb16")
"""Values of the package's `dreamsim_type`; `ensemble` is the paper's."""


def check_dreamsim(network: str | None, weights: Path | str | None) -> None:
    """Check options without loading a network."""
    if network is None:
        if weights is not None:
            raise ValueError(f"dreamsim_weights={str(weights)!r} need a network: set dreamsim to one of {NETWORKS}")
        return
    if network not in NETWORKS:
        raise ValueError(f"dreamsim={network!r} is unknown; use one of {NETWORKS}, or null")
    if weights is not None and not (Path(weights).expanduser() / _tuned(network)).is_dir():
        raise ValueError(
            f"dreamsim_weights={str(weights)!r} holds no folder {_tuned(network)}: give the folder into which you "
            f"unpacked the archive of {network} from https://github.com/ssundaram21/dreamsim/releases"
        )


def _tuned(network: str) -> str:
    """The folder of a network's tuned weights, within that of the unpacked weights."""
    return "ensemble_lora" if network == "ensemble" else f"{network}_single_lora"


@dataclass(frozen=True)
class DreamSimFiles(Download):
    """Code and weights that the package fetches for a network; only the package knows which."""

    network: str

    @property
    def title(self) -> str:
        """The network."""
        return f"https://github.com/ssundaram21/dreamsim/releases: {self.network}"

    def parts(self, places: Places) -> list[Part]:
        """The folder that the package unpacks last."""
        return [Part(_tuned(self.network), None, (places.torch_hub / "dreamsim" / _tuned(self.network)).is_dir())]

    def fetch(self, places: Places) -> None:
        """Load the network once, which downloads it."""
        if not self.parts(places)[0].here:
            with torch_hub_at(places):
                DreamSim(self.network)


class DreamSim(MeasuringNetwork):
    """Perceptual distance of image pairs.

    The package loads its networks for one device, and parts of them stay there. Without a folder of unpacked weights it
    uses `dreamsim` in torch.hub's folder, or downloads to it. All networks except the two CLIP ones and `synclr_vitb16`
    also fetch DINO's code by torch.hub.
    """

    def __init__(
        self, network: str = "ensemble", weights: Path | str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        check_dreamsim(network, weights)
        hub = Path(torch.hub.get_dir())
        folder = hub / "dreamsim" if weights is None else Path(weights).expanduser()
        remedy = f"run it once on a machine with a network, and give its folder {folder} as dreamsim_weights"
        try:
            with Pretrained("dreamsim", network).loading(remedy, "pip install 'flextok_pl[dreamsim]'"):
                from dreamsim import dreamsim

                folder.mkdir(parents=True, exist_ok=True)
                # Otherwise processes would overwrite each other's files.
                with FileLock(folder.with_name("dreamsim.lock")) if weights is None else nullcontext():
                    model, prepare = dreamsim(dreamsim_type=network, cache_dir=str(folder), device=str(device))
        finally:
            torch.hub.set_dir(str(hub))  # the package moves it
        super().__init__(network, model)
        self.device = torch.device(device)
        self._prepare: Any = prepare

    def __call__(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair: two (B, 3, H, W) uint8 -> (B,) float64 on their `summing_device`."""
        with self.measuring():
            distance: Tensor = self.network(*(self._prepared(images) for images in (originals, reconstructions)))
        return as_float64(distance.reshape(-1))

    def embeddings(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, D) float32 on the network's device; a distance is 1 - the cosine of two."""
        with self.measuring():
            embeddings: Tensor = self.network.embed(self._prepared(images))
        return embeddings

    def _prepared(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, 224, 224) in [0, 1], by the package's own resize of PIL images."""
        return torch.cat([self._prepare(to_pil_image(image)) for image in as_rgb(images, "dreamsim").cpu()]).to(
            self.device
        )
