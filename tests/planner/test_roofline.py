"""The roofline's arithmetic against torch's own count of the project's models, on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rae_fast.config import Config, Stage2
from rae_fast.dit.registry import build_dit, size_presets
from rae_fast.geometry import Geometry
from rae_fast.planner import roofline

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("DiTDH-S", {"input_size": 4, "num_classes": 10}),
    ("DiTDH-S", {"input_size": 4, "use_swiglu": False, "in_channels": 32, "class_dropout_prob": 0.0}),
    ("LightningDiT-S", {"input_size": 8, "patch_size": 2, "in_channels": 16}),
    ("DiTDH", {"input_size": 4, "hidden_size": 128, "depth": [2, 1], "num_heads": 2, "in_channels": 24}),
    ("DiTDH-S", {"input_size": 4, "wo_shift": True, "use_qknorm": True, "mlp_ratio": 3.0}),
    ("DiTDH-S", {"input_size": 4, "use_rmsnorm": False, "use_qknorm": True, "use_rope": False, "use_pos_embed": False}),
    ("LightningDiT-S", {"learn_sigma": True, "use_rmsnorm": False, "in_channels": 8}),
    ("LightningDiT", {"hidden_size": 64, "depth": 2, "num_heads": 4, "use_swiglu": False, "wo_shift": True}),
]


def described(target: str, params: dict[str, Any]) -> Any:
    """The roofline's description of a model."""
    if target in size_presets():
        kind, numbers = size_presets()[target]
        return roofline.from_params(kind.__name__, {**numbers, **params})
    return roofline.from_params(target, params)


@pytest.mark.parametrize(("target", "params"), MODELS)
def test_flops_and_parameters_are_those_that_torch_counts(target: str, params: dict[str, Any]) -> None:
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model = build_dit(target, params).train()
        side, channels = model.input_size, model.in_channels
        x, y = torch.empty(1, channels, side, side), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as forward:
            out = model(x, torch.empty(1), y, labeldrop_u=torch.empty(1))
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    ours = described(target, params)
    assert roofline.forward_flops(ours) == forward.get_total_flops()
    assert roofline.training_flops(ours) == forward.get_total_flops() + backward.get_total_flops()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert roofline.parameters(ours) == trainable


def test_released_sizes_have_their_published_cost() -> None:
    large = roofline.from_preset("DiTDH-XL", 256, 768)
    assert roofline.parameters(large) == 838_380_628
    assert roofline.training_flops(large) == pytest.approx(968.21e9, rel=1e-5)
    assert roofline.training_flops(roofline.from_preset("DiTDH-S", 1024, 768)) == pytest.approx(1241.42e9, rel=1e-5)


def test_the_floor_falls_with_faster_memory_and_larger_batches() -> None:
    model = roofline.from_preset("DiTDH-XL", 256, 768)
    base = sum(roofline.floor_s(model, 256, 788, 4.3).values())
    assert 1 / 700 < base < 1 / 600
    assert sum(roofline.floor_s(model, 256, 788, 8.6).values()) < base
    assert sum(roofline.floor_s(model, 1024, 788, 4.3).values()) < base


def test_a_stores_own_shape_counts_where_the_configuration_names_none() -> None:
    config = Config(stage_2=Stage2(target="DiTDH-S"))
    geometry = Geometry((768, 16, 16), 256, 1000, 1000, 6.93)
    # 96.94 GFLOP forward by torch's counter on the official DiTDH-S.
    assert roofline.forward_flops(roofline.from_config(config, geometry)) == pytest.approx(96.94e9, rel=1e-3)
