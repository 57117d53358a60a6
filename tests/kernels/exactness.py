"""How tests of kernels judge a result: relative error against float64, and memory that begins as NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over the reference's, in float64; NaN anywhere gives NaN."""
    return ((result.double() - reference.double()).norm() / reference.double().norm()).item()


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is newly allocated holds NaN until a kernel writes there."""
    empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
