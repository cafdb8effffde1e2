"""Repeat a small step many times as a CUDA graph.

One position of a prior runs hundreds of small kernels, and launching them can take the host longer than the device
needs to run them. A graph launches all of them at once
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from collections.abc import Callable

import torch
from torch import nn

FEWEST = 16  # calls below which capturing does not pay: it takes as long as some calls and waits for the device


def can_capture(module: nn.Module) -> bool:
    """Check that a step which runs a module can become a graph: it is on CUDA, and no part has hooks.

    A graph repeats kernels only, not Python, and the hooks of sharded training would also leave its stream.
    """
    on_cuda = all(parameter.is_cuda for parameter in module.parameters())
    return on_cuda and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def repeat(step: Callable[[], None], count: int, graph_device: torch.device | None) -> None:
    """Call `step` `count` times. With a `graph_device`, all calls except the first are replayed there.

    A replayed step must keep its shapes and work in place on the same tensors. It must not wait for the device or draw
    random numbers. `can_capture` checks its networks.
    """
    if graph_device is None or count < FEWEST:
        for _ in range(count):
            step()
        return
    with torch.cuda.device(graph_device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # libraries allocate memory here, which they must not do within a capture
        torch.cuda.current_stream().wait_stream(stream)
        # Work of other threads on the device, such as loaders, does not end the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
        for _ in range(count - 1):
            graph.replay()
