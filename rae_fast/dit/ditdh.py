"""DiTDH: a diffusion transformer whose trunk conditions a shallow, wide head token by token (RAE, arXiv 2510.11690).

Shapes: B samples, C latent channels, H and W latent sides, N tokens, D trunk width, E head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rae_fast.dit.blocks import AdaLNBlock, FinalLayer
from rae_fast.dit.embed import LabelEmbed, PatchEmbed, TimestepEmbed
from rae_fast.dit.trunk import DiffusionTransformer, check_heads, pair, rope_table, square
from rae_fast.patches import sincos_table, unpatchify


class DiTDH(DiffusionTransformer):
    """Velocity model v(x_t, t, y) with a deep trunk and a wide head; state-dict names of the reference's DiTwDDTHead.

    Args:
        input_size: side of the latent grid.
        patch_size: side of a token in latent positions; trunk and head have the same.
        in_channels: latent channels C.
        hidden_size: widths (trunk D, head E), or one for both.
        depth: numbers of blocks (trunk, head).
        num_heads: attention heads (trunk, head), or one number for both.
        mlp_ratio: feed-forward width over width, before the SwiGLU's 2/3.
        class_dropout_prob: probability of the null label in training; 0 leaves its row out of the table.
        num_classes: number of classes.
        use_qknorm: normalize queries and keys.
        use_swiglu: SwiGLU, else GELU.
        use_rope: two-dimensional rotary positions in trunk and head.
        use_rmsnorm: RMSNorm, else LayerNorm.
        wo_shift: modulation by scale and gate only.
        use_pos_embed: add a position table to the trunk's tokens.
    """

    def __init__(
        self,
        *,
        input_size: int = 1,
        patch_size: int | list[int] = 1,
        in_channels: int = 768,
        hidden_size: int | list[int] = (1152, 2048),
        depth: int | list[int] = (28, 2),
        num_heads: int | list[int] = (16, 16),
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_pos_embed: bool = True,
    ) -> None:
        patch_size = square("patch_size", patch_size)
        super().__init__(input_size=input_size, in_channels=in_channels, patch_size=patch_size, num_classes=num_classes)
        trunk_width, head_width = pair("hidden_size", hidden_size)
        trunk_depth, head_depth = pair("depth", depth)
        trunk_heads, head_heads = pair("num_heads", num_heads)
        check_heads(trunk_width, trunk_heads)
        check_heads(head_width, head_heads)
        self.trunk_depth = trunk_depth

        table = sincos_table(trunk_width, self.grid)
        self.pos_embed = nn.Parameter(table, requires_grad=False) if use_pos_embed else None
        self.x_embedder = PatchEmbed(patch_size, in_channels, head_width)
        self.s_embedder = PatchEmbed(patch_size, in_channels, trunk_width, wide=True)
        self.s_projector = nn.Identity() if trunk_width == head_width else nn.Linear(trunk_width, head_width)
        self.t_embedder = TimestepEmbed(trunk_width)
        self.y_embedder = LabelEmbed(num_classes, trunk_width, class_dropout_prob)
        self.enc_feat_rope = rope_table(trunk_width, trunk_heads, self.grid) if use_rope else None
        self.dec_feat_rope = rope_table(head_width, head_heads, self.grid) if use_rope else None
        self.final_layer = FinalLayer(head_width, patch_size**2 * in_channels, use_rmsnorm=use_rmsnorm, per_token=True)
        flags = {
            "mlp_ratio": mlp_ratio,
            "use_qknorm": use_qknorm,
            "use_swiglu": use_swiglu,
            "use_rmsnorm": use_rmsnorm,
            "wo_shift": wo_shift,
        }
        trunk = [AdaLNBlock(trunk_width, trunk_heads, per_token=False, **flags) for _ in range(trunk_depth)]
        head = [AdaLNBlock(head_width, head_heads, per_token=True, **flags) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(trunk + head)
        self.reset_parameters()

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, s: Tensor | None = None, *, labeldrop_u: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, C, H, W].

        Args:
            x_BCHW: noisy latents.
            t_B: times in [0, 1], 0 data and 1 noise.
            y_B: int64 labels; `num_classes` means "no class".
            s: the trunk's result [B, N, D] where it is known already; t and y then have no influence.
            labeldrop_u: uniforms [B] for label dropout in training; drawn when absent.

        Raises:
            UserError: the latents have another shape than the model's.
        """
        self.check_latents(x_BCHW)
        s_BND = self.trunk(x_BCHW, t_B, y_B, labeldrop_u) if s is None else s
        if isinstance(self.s_projector, nn.Linear):
            s_BND = self.s_projector(s_BND.to(self.s_projector.weight.dtype))
        return self.head(x_BCHW, F.silu(s_BND))

    def trunk(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, labeldrop_u: Tensor | None = None) -> Tensor:
        """The condition of each token, silu(trunk(x, t, y) + t): [B, N, D] in float32 or above.

        The trunk's residual stream is float32 also when parameters are bfloat16, as under the reference's autocast:
        a sum over 28 blocks in eight bits of mantissa would lose the small branches.
        """
        t_BD = self.t_embedder(t_B)
        c_BD = F.silu(t_BD + self.y_embedder(y_B, labeldrop_u))
        # Every block's modulation begins with one more SiLU: the same for all blocks, so computed once.
        silu_c_B1D = F.silu(c_BD)[:, None]
        s_BND = self.s_embedder(x_BCHW)
        if self.pos_embed is not None:
            s_BND = s_BND + self.pos_embed
        rope = None if self.enc_feat_rope is None else self.enc_feat_rope()
        s_BND = self.run_trunk(s_BND, silu_c_B1D, rope)
        return F.silu(t_BD[:, None] + s_BND)

    def head(self, x_BCHW: Tensor, silu_s_BNE: Tensor) -> Tensor:
        """Velocity [B, C, H, W] from the latents and the activated condition of each token."""
        x_BNE = self.x_embedder(x_BCHW)
        rope = None if self.dec_feat_rope is None else self.dec_feat_rope()
        for block in self.blocks[self.trunk_depth :]:
            x_BNE = self.run_block(block, x_BNE, silu_s_BNE, rope)
        return unpatchify(self.final_layer(x_BNE, silu_s_BNE), self.patch_size, self.grid)
