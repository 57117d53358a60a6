from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rae_fast.config_file import load_config
from rae_fast.dit.registry import build_dit
from rae_fast.geometry import dit_params, resolve_geometry
from rae_fast.provenance import read_json
from rae_fast.runtime import Ranks
from rae_fast.training.batching import plan_batches
from rae_fast.training.deepspeed_setup import read_deepspeed_config
from rae_fast.training.memory import plan_memory
from rae_fast.training.schedule import build_schedule
from rae_fast.transport.objective import Transport

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "stage2/training").glob("*.yaml"))
# Device the recipe's head names: GPUs, bytes of each.
HARDWARE = {"8 x H200 or H100": (8, 80), "one GPU with 24 GB": (1, 24), "one GPU with 80 GB": (1, 80)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_its_command_and_fits_together(path):
    head = path.read_text().split("stage_1:")[0]
    assert f"#   deepspeed tools/train_dit.py --config configs/stage2/training/{path.name}" in head
    assert "# Hours: " in head
    assert "# Expected: " in head
    hardware = head.split("# Hardware: ")[1].splitlines()[0]
    config = load_config(path)
    geometry = resolve_geometry(config)
    gpus, gigabytes = HARDWARE[hardware]
    batches = plan_batches(config.training, Ranks(world=gpus))
    with torch.device("meta"):
        model = build_dit(config.stage_2.target, {"num_classes": 1000, **dit_params(config, geometry)})
    plan = plan_memory(
        model,
        micro_batch=batches.micro_batch,
        world=gpus,
        zero_stage=0 if config.runtime.engine == "ddp" else 1,
        checkpointing=config.runtime.activation_checkpointing,
    )
    # Compiled blocks keep about half of what the estimate for eager blocks says.
    compiled = plan.state_bytes + plan.activation_bytes * (0.5 if config.runtime.compile else 1)
    assert compiled < gigabytes * 1e9
    assert Transport.from_config(config, geometry.latent_shape).shift == pytest.approx(geometry.shift)
    schedule = build_schedule(
        config.training.scheduler, lr=config.training.optimizer.lr, steps_per_epoch=1251, total_steps=60_000
    )
    assert 0 < schedule(10_000_000) <= schedule(2000) == config.training.optimizer.lr


def test_reference_recipe_has_the_references_numbers():
    config = load_config(CONFIGS / "stage2/training/DiTDH-XL_DINOv2-B_256.yaml")
    schedule = build_schedule(config.training.scheduler, lr=config.training.optimizer.lr, steps_per_epoch=1251)
    assert schedule(40 * 1251) == 2e-4
    assert schedule(420 * 1251) == pytest.approx(1.1e-4)
    assert schedule(800 * 1251) == 2e-5
    assert resolve_geometry(config).shift == pytest.approx(6.9282, abs=1e-4)


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_configs_are_accepted(path):
    assert read_deepspeed_config(str(path)) == read_json(path)


def test_recipes_that_promise_the_released_statistics_take_them() -> None:
    promising = [p for p in CONFIGS.glob("stage2/training/*.yaml") if "released statistics" in p.read_text()]
    assert len(promising) == 4
    for path in [*promising, CONFIGS / "stage2/training/finetune_DiTDH-XL_DINOv2-B_256.yaml"]:
        assert load_config(path).cache.statistics == "given", path.name
