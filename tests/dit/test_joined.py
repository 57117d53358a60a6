"""One product for all of the trunk's modulations: the same model, gradients and state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rae_fast.dit import build_dit
from rae_fast.dit.joined import lie_side_by_side

SIZES = {
    "DiTDH": {"hidden_size": [16, 24], "depth": [3, 1], "num_heads": [2, 2]},
    "LightningDiT": {"hidden_size": 16, "depth": 3, "num_heads": 2},
}


@pytest.fixture(params=SIZES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = build_dit(request.param, {"input_size": 4, "in_channels": 6, "num_classes": 5, **SIZES[request.param]})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients by name."""
    generator = torch.Generator().manual_seed(0)
    out = model(torch.randn(2, 6, 4, 4, generator=generator), torch.tensor([0.2, 0.7]), torch.tensor([1, 5]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return out, dict(zip(trained, torch.autograd.grad(out.square().sum(), list(trained.values())), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_joined_weights_give_the_same_output_gradients_and_state(model: nn.Module, checkpointing: bool) -> None:
    model.activation_checkpointing = checkpointing
    out, gradients = run(model)
    state = copy.deepcopy(model.state_dict())
    model.join_modulations()
    joined_out, joined_gradients = run(model)
    assert model.joined, "one product was taken"
    torch.testing.assert_close(joined_out, out, rtol=1e-5, atol=1e-6)
    assert joined_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(joined_gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_loading_keeps_weights_joined_and_moving_them_ends_it(model: nn.Module) -> None:
    state = {name: value + 0.01 for name, value in copy.deepcopy(model.state_dict()).items()}
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    model.join_modulations()
    model.load_state_dict(state)
    torch.testing.assert_close(run(model)[0], run(other)[0], rtol=1e-5, atol=1e-6)
    assert model.joined
    copied = copy.deepcopy(model)
    torch.testing.assert_close(run(copied)[0], run(other)[0], rtol=1e-5, atol=1e-6)
    moved = model.blocks[1].adaLN_modulation[1].weight
    moved.data = moved.data.clone()
    torch.testing.assert_close(run(model)[0], run(other)[0], rtol=1e-5, atol=1e-6)
    assert not model.joined
    assert not model.double().joined, "on a CPU nothing is gained"


def test_an_optimizer_step_on_joined_weights_is_that_on_separate_ones(model: nn.Module) -> None:
    plain = copy.deepcopy(model)
    model.join_modulations()
    for one in (plain, model):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for name, gradient in run(one)[1].items():
            one.get_parameter(name).grad = gradient
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_neighbours_in_one_piece_of_memory_lie_side_by_side() -> None:
    whole = torch.zeros(6, 4)
    assert lie_side_by_side(whole.split(2))
    assert not lie_side_by_side([whole[2:4], whole[:2]])
    assert not lie_side_by_side([whole[:2], torch.zeros(2, 4)])
    assert not lie_side_by_side([whole[:, :2], whole[:, 2:]])
    assert not lie_side_by_side([torch.empty(0), torch.empty(0)])


@pytest.mark.gpu
def test_moving_to_a_gpu_joins(model: nn.Module) -> None:
    out, _ = run(model)
    model.cuda()
    assert model.joined
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).cuda()
    ours = model(x, torch.tensor([0.2, 0.7]).cuda(), torch.tensor([1, 5]).cuda())
    assert model.joined
    torch.testing.assert_close(ours.cpu(), out, rtol=1e-3, atol=1e-4)
