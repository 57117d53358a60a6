"""What both diffusion transformers share: checks of the geometry, initialization, running blocks.

Shapes: B samples, C latent channels, H and W latent sides, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae_fast.dit.blocks import AdaLNBlock, FinalLayer, Rope
from rae_fast.dit.embed import LabelEmbed, OwnTypeLinear, PatchEmbed, RotaryTable, TimestepEmbed
from rae_fast.dit.joined import joined_linear, lay_side_by_side
from rae_fast.errors import UserError

# Modules that the reference initializes otherwise than torch does.
RESETTABLE = (PatchEmbed, TimestepEmbed, LabelEmbed, AdaLNBlock, FinalLayer)


class DiffusionTransformer(nn.Module):
    """Base of DiTDH and LightningDiT.

    Attributes:
        activation_checkpointing: recompute each block's activations in the backward pass instead of keeping them.
        input_size, in_channels, patch_size: the latents this model takes, [B, in_channels, input_size, input_size].
        num_classes: number of classes, and the index of the null label.
        joined: the weights of the trunk's modulations were laid side by side.
    """

    blocks: nn.ModuleList

    def __init__(self, *, input_size: int, in_channels: int, patch_size: int, num_classes: int) -> None:
        super().__init__()
        if input_size < 1 or input_size % patch_size:
            raise UserError(
                f"stage_2.params: input_size is {input_size} with patch_size {patch_size}",
                "a positive input_size that patch_size divides",
                "input_size is the side of the latent grid (16 for 256 px, 32 for 512 px)",
            )
        self.input_size, self.in_channels, self.patch_size = input_size, in_channels, patch_size
        self.num_classes = num_classes
        self.grid = input_size // patch_size
        self.activation_checkpointing = False
        self.joined = False

    @property
    def has_null_label(self) -> bool:
        """Whether the label table has a row for "no class", without which there is no classifier-free guidance."""
        return self.y_embedder.embedding_table.num_embeddings > self.num_classes

    def reset_parameters(self) -> None:
        """The reference's initialization on top of torch's defaults."""
        for module in self.modules():
            if isinstance(module, RESETTABLE):
                module.reset_parameters()

    def check_latents(self, x_BCHW: Tensor) -> None:
        """Refuse latents of another shape than the model's.

        Raises:
            UserError: channels or sides differ.
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise UserError(
                f"latents of shape {list(x_BCHW.shape[1:])} for a model of in_channels {self.in_channels}, "
                f"input_size {self.input_size}",
                f"[C, H, W] = {list(expected)}",
                "make stage_2.params.input_size and in_channels those of the latents",
            )

    def run_block(
        self, block: nn.Module, x_BND: Tensor, silu_c: Tensor, rope: Rope | None, modulation: Tensor | None = None
    ) -> Tensor:
        """One block, with its activations kept or recomputed."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x_BND, silu_c, rope, modulation)
        if x_BND.device.type == "xla":
            # XLA's own: the compiler would find the recomputed values equal to the first ones, and keep those.
            from torch_xla.utils.checkpoint import checkpoint as checkpoint_on_xla

            return checkpoint_on_xla(block, x_BND, silu_c, rope, modulation, use_reentrant=True)
        return checkpoint(block, x_BND, silu_c, rope, modulation, use_reentrant=False)

    def run_trunk(self, x_BND: Tensor, silu_c_B1D: Tensor, rope: Rope | None) -> Tensor:
        """The blocks that are modulated per sample, in turn, all modulations by one product where that is possible."""
        blocks, made = self.trunk_blocks(), None
        if self.joined and not torch.compiler.is_compiling():
            made = joined_linear(silu_c_B1D, [block.adaLN_modulation[1] for block in blocks])
            self.joined = made is not None
        for block, modulation in zip(blocks, made or [None] * len(blocks), strict=True):
            x_BND = self.run_block(block, x_BND, silu_c_B1D, rope, modulation)
        return x_BND

    def trunk_blocks(self) -> list[AdaLNBlock]:
        """The blocks that are modulated per sample."""
        return [block for block in self.blocks if isinstance(block.adaLN_modulation[1], OwnTypeLinear)]

    def join_modulations(self) -> None:
        """Lay the weights of the trunk's modulations side by side, as one product for all of them asks for."""
        maps = [block.adaLN_modulation[1] for block in self.trunk_blocks()]
        for name in ("weight", "bias"):
            lay_side_by_side([getattr(m, name) for m in maps])
        self.joined = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusionTransformer:
        super()._apply(fn, recurse)
        # Where parameters are moved or cast they are laid anew. On a CPU one product gains nothing.
        self.joined = False
        if self.trunk_blocks() and next(self.parameters()).is_cuda:
            self.join_modulations()
        return self


def rope_table(width: int, num_heads: int, grid: int) -> RotaryTable:
    """The rotary table of a width split into heads.

    Raises:
        UserError: the head width is not a multiple of 4, so that it cannot hold pairs for two axes.
    """
    check_heads(width, num_heads)
    if width // num_heads % 4:
        raise UserError(
            f"stage_2.params: hidden_size {width} over {num_heads} heads gives head width {width // num_heads}",
            "a multiple of 4 for two-dimensional rotary positions",
            "change hidden_size or num_heads, or set use_rope: false",
        )
    return RotaryTable(width // num_heads, grid)


def check_heads(width: int, num_heads: int) -> None:
    """Refuse a width that its heads do not divide, or that the sine-cosine table cannot fill.

    Raises:
        UserError: as said.
    """
    if num_heads < 1 or width % num_heads:
        raise UserError(
            f"stage_2.params: hidden_size {width} with num_heads {num_heads}", "heads that divide the width"
        )
    if width % 4:
        raise UserError(f"stage_2.params: hidden_size {width}", "a multiple of 4, for the position table")


def square(name: str, value: int | list[int] | tuple[int, ...]) -> int:
    """A patch size given as one number or as a pair of equal numbers.

    Raises:
        UserError: the numbers differ.
    """
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(set(values)) != 1:
        raise UserError(
            f"stage_2.params.{name} is {values}", "equal numbers", "the condition and the head must see the same tokens"
        )
    return int(values[0])


def pair(name: str, value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """(trunk, head) values given as two numbers, or as one for both.

    Raises:
        UserError: neither one nor two numbers.
    """
    values = list(value) if not isinstance(value, int) else [value, value]
    if len(values) != 2:
        raise UserError(f"stage_2.params.{name} is {values}", "one number, or two: trunk and head")
    return int(values[0]), int(values[1])
