"""Captured graphs: a training step of thousands of small launches, replayed as one."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replay:
    """Calls a function; on a GPU it is run three times, captured, and replayed from then on.

    The function takes nothing, reads and writes tensors that stay where they are, and must not copy from the host or
    wait for the device. What it returns is overwritten by the next call. A function that cannot be captured is called
    as it is, which is slower and not wrong.

    Args:
        function: what to capture.
        device: where it runs.
        pool: memory of graphs that are never replayed at the same time, see :func:`pool`.
    """

    def __init__(self, function: Callable, device: torch.device, pool=None):
        self.function, self.graph, self.outputs = function, None, None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # lets cuDNN choose, compilers compile and optimisers make their moments
                function()
        torch.cuda.current_stream().wait_stream(side)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.outputs = function()
            self.graph = graph
        except RuntimeError as error:
            print(f"not captured: {error}", flush=True)

    def __call__(self):
        """Run once; returns what the function returns."""
        if self.graph is None:
            return self.function()
        self.graph.replay()
        return self.outputs


def pool(device: torch.device):
    """A memory pool for several graphs; None where there are none."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
