"""DINOv2, with registers or without, and DINOv3 vision transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from rae_fast.encoders.transformer import TransformerEncoder


class Dino(TransformerEncoder):
    """Class token and registers in front; the model interpolates (v2) or rotates (v3) positions for any input size."""

    final_norms: ClassVar[dict[str, str]] = {
        "dinov2": "layernorm",
        "dinov2_with_registers": "layernorm",
        "dinov3_vit": "norm",
    }

    @classmethod
    def model_class(cls) -> Any:
        """The base model of whatever family the folder holds."""
        from transformers import AutoModel

        return AutoModel

    @classmethod
    def count_prefix_tokens(cls, config: Any) -> int:
        """One class token and the registers."""
        return 1 + int(getattr(config, "num_register_tokens", 0))
