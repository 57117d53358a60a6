"""Diffusion transformers on latents: DiTDH and LightningDiT."""

from rae_fast.dit.ditdh import DiTDH
from rae_fast.dit.lightning_dit import LightningDiT
from rae_fast.dit.registry import build_dit
from rae_fast.dit.trunk import DiffusionTransformer

__all__ = ["DiTDH", "DiffusionTransformer", "LightningDiT", "build_dit"]
