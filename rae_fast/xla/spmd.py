"""One process drives all its XLA devices: batch and weights are cut over a mesh of one dimension (FSDP by GSPMD)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from rae_fast.errors import UserError
from rae_fast.xla.device import require_xla

AXIS = "fsdp"


class DeviceMesh:
    """All devices of this process in a row. Make it before the process first asks for its device: that one is not
    the mesh's, and its tensors end the process by SIGSEGV in the next step (torch_xla 2.9).

    Attributes:
        devices: how many.
    """

    def __init__(self) -> None:
        require_xla()
        import torch_xla.distributed.spmd as spmd
        import torch_xla.runtime as xr

        xr.use_spmd()
        self.devices: int = xr.global_runtime_device_count()
        self._mesh = spmd.Mesh(np.arange(self.devices), (self.devices,), (AXIS,))
        self._mark = spmd.mark_sharding

    def cut_weights(self, tensors: Iterable[Tensor]) -> None:
        """Cut each tensor along its longest dimension that the devices divide; the others stay whole everywhere."""
        for tensor in tensors:
            divisible = [d for d in range(tensor.ndim) if tensor.shape[d] % self.devices == 0]
            longest = max(divisible, key=lambda d: tensor.shape[d], default=None)
            self._mark(tensor, self._mesh, tuple(AXIS if d == longest else None for d in range(tensor.ndim)))

    def cut_batch(self, tensor: Tensor) -> Tensor:
        """Cut along the first dimension, the batch.

        Raises:
            UserError: the devices do not divide it.
        """
        if tensor.shape[0] % self.devices:
            raise UserError(
                f"training.batch_size is {tensor.shape[0]} with runtime.spmd on {self.devices} devices",
                f"a multiple of {self.devices}",
                "change training.batch_size: with spmd it is the batch of all devices of the process",
            )
        self._mark(tensor, self._mesh, (AXIS, *[None] * (tensor.ndim - 1)))
        return tensor
