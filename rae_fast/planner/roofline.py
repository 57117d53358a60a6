"""FLOPs and bytes of a diffusion transformer, and the least time that a training step of it can take on a device.

FLOPs are those of the matrix products, as torch's FlopCounterMode counts them; bytes are those of the passes over
activations with the project's kernels, each tensor read and written once; a step takes at least FLOPs / matrix rate +
bytes / bandwidth, as the two do not overlap within one stream. Rates are those measured on an H200 (random data)
unless given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rae_fast.config import Config
from rae_fast.dit.registry import TARGETS, size_presets
from rae_fast.errors import UserError
from rae_fast.geometry import Geometry, dit_params, resolve_geometry

SHEET_TFLOPS = 989.0  # dense bfloat16, the vendor's sheet: what MFU is a share of
MATRIX_TFLOPS = 788.0  # an 8192^3 product on random data
COPY_TBS = 4.3  # device-to-device copy, bytes read and written
ATTENTION_TFLOPS = 500.0  # forward and backward of the best libraries at head widths of 64 to 128
BF16, FP32 = 2, 4
FOURIER = 256


@dataclass(frozen=True)
class Stack:
    """Blocks of one width.

    Attributes:
        width: D.
        depth: number of blocks.
        hidden: hidden width of the feed-forward.
        swiglu: three matrices in the feed-forward, else two.
        per_token: modulation of each token, else of each sample.
        stream_bytes: bytes of a number of the residual stream.
        parts: modulations of a block: 6, or 4 without shifts.
        norm_parameters: of a block's norms.
    """

    width: int
    depth: int
    hidden: int
    swiglu: bool
    per_token: bool
    stream_bytes: int
    parts: int
    norm_parameters: int


@dataclass(frozen=True)
class Model:
    """What decides the cost of a diffusion transformer.

    Attributes:
        trunk: the deep stack; all of LightningDiT.
        head: DiTDH's wide stack, or None.
        tokens: N.
        patch_values: values of one token's patch.
        out_values: what the last layer makes of a token: a patch, or two where the variance is learnt.
        classes: rows of the label table.
        rmsnorm: norms have a weight, else they are LayerNorms without one.
    """

    trunk: Stack
    head: Stack | None
    tokens: int
    patch_values: int
    out_values: int
    classes: int
    rmsnorm: bool

    @property
    def final_width(self) -> int:
        """Width of the last layer."""
        return (self.head or self.trunk).width


def from_preset(name: str, tokens: int, channels: int, **changes: object) -> Model:
    """A released size.

    Raises:
        UserError: no such size, or tokens that make no square.
    """
    presets = size_presets()
    if name not in presets:
        raise UserError(f"--model {name}", f"one of {', '.join(presets)}")
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UserError(f"--tokens {tokens}", "a square number")
    target, numbers = presets[name]
    return from_params(target.__name__, {**numbers, "input_size": side, "in_channels": channels, **changes})


def from_file(path: Path) -> Model:
    """The model of a configuration file."""
    # Here, so that GPU benchmarks of released sizes run without OmegaConf.
    from rae_fast.config_file import load_config

    return from_config(load_config(path, []))


def from_config(config: Config, geometry: Geometry | None = None) -> Model:
    """The model of a configuration, for latents of `geometry`, or of the shape that the configuration itself gives."""
    target = config.stage_2.target
    presets = size_presets()
    numbers = presets[target][1] if target in presets else {}
    name = presets[target][0].__name__ if target in presets else TARGETS[target].__name__
    return from_params(name, {**numbers, **dit_params(config, geometry or resolve_geometry(config))})


def from_params(kind: str, params: dict[str, object]) -> Model:
    """From the constructor arguments of DiTDH or LightningDiT."""
    head = kind == "DiTDH"
    defaults = {"hidden_size": [1152, 2048] if head else 1152, "depth": [28, 2] if head else 28, "num_heads": 16}
    defaults |= {"input_size": 1 if head else 16, "patch_size": 1, "in_channels": 768, "num_classes": 1000}
    given = defaults | {"mlp_ratio": 4.0, "use_swiglu": True, "use_rmsnorm": True, "class_dropout_prob": 0.1} | params
    widths, depths, heads = (_pair(given[name]) for name in ("hidden_size", "depth", "num_heads"))
    swiglu, rmsnorm, qknorm = (bool(given.get(name)) for name in ("use_swiglu", "use_rmsnorm", "use_qknorm"))
    patch = _pair(given["patch_size"])[0]

    def stack(which: int, per_token: bool, stream_bytes: int) -> Stack:
        width, hidden = widths[which], int(widths[which] * float(given["mlp_ratio"]))
        hidden = int(2 / 3 * hidden) if swiglu else hidden
        # Of queries and keys each: a weight, and LayerNorm's bias.
        norms = 2 * width * rmsnorm + 2 * qknorm * (1 if rmsnorm else 2) * (width // heads[which])
        parts = 4 if given.get("wo_shift") else 6
        return Stack(width, depths[which], hidden, swiglu, per_token, stream_bytes, parts, norms)

    patch_values = patch**2 * int(given["in_channels"])
    return Model(
        trunk=stack(0, False, FP32),
        head=stack(1, True, BF16) if head else None,
        tokens=(int(given["input_size"]) // patch) ** 2,
        patch_values=patch_values,
        out_values=patch_values * (2 if given.get("learn_sigma") else 1),
        classes=int(given["num_classes"]) + (float(given["class_dropout_prob"]) > 0),
        rmsnorm=rmsnorm,
    )


def _pair(value: object) -> tuple[int, int]:
    values = list(value) if isinstance(value, list | tuple) else [value, value]
    return int(values[0]), int(values[-1])


def block_linear_flops(stack: Stack, tokens: int) -> float:
    """Forward FLOPs of one block's linear maps for one sample: 2 for each weight and row."""
    attention = 4 * stack.width**2
    feed_forward = (3 if stack.swiglu else 2) * stack.width * stack.hidden
    modulation = stack.parts * stack.width**2 * (tokens if stack.per_token else 1)
    return 2.0 * (tokens * (attention + feed_forward) + modulation)


def attention_flops(stack: Stack, tokens: int) -> float:
    """Forward FLOPs of one block's two attention products for one sample."""
    return 4.0 * tokens**2 * stack.width


def forward_flops(model: Model) -> float:
    """FLOPs of one sample's forward pass."""
    return _inner_linear_flops(model) + _first_linear_flops(model) + _attention_of_all(model)


def training_flops(model: Model) -> float:
    """FLOPs of forward and backward for one sample, without what a backward pass recomputes.

    Backward costs twice the forward pass, but for maps whose input needs no gradient: patches and Fourier features.
    """
    return 3 * (_inner_linear_flops(model) + _attention_of_all(model)) + 2 * _first_linear_flops(model)


def stacks(model: Model) -> list[Stack]:
    """Trunk and, where there is one, head."""
    return [stack for stack in (model.trunk, model.head) if stack is not None]


def _attention_of_all(model: Model) -> float:
    return sum(stack.depth * attention_flops(stack, model.tokens) for stack in stacks(model))


def _first_linear_flops(model: Model) -> float:
    """Maps of the latents and of the timestep's features."""
    embedders = sum(stack.width for stack in stacks(model))
    return 2.0 * (model.tokens * model.patch_values * embedders + 2 * FOURIER * model.trunk.width)


def _inner_linear_flops(model: Model) -> float:
    blocks = sum(stack.depth * block_linear_flops(stack, model.tokens) for stack in stacks(model))
    final_rows = model.tokens if model.head else 1
    last = 2 * model.final_width**2 * final_rows + model.tokens * model.final_width * model.out_values
    projected = model.head is not None and model.head.width != model.trunk.width
    between = model.tokens * model.trunk.width * model.final_width if projected else 0
    return blocks + 2.0 * (model.trunk.width**2 + last + between)


def parameters(model: Model) -> int:
    """Trainable parameters (the position table and the Fourier frequencies are not)."""
    total = 0
    for stack in stacks(model):
        feed_forward = stack.width * stack.hidden * (3 if stack.swiglu else 2)
        feed_forward += stack.hidden * (2 if stack.swiglu else 1) + stack.width
        one = 4 * stack.width**2 + 4 * stack.width + feed_forward + stack.parts * stack.width * (stack.width + 1)
        total += stack.depth * (one + stack.norm_parameters) + (model.patch_values + 1) * stack.width
    width, trunk = model.final_width, model.trunk.width
    total += width * model.rmsnorm + (width + 1) * model.out_values + 2 * width * (width + 1)
    total += (2 * FOURIER + 1) * trunk + (trunk + 1) * trunk + model.classes * trunk
    return total + ((trunk + 1) * width if model.head and width != trunk else 0)


def block_bytes(stack: Stack, tokens: int) -> tuple[float, float]:
    """(forward, backward) bytes that one block's passes over activations move for one sample, without the GEMMs' own.

    Norms: forward reads stream and branch, writes stream and normed; backward reads both gradients, stream and branch,
    writes both gradients. Attention: forward reads q, k, v, writes the result and the turned q and k; backward reads
    q, k, v and the result's gradient twice, the result once, writes three. SwiGLU: forward 2 F in, F out; backward
    3 F in, 3 F out.
    """
    channels, hidden = tokens * stack.width, tokens * stack.hidden
    modulation = stack.parts // 2 * BF16 if stack.per_token else 0
    norm_forward = 2 * (2 * stack.stream_bytes + 2 * BF16 + modulation)
    norm_backward = 2 * (3 * stack.stream_bytes + 3 * BF16 + modulation * 5 / 3)
    gate_in, gate_back = (3, 6) if stack.swiglu else (2, 3)
    forward = channels * (norm_forward + (3 + 1 + 2) * BF16) + hidden * gate_in * BF16
    backward = channels * (norm_backward + (3 + 3 + 2 + 1 + 3) * BF16) + hidden * gate_back * BF16
    return forward, backward


def optimizer_bytes(model: Model) -> float:
    """Bytes of one step of AdamW with one average and a 16-bit copy, in one pass."""
    return parameters(model) * (4 * 2 * FP32 + 2 * BF16)


def floor_s(model: Model, batch: int, tflops: float, tbs: float) -> dict[str, float]:
    """Least seconds per sample of a training step, by what takes them."""
    linear = training_flops(model) - 3 * _attention_of_all(model)
    moved = sum(stack.depth * sum(block_bytes(stack, model.tokens)) for stack in stacks(model))
    # The scores are made anew in the backward pass: seven products for six.
    attention = 3.5 * _attention_of_all(model)
    return {
        "linear maps": linear / (tflops * 1e12),
        "attention": attention / (min(tflops, ATTENTION_TFLOPS) * 1e12),
        "passes over activations": moved / (tbs * 1e12),
        "optimizer": optimizer_bytes(model) / (tbs * 1e12) / batch,
    }
