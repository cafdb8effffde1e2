"""The same small step many times over, as a CUDA graph.

One position of a prior is hundreds of small kernels, which the host may take longer to launch than the device to run. A
graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs) of them is launched at once.
"""

from collections.abc import Callable

import torch
from torch import nn

FEWEST = 16  # calls that are captured: a capture itself takes as long as some calls, and waits for the device


def can_capture(module: nn.Module) -> bool:
    """Whether a step that runs a module's parts can become a graph: on CUDA, and without hooks.

    A graph repeats kernels and no Python; the hooks of sharded training would also leave its stream.
    """
    on_cuda = all(parameter.is_cuda for parameter in module.parameters())
    return on_cuda and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def repeat(step: Callable[[], None], count: int, graph_device: torch.device | None) -> None:
    """Call `step` `count` times; with a `graph_device`, all but the first one are replayed there.

    Then it must keep its shapes, work in place on tensors that stay, and neither wait for the device nor draw random
    numbers. `can_capture` says whether its networks allow that.
    """
    if graph_device is None or count < FEWEST:
        for _ in range(count):
            step()
        return
    with torch.cuda.device(graph_device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # libraries take their memory now, which they must not do within a capture
        torch.cuda.current_stream().wait_stream(stream)
        # What other threads do on the device, such as those of loaders, does not end the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
        for _ in range(count - 1):
            graph.replay()
