"""DiTDH and LightningDiT: exact derivatives, options, precision, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rae_fast.dit import DiffusionTransformer, build_dit
from rae_fast.errors import UserError

TINY = {
    "DiTDH": {"hidden_size": [8, 16], "depth": [1, 1], "num_heads": [2, 2]},
    "LightningDiT": {"hidden_size": 8, "depth": 2, "num_heads": 2},
}
SIZES = {"input_size": 4, "in_channels": 3, "num_classes": 5}
OPTIONS = [
    {},
    {"use_qknorm": True},
    {"use_rmsnorm": False, "use_qknorm": True, "use_swiglu": False},
    {"wo_shift": True, "use_rope": False},
    {"patch_size": 2},
]


def tiny(target: str, **options: object) -> DiffusionTransformer:
    """A tiny model with every parameter random, so that nothing hides behind the zero initialization."""
    torch.manual_seed(0)
    model = build_dit(target, {**TINY[target], **SIZES, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, size, size, dtype=dtype), torch.tensor([0.2, 0.7], dtype=dtype), torch.tensor([1, 5])


@pytest.mark.parametrize("target", TINY)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_exact_in_float64(target: str, options: dict) -> None:
    model = tiny(target, **options).double().requires_grad_(True)
    x, t, y = batch(dtype=torch.float64)
    assert model(x, t, y).shape == x.shape
    # Directions instead of single entries: one finite difference for each tensor.
    names, tensors = zip(*model.named_parameters(), strict=True)
    torch.manual_seed(2)
    directions = [torch.randn_like(tensor) for tensor in (*tensors, x)]

    def moved(step: Tensor) -> Tensor:
        values = {n: p + step[i] * d for i, (n, p, d) in enumerate(zip(names, tensors, directions, strict=False))}
        out = torch.func.functional_call(model, values, (x + step[-1] * directions[-1], t, y))
        return out.square().mean()

    step = torch.zeros(len(directions), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moved, [step], eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("target", TINY)
def test_a_new_model_predicts_zero(target: str) -> None:
    model = build_dit(target, {**TINY[target], **SIZES})
    assert torch.equal(model(*batch()), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("target", TINY)
def test_activation_checkpointing_changes_memory_and_no_number(target: str) -> None:
    model = tiny(target).requires_grad_(True)
    results = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        out = model(*batch())
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("target", TINY)
def test_whole_model_compiles_into_one_graph_with_equal_results(target: str) -> None:
    model = tiny(target).requires_grad_(True).train()
    model.y_embedder.dropout_prob = 0.0
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (model, graph):
        model.zero_grad()
        run(*batch()).square().mean().backward()
        if run is model:
            expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", TINY)
def test_bfloat16_weights_keep_time_and_positions_exact(target: str) -> None:
    """As DeepSpeed casts a model: everything goes to bfloat16 except tables and fixed frequencies."""
    model = tiny(target)
    # Values that bfloat16 holds, so that the only rounding left is the arithmetic's.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    x, t, y = batch()
    expected = model(x, t, y)
    model.bfloat16()
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {name for name in model.state_dict() if "freqs" in name} | {"t_embedder.W"}
    torch.testing.assert_close(model.t_embedder(t), tiny_timestep(model, t), rtol=1e-5, atol=1e-6)
    out = model(x, t, y)
    assert out.dtype == torch.bfloat16
    assert ((out.float() - expected).norm() / expected.norm()) < 0.03


def tiny_timestep(model: DiffusionTransformer, t: Tensor) -> Tensor:
    """The timestep embedding written out in float64."""
    embedder = model.t_embedder
    angle = 2 * torch.pi * t.double()[:, None] * embedder.W.double()
    h = torch.cat([angle.sin(), angle.cos()], dim=1)
    for layer in (embedder.mlp[0], nn.SiLU(), embedder.mlp[2]):
        h = layer(h) if isinstance(layer, nn.SiLU) else h @ layer.weight.double().T + layer.bias.double()
    return h.float()


def test_frequencies_that_are_trained_take_the_type_of_the_other_parameters() -> None:
    """An optimizer flattens its parameters into one tensor of one type."""
    model = tiny("DiTDH").requires_grad_(True).bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_autocast_keeps_the_trunk_s_residual_stream_in_float32() -> None:
    model = tiny("DiTDH")
    types = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch())
    assert types == [torch.float32, torch.bfloat16]


def test_labels_are_dropped_in_training_only_and_at_the_given_rate() -> None:
    model = tiny("DiTDH", class_dropout_prob=0.25)
    x, t, _ = batch()
    y, null = torch.tensor([1, 3]), torch.tensor([5, 3])
    u = torch.tensor([0.2499, 0.25])
    assert torch.equal(model.train()(x, t, y, labeldrop_u=u), model.eval()(x, t, null))
    torch.manual_seed(0)
    labels = torch.ones(4000, dtype=torch.int64)
    dropped = (model.train().y_embedder(labels) == model.y_embedder.embedding_table.weight[5]).all(1)
    assert abs(dropped.float().mean() - 0.25) < 0.03


def test_null_label_exists_where_labels_are_dropped() -> None:
    assert tiny("DiTDH").has_null_label
    assert not tiny("DiTDH", class_dropout_prob=0.0).has_null_label


def test_learned_variance_is_computed_and_left_out() -> None:
    model = tiny("LightningDiT", learn_sigma=True)
    assert model.final_layer.linear.out_features == 6
    assert model(*batch()).shape == (2, 3, 4, 4)


def test_equal_widths_need_no_projection_and_one_number_serves_both_parts() -> None:
    model = build_dit("DiTDH", {**SIZES, "hidden_size": 8, "depth": [1, 1], "num_heads": 2})
    assert not any(name.startswith("s_projector") for name in model.state_dict())


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("DiTDHX", {}, "did you mean 'DiTDH'"),
        ("DiTDH", {"hiden_size": 8}, "did you mean 'hidden_size'"),
        ("DiTDH", {"hidden_size": [8, 16, 32]}, "hidden_size"),
        ("DiTDH", {"patch_size": [1, 2], "input_size": 4}, "patch_size"),
        ("DiTDH", {"input_size": 5, "patch_size": 2}, "input_size is 5"),
        ("LightningDiT", {"hidden_size": 24, "num_heads": 4}, "head width 6"),
        ("LightningDiT", {"hidden_size": [8, 16]}, r"hidden_size is \[8, 16\]; expected one number"),
        ("LightningDiT", {"hidden_size": 24, "num_heads": 5}, "num_heads 5"),
    ],
)
def test_models_that_cannot_be_are_refused_with_the_key(target: str, params: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_dit(target, params)


@pytest.mark.parametrize("target", TINY)
def test_latents_of_another_shape_are_refused_with_both_shapes(target: str) -> None:
    x, t, y = batch(size=6)
    with pytest.raises(UserError, match=r"\[3, 6, 6\].*\[3, 4, 4\]"):
        tiny(target)(x, t, y)


def test_sizes_by_name_can_be_overridden() -> None:
    with torch.device("meta"):
        model = build_dit("DiTDH-S", {"input_size": 4, "depth": [1, 1]})
    assert len(model.blocks) == 2
    assert model.s_projector.weight.shape == (2048, 384)
