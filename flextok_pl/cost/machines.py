"""Peak arithmetic and memory of devices.

The figures agree with pages that quote the makers' data sheets (2026-11-26; such as
https://glennklockwood.com/garden/processors/h100, and A100 and B200 beside it). The data sheets, whose addresses are
given, were not opened. `--peak_tflops` and `--memory_gib` replace the figures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One device."""

    memory_gib: float
    half_tflops: float | None  # peak of dense products in bfloat16 or float16 with sums in float32, where stated
    full_tflops: float | None  # peak in float32, without TF32, which PyTorch leaves off


# Dense: half of the figures "with sparsity". GB of memory are taken for as many GiB.
MACHINES = {
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (H100: SXM and PCIe)
    "h100": Machine(80, 989.4, 66.9),
    "h100-pcie": Machine(80, 756.5, 51.2),
    # https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446 (H200 SXM)
    "h200": Machine(141, 989.4, 66.9),
    # https://resources.nvidia.com/en-us-blackwell-architecture/datasheet (one GPU of HGX B200)
    "b200": Machine(180, 2250, 75),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    "a100-80g": Machine(80, 312, 19.5),
    "a100-40g": Machine(40, 312, 19.5),
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    "l40s": Machine(48, 362, 91.6),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf (appendix A)
    "rtx4090": Machine(24, 165.2, 82.6),
    # No maker states the peak of two cores of some server; the memory is this machine's.
    "cpu": Machine(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, None, None),
}


def machine(name: str) -> Machine:
    """The machine of this name."""
    if name not in MACHINES:
        raise ValueError(
            f"machine={name!r} is unknown; use one of {', '.join(MACHINES)}, or peak_tflops and memory_gib with one"
        )
    return MACHINES[name]
