"""Sets the precision of training, of frozen networks and of metrics.

A network in training follows the trainer's precision, under autocast, and so does the perceptual loss. Evaluation and
metrics run in `full_precision`. Frozen autoencoders, teachers and text encoders run `outside_autocast`, and keep the
user's TF32 settings. Only `frozen_networks_in` lets them compute in another type than float32.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_backends: Any = torch.backends  # mypy knows only some of its attributes
# Not `allow_tf32`, torch's older interface: reading it raises an error once one of these is set.
_SETTINGS = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,  # TF32 by default
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
)
_inside: list[list[str]] = []  # the previous settings, once for each context that is open in any thread
_lock = threading.Lock()
_frozen_dtype: ContextVar[torch.dtype] = ContextVar("frozen_dtype", default=torch.float32)

WITHOUT_FLOAT64 = frozenset({"mps"})  # device types
TRAINING_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # values of `trainer.precision` that trainings take
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # type of products under autocast
MEASURED_IN = "32-true"  # the precision in records of an evaluation, whatever the trainer's

_SHORT = {None: "32-true", "None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def outside_autocast(device: torch.device | str) -> AbstractContextManager[Any]:
    """Switch autocast off on a device, for float32 weights and inputs; TF32 stays as set."""
    kind = torch.device(device).type
    known = torch.amp.is_autocast_available(kind)  # the meta device has no autocast
    dtype = _frozen_dtype.get()
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32) if known else nullcontext()


@contextmanager
def frozen_networks_in(dtype: torch.dtype) -> Iterator[None]:
    """Put networks that run `outside_autocast` or in `full_precision` under autocast to this type, if not float32.

    It holds for this thread. Use it to write the outputs of frozen networks faster and less exactly.
    """
    token = _frozen_dtype.set(dtype)
    try:
        yield
    finally:
        _frozen_dtype.reset(token)


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Compute in float32 throughout on a device: no autocast, TF32 or bfloat16; gradients as outside.

    The settings of TF32 and bfloat16 belong to the whole process, with all its threads. When the last of these contexts
    ends, it sets the previous values explicitly: a later `torch.backends.fp32_precision`, which they may have followed
    before, no longer changes them.
    """
    with _lock:
        _inside.append(_inside[0] if _inside else [setting.fp32_precision for setting in _SETTINGS])
        for setting in _SETTINGS:
            setting.fp32_precision = "ieee"
    try:
        with outside_autocast(device):
            yield
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                for setting, precision in zip(_SETTINGS, before, strict=True):
                    setting.fp32_precision = precision


def accumulation_dtype(device: torch.device | str) -> torch.dtype:
    """The type for sums and probabilities on a device: float64, or float32 on Apple's MPS, which lacks float64."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def summing_device(device: torch.device | str) -> torch.device:
    """The device for float64 sums over values on `device`: the same one, or the CPU if it lacks float64."""
    return torch.device("cpu" if torch.device(device).type in WITHOUT_FLOAT64 else device)


def as_float64(values: Tensor) -> Tensor:
    """Convert values to float64, on their `summing_device`."""
    return values.to(summing_device(values.device)).to(torch.float64)


def require_float32(dtype: torch.dtype, what: str) -> None:
    """Raise ValueError for a network with weights of another type, whose results would differ."""
    if dtype != torch.float32:
        raise ValueError(
            f"the weights of this {what} are {dtype}, but its results must be those of float32: "
            "load it again and keep its type, or call .float()"
        )


def check_training_precision(precision: object, adversarial: bool = False) -> str:
    """Return `trainer.precision` as one of `TRAINING_PRECISIONS`, None as float32; raise ValueError for any other.

    `adversarial`: an autoencoder is trained against a discriminator.
    """
    name = _SHORT.get(None if precision is None else str(precision), str(precision))
    if name in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={name!r} stores weights in half precision, which loses their small updates and moves "
            "latents, tokens and metrics; use bf16-mixed, which computes in half precision and stores in float32"
        )
    if name not in TRAINING_PRECISIONS:
        raise ValueError(f"trainer.precision={name!r} is not supported; use {', '.join(TRAINING_PRECISIONS)}")
    if adversarial and name == "16-mixed":
        raise ValueError(
            "trainer.precision='16-mixed' with model.gan_weight above 0: the weight of the adversarial loss is a ratio "
            "of gradients, which float16 rounds to zero before the loss is scaled; use bf16-mixed"
        )
    return name
