"""LightningDiT: the plain diffusion transformer (arXiv 2501.01423) that DiTDH extends.

Shapes: B samples, C latent channels, H and W latent sides, N tokens, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rae_fast.dit.blocks import AdaLNBlock, FinalLayer
from rae_fast.dit.embed import LabelEmbed, PatchEmbed, TimestepEmbed
from rae_fast.dit.trunk import DiffusionTransformer, check_heads, rope_table, square
from rae_fast.errors import UserError
from rae_fast.patches import sincos_table, unpatchify


class LightningDiT(DiffusionTransformer):
    """Velocity model v(x_t, t, y) of one width; state-dict names of the reference's LightningDiT.

    Args:
        input_size: side of the latent grid.
        patch_size: side of a token in latent positions.
        in_channels: latent channels C.
        hidden_size: width D.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: feed-forward width over width, before the SwiGLU's 2/3.
        class_dropout_prob: probability of the null label in training; 0 leaves its row out of the table.
        num_classes: number of classes.
        learn_sigma: the checkpoint also has variance outputs; they are computed and left out of the result.
        use_qknorm: normalize queries and keys.
        use_swiglu: SwiGLU, else GELU.
        use_rope: two-dimensional rotary positions.
        use_rmsnorm: RMSNorm, else LayerNorm.
        wo_shift: modulation by scale and gate only.
        use_gembed: accepted for the reference's files, which never use it.
    """

    def __init__(
        self,
        *,
        input_size: int = 16,
        patch_size: int | list[int] = 1,
        in_channels: int = 768,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = False,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
        use_gembed: bool = True,
    ) -> None:
        patch_size = square("patch_size", patch_size)
        super().__init__(input_size=input_size, in_channels=in_channels, patch_size=patch_size, num_classes=num_classes)
        for name, value in (("hidden_size", hidden_size), ("depth", depth), ("num_heads", num_heads)):
            if not isinstance(value, int):
                raise UserError(f"stage_2.params.{name} is {value}", "one number: LightningDiT has no head")
        check_heads(hidden_size, num_heads)
        self.learn_sigma = learn_sigma
        self.pos_embed = nn.Parameter(sincos_table(hidden_size, self.grid), requires_grad=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, wide=True)
        self.t_embedder = TimestepEmbed(hidden_size)
        self.y_embedder = LabelEmbed(num_classes, hidden_size, class_dropout_prob)
        self.feat_rope = rope_table(hidden_size, num_heads, self.grid) if use_rope else None
        self.blocks = nn.ModuleList(
            AdaLNBlock(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                use_qknorm=use_qknorm,
                use_swiglu=use_swiglu,
                use_rmsnorm=use_rmsnorm,
                wo_shift=wo_shift,
            )
            for _ in range(depth)
        )
        out_channels = in_channels * (2 if learn_sigma else 1)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels, use_rmsnorm=use_rmsnorm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform linear maps with zero biases, then what both models share."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        super().reset_parameters()

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor, *, labeldrop_u: Tensor | None = None) -> Tensor:
        """Velocity [B, C, H, W]; arguments as `DiTDH.forward`, which see.

        Raises:
            UserError: the latents have another shape than the model's.
        """
        self.check_latents(x_BCHW)
        c_BD = self.t_embedder(t_B) + self.y_embedder(y_B, labeldrop_u)
        # Every block's modulation begins with this SiLU: the same for all blocks, so computed once.
        silu_c_B1D = F.silu(c_BD)[:, None]
        # A float32 residual stream also with bfloat16 parameters, as under the reference's autocast.
        x_BND = self.x_embedder(x_BCHW) + self.pos_embed
        rope = None if self.feat_rope is None else self.feat_rope()
        x_BND = self.run_trunk(x_BND, silu_c_B1D, rope)
        v_BCHW = unpatchify(self.final_layer(x_BND, silu_c_B1D), self.patch_size, self.grid)
        return v_BCHW[:, : self.in_channels]
