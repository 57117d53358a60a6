"""Every kernel as a training step of DiTDH starts it: on tensors without memory to be inspected, on a GPU to be timed.

Shapes: B samples, N tokens, C width, H heads, D channels of a head, F hidden channels of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rae_kernels import adamw_ema, attention, crop, interpolate, norm_modulate, swiglu
from rae_kernels.attention import Given
from rae_kernels.launch import Launch
from rae_kernels.norm_modulate import Terms

LATENT = (768, 16, 16)
LATENT_ELEMENTS = prod(LATENT)
CROP_SIZE = 256
Configs = Mapping[str, dict[str, Any]]


class Stack(NamedTuple):
    """One width of blocks.

    Attributes:
        width: C.
        heads: H.
        hidden: F, padded to whole tiles.
        per_token: modulation of each token, else of each sample.
        stream: type of the residual stream.
    """

    width: int
    heads: int
    hidden: int
    per_token: bool
    stream: torch.dtype


TRUNK_S = Stack(384, 6, 1024, False, torch.float32)
TRUNK_XL = Stack(1152, 16, 3072, False, torch.float32)
HEAD = Stack(2048, 16, 5504, True, torch.bfloat16)
STACKS = {"trunk-S": TRUNK_S, "trunk-XL": TRUNK_XL, "head": HEAD}


class Maker(NamedTuple):
    """Makes the tensors of a batch: without memory on "meta", else random.

    Attributes:
        device: where.
        samples: B.
        tokens: N.
        dtype: of activations.
    """

    device: str = "meta"
    samples: int = 256
    tokens: int = 256
    dtype: torch.dtype = torch.bfloat16

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of standard normal values, or of nothing."""
        dtype = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, device=self.device).to(dtype)

    def rows(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B, N, width]."""
        return self(self.samples, self.tokens, width, dtype=dtype)


def training_launches(make: Maker | None = None) -> dict[str, Launch]:
    """All kernels by name ("attention.forward trunk-XL") in the configuration of a GPU that nobody measured.

    Raises:
        ImportError: Triton is not installed.
    """
    make = make or Maker()
    launches = {}
    for name, stack in STACKS.items():
        for parts in STACKED.values():
            launches |= {f"{kernel} {name}": launch for kernel, launch in parts(stack, make).items()}
    return launches | {name: build(make) for name, build in OTHERS.items()}


def launch_of(operation: str, stack: Stack, make: Maker, config: dict[str, Any] | None = None) -> Launch:
    """The launch of one operation, such as "attention.backward.keys", in a configuration or the default one.

    Raises:
        KeyError: no such operation of this stack.
    """
    kind, _, direction = operation.partition(".")
    configs = {} if config is None else {direction: config}
    if kind in OTHERS:
        return OTHERS[kind](make, config)
    return STACKED[kind](stack, make, configs)[operation]


def norm_terms(stack: Stack, make: Maker) -> Terms:
    """Gated residual, norm and modulation with everything, modulations as chunks of one projection."""
    modulation = make(make.samples, make.tokens if stack.per_token else 1, 6 * stack.width)
    shift, scale, gate = modulation.chunk(6, dim=-1)[:3]
    weight = make(stack.width, dtype=torch.float32)
    x, branch = make.rows(stack.width, stack.stream), make.rows(stack.width)
    return Terms(x, branch, gate, make(stack.width), scale, shift, weight)


def norm_launches(stack: Stack, make: Maker, configs: Configs | None = None) -> dict[str, Launch]:
    """Forward and backward of gated residual, norm and modulation, and what finishes sums over tokens."""
    from rae_kernels.norm_modulate_triton import backward_launch, finish_launch, forward_launch

    terms = norm_terms(stack, make)
    defaults = {d: norm_modulate.default_config(d, make.tokens, stack.width) for d in ("forward", "backward")}
    config = defaults | dict(configs or {})
    forward, (x_new, y, mean, rstd) = forward_launch(terms, 1e-6, False, make.dtype, config["forward"])
    backward, made = backward_launch(x_new, y, terms._replace(x=x_new), mean, rstd, False, config["backward"])
    finish = {} if stack.per_token else {"norm_modulate.finish": finish_launch(terms, made[-1])[0]}
    return {"norm_modulate.forward": forward, "norm_modulate.backward": backward} | finish


def attention_given(stack: Stack, make: Maker, norm: bool = False) -> Given:
    """Attention with rotation, bias and, where asked for, norms of queries and keys."""
    width = stack.width // stack.heads
    angle = make(make.tokens, width // 2, dtype=torch.float32)
    cos, sin = (angle, angle) if make.device == "meta" else (angle.cos(), angle.sin())
    weight = make(width, dtype=torch.float32) if norm else None
    qkv = make.rows(3 * stack.width).unflatten(-1, (3, stack.heads, width))
    return Given(qkv, make(3 * stack.width), weight, weight, cos, sin)


def attention_launches(
    stack: Stack, make: Maker, configs: Configs | None = None, norm: bool = False
) -> dict[str, Launch]:
    """Forward and both backward kernels of attention."""
    from rae_kernels.attention_backward_triton import backward_launches
    from rae_kernels.attention_triton import forward_launch

    given = attention_given(stack, make, norm)
    width = given.qkv.shape[-1]
    directions = ("forward", "backward.queries", "backward.keys")
    config = {d: attention.default_config(d, make.tokens, width) for d in directions} | dict(configs or {})
    forward, (out, lse, turned) = forward_launch(given, 1e-6, True, config["forward"])
    both = {"queries": config["backward.queries"], "keys": config["backward.keys"]}
    d_out = torch.empty_like(out) if make.device == "meta" else torch.randn_like(out)
    (queries, keys), _ = backward_launches(d_out, given, out, lse, turned, 1e-6, both)
    return {"attention.forward": forward, "attention.backward.queries": queries, "attention.backward.keys": keys}


def swiglu_launches(stack: Stack, make: Maker, configs: Configs | None = None) -> dict[str, Launch]:
    """Forward and backward of SwiGLU's gate."""
    from rae_kernels.swiglu_triton import backward_launch, forward_launch

    config = {d: swiglu.default_config(d) for d in ("forward", "backward")} | dict(configs or {})
    x12 = make.rows(2 * stack.hidden)
    forward, _ = forward_launch(x12, config["forward"])
    backward, _ = backward_launch(make.rows(stack.hidden), x12, True, config["backward"])
    return {"swiglu.forward": forward, "swiglu.backward": backward}


def pair_launch(make: Maker, config: dict[str, int] | None = None) -> Launch:
    """Training pairs from int8 latents."""
    from rae_kernels.interpolate_triton import forward_launch

    stored, scale = make(make.samples, *LATENT).to(torch.int8), make(make.samples, LATENT[0], dtype=torch.float16)
    path, index = make(make.samples, 4, dtype=torch.float32), make(make.samples).to(torch.int64)
    return forward_launch(stored, scale, 1.0, path, index, 1, 0, torch.float32, config or interpolate.DEFAULT_CONFIG)[0]


def optimizer_launch(make: Maker, config: dict[str, int] | None = None, parameters: int = 1 << 26) -> Launch:
    """One step with one average and a 16-bit copy."""
    from rae_kernels.adamw_ema_triton import step_launch

    param, m, v, average = (make(parameters, dtype=torch.float32).abs() for _ in range(4))
    grad, copy = make(parameters), make(parameters)
    ones = make(1, dtype=torch.float32)
    flat = (param, grad, m, v, [average], copy, ones, None)
    return step_launch(*flat, [0.9995], 10, 2e-4, 0.9, 0.95, 1e-8, 0.0, config or adamw_ema.DEFAULT_CONFIG)


def crop_launch(make: Maker, config: dict[str, int] | None = None) -> Launch:
    """The first pass of an image of ImageNet's usual size."""
    from rae_kernels.crop_triton import level_launches

    device = "cpu" if make.device == "meta" else make.device
    image, passes = torch.zeros(375, 500, 3, dtype=torch.uint8, device=device), crop_passes()
    regions = crop.trace((375, 500), passes, CROP_SIZE)
    return level_launches([image], [passes], [regions], CROP_SIZE, config or crop.DEFAULT_CONFIG)[0][0]


def crop_passes() -> list[crop.Pass]:
    """Passes of nine taps along both axes, as for an image of ImageNet's usual size."""
    taps = np.ones((CROP_SIZE, 9), np.int32)
    return [crop.Pass(axis, np.arange(CROP_SIZE, dtype=np.int32), taps) for axis in (crop.COLUMNS, crop.ROWS)]


# By the first part of an operation's name: kernels of a stack of blocks, and what a step or a batch starts once.
STACKED = {"norm_modulate": norm_launches, "attention": attention_launches, "swiglu": swiglu_launches}
OTHERS = {"interpolate": pair_launch, "adamw_ema": optimizer_launch, "crop": crop_launch}
