"""The encoder of a masked autoencoder, run without a mask."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rae_fast.encoders.transformer import TransformerEncoder


class MAE(TransformerEncoder):
    """All patches in their own order: no token is masked, and the shuffle that masking needs is the identity."""

    final_norms: ClassVar[dict[str, str]] = {"vit_mae": "layernorm"}
    overrides: ClassVar[dict[str, Any]] = {"mask_ratio": 0.0}

    @classmethod
    def model_class(cls) -> Any:
        """The encoder alone; a pretraining checkpoint's decoder is left unread."""
        from transformers import ViTMAEModel

        return ViTMAEModel

    @classmethod
    def count_prefix_tokens(cls, config: Any) -> int:
        """The class token."""
        return 1

    def call_arguments(self, pixels_B3SS: Tensor) -> dict[str, Any]:
        """Rising "noise", by which the model sorts its patches, and positions for any input size."""
        rising_N = torch.arange(self.grid**2, device=pixels_B3SS.device, dtype=torch.float32)
        return {"noise": rising_N.expand(len(pixels_B3SS), -1), "interpolate_pos_encoding": True}
