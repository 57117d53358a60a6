"""Frozen encoders: images in [0, 1] to normalized patch tokens."""

from rae_fast.encoders.base import EncoderFacts, FrozenEncoder
from rae_fast.encoders.registry import build_encoder, encoder_facts

__all__ = ["EncoderFacts", "FrozenEncoder", "build_encoder", "encoder_facts"]
