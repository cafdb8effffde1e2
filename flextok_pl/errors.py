"""Decides which errors the user can fix. The command shows those as one line; all others keep their traceback."""

import dis
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

TALKING = ("flextok_pl", "jsonargparse", "lightning")  # packages whose errors about values address the user


class UserError(Exception):
    """An error that the user can fix."""


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
    """Whether an error tells the user what to fix, and is not a bug.

    True for a `UserError`, for a `MisconfigurationException`, and for an `ImportError` of a class of our own. True for
    a `ValueError` or `OSError` from a `raise` in `TALKING` or of a class of our own, even if a data-loading process
    passed it on. True also for an `OSError` that the system answered to a call of `TALKING`, such as a missing file.
    False for errors within torch, timm or Pillow, and for operations that our code did not expect to fail: their text
    needs the traceback.
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
    """The message of an error, without the traceback that torch adds in a data-loading process."""
    text, kind = str(error), type(error)
    return text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip() if text.startswith("Caught") else text


def _frames(error: BaseException) -> Iterator[TracebackType]:
    """The calls that led to an error, outermost first."""
    entry = error.__traceback__
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _talks(entry: TracebackType | None) -> bool:
    return entry is not None and entry.tb_frame.f_globals.get("__name__", "").partition(".")[0] in TALKING


def _raises(entry: TracebackType) -> bool:
    """Whether the call ended in a `raise`, not in an operation or in a C function."""
    return dis.opname[entry.tb_frame.f_code.co_code[entry.tb_lasti]] == "RAISE_VARARGS"


def _is_of_python(entry: TracebackType) -> bool:
    file = entry.tb_frame.f_code.co_filename
    return file.startswith("<frozen") or (
        file.startswith(sysconfig.get_paths()["stdlib"]) and "site-packages" not in file
    )
