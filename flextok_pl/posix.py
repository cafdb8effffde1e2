"""What Linux and macOS have, and Windows lacks: files locked between processes.

Whatever reads shards, trains or sweeps imports it from here, and so does not start on Windows. Models work there, as
do the parts that use no more than these.
"""


class UnsupportedPlatform(ImportError):
    """This system lacks what a module needs."""


try:
    import fcntl as fcntl
except ImportError as error:
    raise UnsupportedPlatform(
        "reading shards, training and searches need Linux or macOS; on Windows only models work, in Python: use WSL "
        "(https://learn.microsoft.com/windows/wsl/install) for the rest"
    ) from error
