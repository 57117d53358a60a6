"""Every kernel compiles for sm_90 in its default configuration without spilling, on machines without a GPU too."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from rae_kernels import launches, resources
from rae_kernels.launches import HEAD, TRUNK_S, TRUNK_XL, Maker

KNOBS = pytest.importorskip("triton").knobs
pytestmark = pytest.mark.skipif(
    shutil.which(KNOBS.nvidia.cuobjdump.path) is None, reason="this Triton wheel holds no cuobjdump"
)


def report(made: dict[str, object]) -> dict[str, resources.Resources]:
    return {name: resources.compile_for(launch) for name, launch in made.items()}


def check(reports: dict[str, resources.Resources]) -> None:
    """Nothing spills, several programs share a multiprocessor unless they are large, products use Hopper's units."""
    for name, one in reports.items():
        assert one.spill_bytes == 0, f"{name} spills {one.spill_bytes} bytes a thread"
        assert one.count("LDL") == 0 and one.count("STL") == 0, name
        assert one.programs_per_sm * one.warps >= 8, f"{name}: {one.programs_per_sm} programs of {one.warps} warps"
        if "attention" in name:
            assert one.count("HGMMA") > 0 and one.count("HMMA") == 0, f"{name} multiplies without wgmma"
        if name == "interpolate":  # reads int8, eight values to a thread, and writes bfloat16
            assert one.count("LDG.E.64") > 0 and one.count("STG.E.128") > 0, f"{name} reads or writes piecemeal"
        elif name != "crop":
            assert one.count("LDG.E.128") + one.count("LDGSTS.E.BYPASS.128") > 0, f"{name} loads less than 16 bytes"


def test_attention_of_the_xl_trunk_fits_its_registers() -> None:
    check(report(launches.attention_launches(TRUNK_XL, Maker())))


def test_norms_of_trunk_and_head_fit_their_registers() -> None:
    check(report(launches.norm_launches(TRUNK_XL, Maker())))
    check(report({f"head {k}": v for k, v in launches.norm_launches(HEAD, Maker()).items()}))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [256, 1024])
def test_all_kernels_fit_their_registers(tokens: int) -> None:
    check(report(launches.training_launches(Maker(tokens=tokens))))


@pytest.mark.slow
@pytest.mark.parametrize("stack", [TRUNK_S, TRUNK_XL, HEAD])
def test_attention_with_norms_of_queries_and_keys_fits_its_registers(stack: launches.Stack) -> None:
    check(report(launches.attention_launches(stack, Maker(), norm=True)))


def test_a_launch_is_specialized_as_triton_itself_does_it() -> None:
    """Sixteens are hinted, an address that is no multiple of 16 bytes is not, and the cache knows the kernel again."""
    launch = swiglu_forward(torch.empty(8, 64, device="meta", dtype=torch.bfloat16))
    assert parameters(launch)["x12"] == "!tt.ptr<bf16> {tt.divisibility = 16 : i32}"
    odd = torch.empty(8 * 64 + 1, device="meta", dtype=torch.bfloat16)[1:].unflatten(0, (8, 64))
    assert parameters(swiglu_forward(odd))["x12"] == "!tt.ptr<bf16>"
    assert resources.warm(launch).hash == resources.warm(launch).hash != resources.warm(swiglu_forward(odd)).hash


def swiglu_forward(x12: torch.Tensor) -> launches.Launch:
    from rae_kernels.swiglu_triton import forward_launch

    return forward_launch(x12, {"rows": 1, "columns": 32, "warps": 1})[0]


def parameters(launch: launches.Launch) -> dict[str, str]:
    """Type and hints of each run-time argument, as Triton's first form of the kernel has them."""
    head = resources.warm(launch).asm["ttir"].split("tt.func public", 1)[1].split("attributes", 1)[0]
    return dict(re.findall(r"%(\w+): ([^%]*?) loc\(", head))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(255, 0, 4, 2), (168, 0, 4, 3), (128, 0, 4, 4), (32, 0, 4, 16), (32, 100_000, 4, 2), (32, 240_000, 4, 0)],
)
def test_programs_per_multiprocessor(registers: int, shared: int, warps: int, programs: int) -> None:
    assert resources.programs_per_sm(registers, shared, warps) == programs
