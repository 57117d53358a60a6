"""What makes one forward pass of a frozen model cheaper: weights in the type of the products, compilation, CUDA graphs.

None of it changes a formula; compilation may round differently, the rest is equal bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rae_fast.dit.embed import OwnTypeLinear, PatchEmbed, WideLinear

WARM_UPS = 3  # passes before a graph is recorded: libraries allocate and choose their algorithms in the first ones


def store_for_autocast(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights that autocast would cast to `dtype` in that type: the same products, in half the memory.

    Weights that are used in float32 or float64 whatever autocast says stay as they are.
    """
    if dtype == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, OwnTypeLinear | WideLinear):
            module.to(dtype)
        elif isinstance(module, PatchEmbed) and not module.wide:
            module.proj.to(dtype)


def accelerate(model: nn.Module, device: torch.device, *, compiled: bool, cuda_graphs: bool, say: bool = True) -> None:
    """Compile the model's blocks and replay its forward pass from CUDA graphs, where asked for and on a GPU.

    Args:
        model: in evaluation mode, on `device`.
        device: without CUDA nothing is done, and a line says so.
        compiled: compile each block.
        cuda_graphs: record and replay.
        say: print that line.
    """
    asked = [name for name, wanted in (("compilation", compiled), ("CUDA graphs", cuda_graphs)) if wanted]
    if device.type == "xla":
        from rae_fast.xla.device import cut_before

        # Without a cut, all steps of the solver would be unrolled into one graph.
        model.forward = cut_before(model.forward)  # type: ignore[method-assign]
    if asked and device.type != "cuda":
        if say:
            print(f"{' and '.join(asked)}: only on a GPU; sampling runs without", file=sys.stderr, flush=True)
        return
    if compiled:
        from rae_fast.training.engine import compile_blocks

        compile_blocks(model)
    if cuda_graphs:
        model.forward = CudaGraphs(model.forward)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Recording:
    """A recorded pass: its graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphs:
    """A function of tensors whose kernels are launched as one graph, recorded once for each set of input shapes.

    The function must not wait for the device, nor depend on anything but its inputs and on weights that stay where
    they are. Where recording fails, a line says so and the function is called as it is from then on.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recordings: dict[tuple[object, ...], Recording] = {}
        self._failed = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result for these inputs, in a tensor of its own."""
        if self._failed:
            return self._function(*inputs)
        key = (torch.is_autocast_enabled("cuda"), *((x.shape, x.dtype) for x in inputs))
        if key not in self._recordings:
            try:
                self._recordings[key] = self._record(inputs)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                print(f"CUDA graphs: {reason}; sampling runs without", file=sys.stderr, flush=True)
                self._failed = True
                return self._function(*inputs)
        recording = self._recordings[key]
        for held, given in zip(recording.inputs, inputs, strict=True):
            held.copy_(given)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> Recording:
        held = tuple(x.clone() for x in inputs)
        # Casts that autocast keeps would be freed with its context, while the graph goes on reading them.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._function(*held)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self._function(*held)
        return Recording(graph, held, output)
