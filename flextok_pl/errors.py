"""Which errors are the user's to put right. The command shows those as one line; every other keeps its traceback."""

import dis
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

TALKING = ("flextok_pl", "jsonargparse", "lightning")  # packages whose errors about values are written for the user


class UserError(Exception):
    """Something the user can put right."""


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Turn the errors of `is_for_the_user` into `UserError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_for_the_user(error):
            raise
        raise UserError(text_for_the_user(error)) from error


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error tells the user what to put right, and is no fault of a program.

    These do: a `UserError`; a `MisconfigurationException`; an `ImportError` of a class of our own; a `ValueError`
    or `OSError` from a `raise` in `TALKING`, or of a class of our own, even when a process that loads data passed
    it on; and an `OSError` that the system answered to a call of `TALKING`, such as a missing file. An error within
    torch, timm or Pillow, or from an operation that our code did not expect to fail, does not: its text says
    nothing without its place.
    """
    if isinstance(error, UserError) or "MisconfigurationException" in (kind.__name__ for kind in type(error).__mro__):
        return True
    if not isinstance(error, ValueError | OSError | ImportError):
        return False
    if type(error).__module__.partition(".")[0] == TALKING[0]:
        return True
    if isinstance(error, ImportError):
        return False
    frames = list(_frames(error))
    if frames and _talks(frames[-1]) and _raises(frames[-1]):
        return True
    return isinstance(error, OSError) and _talks(next((f for f in frames[::-1] if not _is_of_python(f)), None))


def text_for_the_user(error: BaseException) -> str:
    """What an error says, without the traceback that torch adds to one of a process that loads data."""
    text, kind = str(error), type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip() if text.startswith("Caught") else text


def _frames(error: BaseException) -> Iterator[TracebackType]:
    """The calls that led to an error, the outermost first."""
    entry = error.__traceback__
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _talks(entry: TracebackType | None) -> bool:
    return entry is not None and entry.tb_frame.f_globals.get("__name__", "").partition(".")[0] in TALKING


def _raises(entry: TracebackType) -> bool:
    """Whether the call ended in a `raise`, and not in an operation or in a function of C."""
    return dis.opname[entry.tb_frame.f_code.co_code[entry.tb_lasti]] == "RAISE_VARARGS"


def _is_of_python(entry: TracebackType) -> bool:
    file = entry.tb_frame.f_code.co_filename
    return file.startswith("<frozen") or (
        file.startswith(sysconfig.get_paths()["stdlib"]) and "site-packages" not in file
    )
