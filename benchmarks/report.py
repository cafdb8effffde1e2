"""Time calls, and write results with everything needed to repeat them."""

import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def median_seconds(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: str, warm_up: bool = True
) -> dict[str, float]:
    """Median wall time of each call. The calls take turns, so that slow moments of the machine affect all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(not warm_up, repeats + 1):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: str) -> None:
    """Wait for the device's queue."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_gib(device: str) -> float:
    """Peak memory so far: of the allocator on a GPU, resident on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_apart(*setting: str) -> Any:
    """Run this script with `--measure SETTING` in its own process; returns the JSON that it prints last."""
    command = [sys.executable, *sys.argv, "--measure", *setting]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_results(benchmark: str, options: Mapping[str, Any], results: Mapping[str, Any], file: str | None) -> None:
    """Print the results, and write them with command, machine and date if `file` is given."""
    record = {
        "benchmark": benchmark,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "device": torch.cuda.get_device_name() if str(options["device"]).startswith("cuda") else _cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "options": {name: value for name, value in options.items() if name != "json"},
        "results": results,
    }
    text = json.dumps(record, indent=2) + "\n"
    print(text)
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.processor()
