"""SigLIP and SigLIP 2 vision towers of fixed resolution."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rae_fast.encoders.transformer import TransformerEncoder


class SigLIP(TransformerEncoder):
    """Patch tokens only: the pooling head and the text tower are not built."""

    # SigLIP 2's fixed-resolution checkpoints have SigLIP's architecture and say so; the composite type is what their
    # config.json holds, the vision type what the loaded model has.
    final_norms: ClassVar[dict[str, str]] = {"siglip": "post_layernorm", "siglip_vision_model": "post_layernorm"}
    overrides: ClassVar[dict[str, Any]] = {"vision_use_head": False}

    @classmethod
    def model_class(cls) -> Any:
        """The vision tower."""
        from transformers import SiglipVisionModel

        return SiglipVisionModel

    @classmethod
    def count_prefix_tokens(cls, config: Any) -> int:
        """None."""
        return 0

    def call_arguments(self, pixels_B3SS: Tensor) -> dict[str, Any]:
        """Positions for any input size."""
        return {"interpolate_pos_encoding": True}
