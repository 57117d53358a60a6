from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rae_fast.config import Optimizer
from rae_fast.dit.ditdh import DiTDH
from rae_fast.errors import UserError
from rae_fast.training.deepspeed_setup import read_deepspeed_config
from rae_fast.training.engine import compile_blocks

from .conftest import batches, regression, train_step

KINDS = ("ddp", "zero-0", "zero-1", "zero-2", "zero-3")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


def plain_training(steps: int, x: torch.Tensor, y: torch.Tensor, clip: float, decay: float) -> tuple[dict, dict]:
    """Weights and EMA as a plain loop of torch functions makes them."""
    module = regression()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    average = {n: p.detach().clone() for n, p in module.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        (module(x[step]) - y[step]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        for name, parameter in module.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    return module.state_dict(), {**module.state_dict(), **average}


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_trains_as_a_plain_loop_with_clipping_decay_and_ema(kind, make_engine):
    x, y = batches(6, 16)
    weights, average = plain_training(6, x, y, clip=0.5, decay=0.9)
    engine = make_engine(kind, optimizer=Optimizer(weight_decay=0.1), clip_grad=0.5, ema_decays=[0.9], accumulation=2)
    for step in range(6):
        train_step(engine, x[step], y[step])
    assert same(engine.weights(), weights, 2e-6)
    assert same(engine.ema_weights(0.9), average, 2e-6)


@pytest.mark.parametrize("kind", ["ddp", "zero-1"])
def test_accumulation_is_the_large_batch(kind, make_engine):
    x, y = batches(20, 8)
    found = []
    for accumulation in (1, 2, 4):
        engine = make_engine(kind, accumulation=accumulation, clip_grad=1.0)
        for step in range(20):
            train_step(engine, x[step], y[step])
        assert engine.steps == 20, "steps are optimizer steps, whatever the accumulation"
        found.append(engine.weights())
    assert same(found[0], found[1], 2e-6)
    assert same(found[0], found[2], 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_the_large_batch(kind, make_engine):
    x, y = batches(1, 8)
    found = []
    for accumulation in (1, 2, 4):
        engine = make_engine(kind, accumulation=accumulation)
        guard = engine._guard_and_clip

        def look(engine=engine, guard=guard) -> None:
            # Before the step, which frees them.
            found.append(torch.cat([g.flatten().clone() for g in engine.shards.gradients()]))
            guard()

        engine._guard_and_clip = look
        train_step(engine, x[0], y[0])
    assert len(found) == 3
    assert found[0].abs().max() > 0.01
    assert all(torch.allclose(found[0], other, rtol=0, atol=1e-6) for other in found[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(kind, poison, make_engine):
    x, y = batches(3, 8)
    engine = make_engine(kind, clip_grad=1.0, ema_decays=[0.5], accumulation=2)
    train_step(engine, x[0], y[0])
    before = {k: [t.clone() for t in ts] for k, ts in engine.flat_state().items()}
    counters = engine.scalar_state()["optimizer_steps"]
    bad = x[1].clone()
    bad[0, 0] = float("nan") if poison == "loss" else 1e38  # 1e38: finite forward, infinite squared error
    train_step(engine, bad, y[1])
    assert engine.record[2] == 1
    for kind_of_state, tensors in engine.flat_state().items():
        for now, then in zip(tensors, before[kind_of_state], strict=True):
            assert torch.equal(now, then), kind_of_state
    assert engine.scalar_state() == {"steps": 2, "optimizer_steps": counters}
    train_step(engine, x[2], y[2])
    assert engine.record[2] == 0
    assert not torch.equal(engine.flat_state()["master"][0], before["master"][0])


class ForbidHostReads(TorchDispatchMode):
    """Fails where a value goes from the device to Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["ddp", "zero-0", "zero-1", "zero-2"])
def test_a_step_reads_nothing_on_the_host(kind, make_engine):
    x, y = batches(3, 8)
    engine = make_engine(kind, clip_grad=1.0, ema_decays=[0.9, "power_0.1"], accumulation=2)
    train_step(engine, x[0], y[0])
    with ForbidHostReads():
        train_step(engine, x[1], y[1])
        engine.observe(torch.ones(2))
        train_step(engine, x[2], y[2])


def test_observed_figures_are_summed_over_the_micro_steps_of_one_step(make_engine):
    x, _ = batches(2, 8)
    engine = make_engine(accumulation=2)
    for step in range(2):
        for half in (x[step, :4], x[step, 4:]):
            engine.observe(torch.tensor([1.0, step]))
            engine.backward(engine(half).mean())
            engine.step()
        assert engine.record[4:].tolist() == [2.0, 2.0 * step]


@pytest.mark.parametrize("kind", ["ddp", "zero-1", "zero-3"])
def test_ema_module_has_ema_weights_and_leaves_the_online_module_alone(kind, make_engine):
    x, y = batches(4, 8)
    engine = make_engine(kind, ema_decays=[0.9, 0.5])
    for step in range(3):
        train_step(engine, x[step], y[step])
    online = engine.weights()
    with engine.ema_applied(0.5) as module:
        assert not module.training
        found = module(x[0])
        reference = regression()
        reference.load_state_dict(engine.ema_weights(0.5))
        assert torch.allclose(found, reference(x[0]), atol=1e-6)
        online_module = regression()
        online_module.load_state_dict(online)
        assert not torch.allclose(found, online_module(x[0]), atol=1e-4)
        kept = {n: p.clone() for n, p in module.named_parameters()}
        train_step(engine, x[3], y[3])
        assert all(torch.equal(p, kept[n]) for n, p in module.named_parameters()), "later training must not reach it"
    assert not same(engine.weights(), online, 0)


class Stack(torch.nn.Module):
    """Blocks in a list, as what is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


@pytest.mark.slow
def test_compiled_module_is_evaluated_with_ema_weights(make_engine):
    x, y = batches(3, 8)
    engine = make_engine(module=Stack(), compile=True, lr=lambda step: 0.1, ema_decays=[0.9])
    for step in range(3):
        engine.backward((engine(x[step])[:, :5] - y[step]).square().mean())
        engine.step()
    reference = Stack()
    reference.load_state_dict(engine.ema_weights())
    with engine.ema_applied() as found:
        assert torch.allclose(found(x[0]), reference(x[0]), atol=1e-6)
        assert not torch.allclose(found(x[0]), engine.module(x[0]), atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_and_last_layer_of_a_dit_compute_the_same():
    model = DiTDH(input_size=4, in_channels=8, hidden_size=[16, 32], depth=[2, 1], num_heads=[2, 2], num_classes=3)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    found = copy.deepcopy(model)
    compile_blocks(found)
    compiled = [name for name, part in found.named_modules() if part._compiled_call_impl is not None]
    assert compiled == ["final_layer", "blocks.0", "blocks.1", "blocks.2"]
    x, t, y = torch.randn(4, 8, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 3])
    outputs = [each(x, t, y, labeldrop_u=torch.ones(4)) for each in (model, found)]
    assert torch.allclose(*outputs, atol=1e-5, rtol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    for one, other in zip(model.parameters(), found.parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_bf16_keeps_float32_parameters_and_computes_in_bfloat16(make_engine):
    x, y = batches(1, 8)
    engine = make_engine(precision="bf16")
    assert engine(x[0]).dtype == torch.bfloat16
    train_step(engine, x[0], y[0])
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_parameters_have_float32_masters(stage, make_engine):
    x, y = batches(30, 8)
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    engine = make_engine("zero", precision="bf16", deepspeed=config, lr=lambda step: 1e-5, ema_decays=[0.9])
    start = engine.weights()
    for step in range(30):
        train_step(engine, x[step], y[step])
    assert {p.dtype for p in engine.module.parameters() if p.requires_grad} == {torch.bfloat16}
    # 30 updates of 1e-5 on weights around 0.3 are below bfloat16's resolution: only masters keep them.
    moved = (engine.weights()["first.weight"] - start["first.weight"]).abs()
    assert moved.max() > 5e-5


def test_norms_and_biases_can_be_left_undecayed(make_engine):
    x, _ = batches(1, 8)
    for spare in (True, False):
        engine = make_engine(
            "zero-1", optimizer=Optimizer(lr=1e-2, weight_decay=10.0, decay_norms_and_biases=not spare)
        )
        start = engine.weights()
        engine.backward(engine(x[0]).sum() * 0)
        engine.step()
        end = engine.weights()
        changed = {name for name in start if not torch.equal(start[name], end[name])}
        assert {"first.weight", "last.weight"} <= changed
        assert ("norm.weight" in changed) == (not spare)
        assert "scale" not in changed, "frozen parameters are never decayed"


def test_two_engines_in_one_process_train_apart(make_engine):
    x, y = batches(3, 8)
    alone = make_engine("zero-1", regression(0))
    for step in range(3):
        train_step(alone, x[step], y[step])
    first, second = make_engine("zero-1", regression(0)), make_engine("zero-1", regression(7))
    for step in range(3):
        train_step(first, x[step], y[step])
        train_step(second, y[step] @ torch.ones(5, 7), y[step])
    assert same(first.weights(), alone.weights(), 0)


def test_module_without_trainable_parameters_is_refused(make_engine):
    with pytest.raises(UserError, match="no trainable parameter"):
        make_engine(module=regression().requires_grad_(False))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'"),
        ({"gradient_clipping": 1.0}, "training.clip_grad"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "no offload"),
        ({"bf16": {"enabled": True}}, "ZeRO stage 0"),
        (
            {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 1},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "stage 2",
        ),
        ("no/such/file.json", "does not exist"),
        ([1], "a mapping"),
    ],
)
def test_deepspeed_section_that_would_be_disobeyed_is_refused(section, message):
    with pytest.raises(UserError, match=message):
        read_deepspeed_config(section)


def test_bf16_parameters_in_an_fp32_run_are_refused(make_engine):
    with pytest.raises(UserError, match=r"runtime\.precision=fp32"):
        make_engine("zero", deepspeed={"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}})


def test_deepspeed_section_defaults_to_stage_1():
    assert read_deepspeed_config(None) == {"zero_optimization": {"stage": 1}}
