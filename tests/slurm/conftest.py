"""A Slurm of one node on this machine, which takes root and Debian's packages slurm-wlm and munge.

`make test-slurm` installs them. Where CI=true they are installed here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

LOOPBACK = Path(__file__).parent / "loopback.sh"
INSTALL = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach the cluster, of which a machine has one at a time."""
    if os.geteuid() or os.cpu_count() == 1:
        pytest.skip("a Slurm of its own takes root and two cores")
    if shutil.which("slurmctld") is None and os.environ.get("CI") == "true" and shutil.which("apt-get"):
        for command in (["apt-get", "update"], INSTALL):
            subprocess.run(command, check=True, capture_output=True)
    if shutil.which("slurmctld") is None:
        pytest.skip("there is no Slurm: make test-slurm installs it")
    folder = tmp_path_factory.mktemp("slurm")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
    with FileLock(Path(tempfile.gettempdir()) / "flextok_slurm.lock"):
        try:
            subprocess.run([str(LOOPBACK), "start", str(folder)], check=True)
            yield environment
        finally:
            subprocess.run([str(LOOPBACK), "stop", str(folder)], check=True)
