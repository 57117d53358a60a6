"""The memory plan against what autograd saves of the project's models, counted on tensors without memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from rae_fast.dit.registry import build_dit
from rae_fast.training.memory import plan_memory

# The released widths, with fewer blocks: counting takes time by the block.
SMALL = {"hidden_size": [384, 2048], "depth": [4, 1], "num_heads": [6, 16]}
LARGE = {"hidden_size": [1152, 2048], "depth": [4, 1], "num_heads": [16, 16]}
MODELS = [("DiTDH", SMALL), ("DiTDH", LARGE), ("LightningDiT", {"hidden_size": 768, "depth": 4, "num_heads": 12})]


def saved_bytes(target: str, params: dict[str, object], batch: int, bf16: bool, checkpointing: bool) -> int:
    """Bytes of all storages that the forward pass leaves for the backward pass, parameters excepted."""
    with FakeTensorMode():
        model = build_dit(target, {"input_size": 16, "num_classes": 1000, **params}).train()
        model.activation_checkpointing = checkpointing
        known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        found, alive = {}, []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                found[storage._cdata] = storage.nbytes()
                alive.append(storage)  # an address must not be used twice
            return tensor

        x, y = torch.empty(batch, 768, 16, 16), torch.zeros(batch, dtype=torch.int64)
        autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            model(x, torch.empty(batch), y, labeldrop_u=torch.empty(batch))
    return sum(found.values())


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("target", "params"), MODELS, ids=["S", "wide", "lightning"])
def test_activations_and_copies_are_what_autograd_saves(target: str, params: dict[str, object], bf16: bool) -> None:
    with torch.device("meta"):
        model = build_dit(target, {"input_size": 16, "num_classes": 1000, **params})
    plan = plan_memory(model, micro_batch=1, value_bytes=2 if bf16 else 4)
    two, six = (saved_bytes(target, params, batch, bf16, False) for batch in (2, 6))
    assert plan.activation_bytes == pytest.approx((six - two) / 4, rel=0.05)
    assert plan.activation_bytes * 6 + plan.copy_bytes == pytest.approx(six, rel=0.05)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_recomputed_blocks_leave_their_inputs_and_one_block(bf16: bool) -> None:
    with torch.device("meta"):
        model = build_dit("DiTDH", {"input_size": 16, "num_classes": 1000, **SMALL})
    plan = plan_memory(model, micro_batch=1, value_bytes=2 if bf16 else 4, checkpointing=True)
    two, six = (saved_bytes("DiTDH", SMALL, batch, bf16, True) for batch in (2, 6))
    one_block = (88 if bf16 else 146) * 256 * 2048
    assert plan.activation_bytes == pytest.approx((six - two) / 4 + one_block, rel=0.1)
    assert plan.copy_bytes == 0
