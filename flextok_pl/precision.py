"""The precision that numbers are computed in.

A network in training follows the trainer's precision, under autocast. Frozen networks give the results of float32 in
every training: evaluation and metrics run in `full_precision`; the autoencoder, the teacher and the text encoder run
`outside_autocast`, and leave TF32 as the user has set it. Only `frozen_networks_in` lets them compute in another type.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_backends: Any = torch.backends  # mypy knows only some of its attributes
# Not `allow_tf32`, torch's older interface: reading it is an error once somebody has set one of these.
_SETTINGS = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,  # TF32 by default
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
)
_inside: list[list[str]] = []  # what the settings were, once for each context that is open in any thread
_lock = threading.Lock()
_frozen_dtype: ContextVar[torch.dtype] = ContextVar("frozen_dtype", default=torch.float32)

WITHOUT_FLOAT64 = frozenset({"mps"})  # types of devices
TRAINING_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # values of `trainer.precision` that trainings take
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what products take and give under autocast
MEASURED_IN = "32-true"  # the precision that records of an evaluation state, whatever that of the trainer

_SHORT = {None: "32-true", "None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def outside_autocast(device: torch.device | str) -> AbstractContextManager[Any]:
    """Float32 for weights and inputs on the network's device; TF32 as torch has it, on a GPU in convolutions only."""
    kind = torch.device(device).type
    known = torch.amp.is_autocast_available(kind)  # the meta device has no autocast
    dtype = _frozen_dtype.get()
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32) if known else nullcontext()


@contextmanager
def frozen_networks_in(dtype: torch.dtype) -> Iterator[None]:
    """Put what runs `outside_autocast` or in `full_precision` under autocast to this type; float32 changes nothing.

    It holds for this thread, and is for writing what frozen networks give, faster and less exactly.
    """
    token = _frozen_dtype.set(dtype)
    try:
        yield
    finally:
        _frozen_dtype.reset(token)


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Float32 throughout on the network's device: neither autocast nor TF32 nor bfloat16; gradients as outside.

    The settings of TF32 and bfloat16 belong to the whole process, with all its threads. When the last of these contexts
    ends they get back their values, set explicitly: a later `torch.backends.fp32_precision`, which they may have
    followed before, no longer reaches them.
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
    """The type of sums and probabilities on a device: float64, or float32 on Apple's MPS, which lacks it."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def at_least_float32(values: Tensor) -> Tensor:
    """Values in half precision as float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def summing_device(device: torch.device | str) -> torch.device:
    """Where float64 sums over what is on a device are kept: there, or on the CPU for one that lacks the type."""
    return torch.device("cpu" if torch.device(device).type in WITHOUT_FLOAT64 else device)


def as_float64(values: Tensor) -> Tensor:
    """The values in float64, on their `summing_device`."""
    return values.to(summing_device(values.device)).to(torch.float64)


def require_float32(dtype: torch.dtype, what: str) -> None:
    """Raise ValueError for a network whose weights have another type, as its results would differ."""
    if dtype != torch.float32:
        raise ValueError(
            f"the weights of this {what} are {dtype}, but its results are those of float32: "
            "load it again and leave its type, or call .float()"
        )


def check_training_precision(precision: object, adversarial: bool = False) -> str:
    """`trainer.precision`, where None is float32, as one of `TRAINING_PRECISIONS`; ValueError for any other.

    `adversarial` says that an autoencoder is trained against a discriminator.
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
