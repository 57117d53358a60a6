"""Parts of the blocks: packed attention, norms, the padded SwiGLU, modulation per sample and per token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rae_fast.dit import blocks
from rae_fast.dit.blocks import AdaLNBlock, LayerNorm, RMSNorm, SwiGLU, gated_residual, norm_modulate, packed_attention
from rae_fast.dit.embed import RotaryTable, rotate

HEADS, HEAD_WIDTH, GRID = 2, 8, 3


def packed(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, GRID**2, 3 * HEADS * HEAD_WIDTH, dtype=dtype)


def test_packed_attention_is_softmax_attention_on_rotated_queries_and_keys() -> None:
    qkv_BNE = packed()
    rope = tuple(table.double() for table in RotaryTable(HEAD_WIDTH, GRID)())
    q_norm, k_norm = RMSNorm(HEAD_WIDTH).double(), RMSNorm(HEAD_WIDTH).double()
    torch.nn.init.uniform_(q_norm.weight)
    torch.nn.init.uniform_(k_norm.weight)
    out = packed_attention(qkv_BNE, HEADS, rope, q_norm, k_norm)
    q, k, v = (part.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2) for part in qkv_BNE.chunk(3, dim=-1))
    q, k = rotate(q_norm(q), *rope), rotate(k_norm(k), *rope)
    scores = q @ k.transpose(-1, -2) / HEAD_WIDTH**0.5
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)


def test_rotation_keeps_lengths_and_makes_scores_depend_on_offsets_only() -> None:
    cos, sin = (table.double() for table in RotaryTable(HEAD_WIDTH, 5)())
    torch.manual_seed(0)
    q, k = torch.randn(HEAD_WIDTH, dtype=torch.float64), torch.randn(HEAD_WIDTH, dtype=torch.float64)
    rotated_q, rotated_k = rotate(q.expand(25, -1), cos, sin), rotate(k.expand(25, -1), cos, sin)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(25))
    scores = (rotated_q @ rotated_k.T).reshape(5, 5, 5, 5)
    # Queries at (row, column), keys one row up and two columns right.
    offset = torch.stack([scores[r, c, r - 1, c + 2] for r in range(1, 5) for c in range(3)])
    torch.testing.assert_close(offset, offset[:1].expand(len(offset)), atol=1e-6, rtol=0)
    assert scores.std() > 0.1


def test_rotation_by_complex_numbers_is_rotation_by_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = RotaryTable(HEAD_WIDTH, GRID)()
    qkv_BNE = packed(torch.float32).requires_grad_()
    weight = torch.randn(2, HEADS, GRID**2, HEAD_WIDTH)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        key = qkv_BNE.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)[1]
        out = rotate(key, *rope)
        assert out.dtype == torch.float32
        found.append((out, *torch.autograd.grad((out * weight).sum(), qkv_BNE)))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_rotary_tables_stay_float32_when_a_model_is_cast_down() -> None:
    table = RotaryTable(HEAD_WIDTH, GRID)
    exact = table.freqs_cos.clone()
    assert torch.equal(table.bfloat16().half().freqs_cos, exact)
    assert table.double().freqs_cos.dtype == torch.float64


@pytest.mark.parametrize("norm", [RMSNorm(16), LayerNorm(16, eps=1e-6, elementwise_affine=False)], ids=["rms", "layer"])
def test_norms_of_bfloat16_rows_are_taken_in_float32(norm: torch.nn.Module) -> None:
    torch.manual_seed(0)
    x = (100 * torch.randn(4, 16)).bfloat16()
    out = norm.bfloat16()(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, norm.double()(x.double()).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5], ids=["per sample", "per token"])
def test_modulation_and_gate_broadcast_per_sample_and_per_token(tokens: int) -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    shift, scale, gate = torch.randn(3, 2, tokens, 8)
    norm = RMSNorm(8)
    modulated = norm_modulate(x, norm, shift, scale, torch.float32)
    gated = gated_residual(x, branch, gate)
    for b in range(2):
        for n in range(5):
            m = n if tokens > 1 else 0
            torch.testing.assert_close(modulated[b, n], norm(x[b, n]) * (1 + scale[b, m]) + shift[b, m])
            torch.testing.assert_close(gated[b, n], x[b, n] + gate[b, m] * branch[b, n])


def test_padded_swiglu_is_the_same_function_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA odd hidden widths are padded to whole tiles; here the padding is forced on the CPU."""
    torch.manual_seed(0)
    mlp = SwiGLU(8, 21).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def run() -> list[torch.Tensor]:
        out = mlp(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])]

    plain = run()
    widths = []
    monkeypatch.setattr(blocks, "padded_width", lambda width, x: widths.append(width) or 128)
    for padded, expected in zip(run(), plain, strict=True):
        torch.testing.assert_close(padded, expected, rtol=1e-12, atol=1e-12)
    assert widths == [21]
    assert mlp.w12(x).shape[-1] == 256


def test_only_unaligned_widths_are_padded_and_only_on_cuda() -> None:
    class OnCuda:
        device = torch.device("cuda")

    assert blocks.padded_width(5461, torch.empty(1)) == 5461
    assert blocks.padded_width(5461, OnCuda()) == 5504
    assert blocks.padded_width(3072, OnCuda()) == 3072


def test_modulation_computed_outside_replaces_the_block_s_own() -> None:
    """So that one GEMM can make the modulations of all blocks."""
    torch.manual_seed(0)
    block = AdaLNBlock(8, 2, mlp_ratio=4.0, use_qknorm=False, use_swiglu=True, use_rmsnorm=True, wo_shift=False)
    torch.nn.init.normal_(block.adaLN_modulation[1].weight)
    x, silu_c = torch.randn(2, 4, 8), torch.randn(2, 1, 8)
    own = block(x, silu_c, None)
    linear = block.adaLN_modulation[1]
    given = F.linear(silu_c, linear.weight, linear.bias)
    assert torch.equal(block(x, torch.zeros_like(silu_c), None, modulation=given), own)
