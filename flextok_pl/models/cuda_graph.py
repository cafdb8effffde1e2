"""The same small step many times over, as a CUDA graph.

Launching the kernels of one position of a prior takes the host longer than they run. A graph
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs) is launched at once.
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


def repeat(step: Callable[[], None], count: int, captured: bool) -> None:
    """Call `step` `count` times, of which all but the first one are replayed where they are to be `captured`.

    Then it must keep its shapes, work in place on tensors that stay, and neither wait for the device nor draw random
    numbers; what decides that it can is `can_capture`.
    """
    if not captured or count < FEWEST:
        for _ in range(count):
            step()
        return
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # libraries take their memory now, which they must not do within a capture
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # loaders' threads use CUDA, too
        step()
    for _ in range(count - 1):
        graph.replay()
