"""File locks between processes, which Linux and macOS have and Windows lacks.

Modules that read shards, train or sweep import them from here, and so do not start on Windows. Models work there.
"""


class UnsupportedPlatform(ImportError):
    """Raised on a system that lacks what a module needs."""


try:
    import fcntl as fcntl
except ImportError as error:
    raise UnsupportedPlatform(
        "reading shards, training and searches need Linux or macOS; on Windows only models work, in Python: use WSL "
        "(https://learn.microsoft.com/windows/wsl/install) for the rest"
    ) from error
