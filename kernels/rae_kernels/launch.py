"""One start of a kernel as a record: it can be run, or compiled for a GPU that is not there.

Modules named `*_triton` hold the kernels and are imported only where one is to run, so that everything else works on
machines without Triton.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Triton reads the variable when it is imported; every kernel of the process then runs on the CPU, in numpy.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along up to three axes.
        arguments: by name: tensors, numbers, or None for a tensor that this form of the kernel does not read.
        constants: compile-time arguments by name.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline of the loops.
        max_registers: limit on a thread's registers, with which more programs fit one multiprocessor.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told beside the arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit

    def run(self) -> None:
        """Start the kernel on the device of its tensors; an empty grid is nothing to do."""
        if 0 in self.grid:
            return
        with self._device():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)

    def _device(self) -> Any:
        """Triton starts kernels on the current device, which need not be the tensors'."""
        for value in self.arguments.values():
            if isinstance(value, Tensor) and value.is_cuda:
                return torch.cuda.device(value.device)
        return nullcontext()


def use_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel: on CUDA, and anywhere in the interpreter."""
    return x.is_cuda or INTERPRETING


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_two_split(width: int, least: int = 16) -> tuple[int, int]:
    """`width` as a power of two and a padded power of two for what is left (0 if nothing is): 1152 -> (1024, 128).

    A single padded power of two would leave 44 % of the lanes idle at 1152, and multiply 128 columns for 72.
    """
    main = max(least, 1 << (width.bit_length() - 1))
    rest = width - main
    return main, 0 if rest <= 0 else max(least, 1 << (rest - 1).bit_length())
