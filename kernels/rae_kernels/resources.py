"""What a kernel takes of a GPU: registers, spills, shared memory, occupancy and instructions, with no GPU at hand.

Triton's wheel holds ptxas and cuobjdump, and its compiler takes a target that the machine does not have: so a launch on
meta tensors compiles for sm_90 anywhere. Many processes can so compile at once what one will start.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae_kernels.launch import Launch

# Limits of one multiprocessor, compute capability 9.0 (CUDA programming guide, table of technical specifications).
SM90_REGISTERS, SM90_THREADS, SM90_BLOCKS = 65536, 2048, 32
SM90_SHARED_BYTES, SM90_SHARED_PER_BLOCK, SM90_RESERVED_SHARED = 228 * 1024, 227 * 1024, 1024
REGISTER_UNIT = 256  # registers are handed to a warp in portions of this many
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: per thread.
        spill_bytes: stack of a thread, which holds spilled registers.
        shared_bytes: dynamic and static shared memory of a program.
        programs_per_sm: how many programs fit one multiprocessor at once.
        warps: warps of a program.
        instructions: count of SASS instructions by name with their modifiers, such as "LDG.E.128".
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    programs_per_sm: int
    warps: int
    instructions: dict[str, int] = field(default_factory=dict)

    def count(self, prefix: str) -> int:
        """Instructions whose name starts with `prefix`."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))


def compile_for(launch: Launch, capability: int = 90) -> Resources:
    """Compile a launch for a CUDA GPU that need not be there.

    Args:
        launch: on meta (or any) tensors; their types and the sizes decide the specialization, as in a real start.
        capability: compute capability times ten.

    Raises:
        RuntimeError: Triton is not installed or runs as interpreter, or a tool of its wheel fails.
    """
    compiled = warm(launch, capability)
    return _inspect(compiled.asm["cubin"], compiled.metadata.shared, launch.num_warps)


def warm(launch: Launch, capability: int = 90) -> Any:
    """Compile a launch into Triton's cache on disk, where a process that starts it finds it; gives what Triton made.

    Arguments as in `compile_for`, which see. Triton itself derives types and hints from the arguments, as in a start.
    """
    import triton

    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    with _target(capability):
        return launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)


@dataclass(frozen=True)
class _AbsentGPU:
    """What Triton asks of a driver before it starts anything."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        # Compiled kernels are kept by device: these must not pass for those of GPU 0.
        return f"absent sm_{self.target.arch}"

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextmanager
def _target(capability: int) -> Iterator[None]:
    """Let Triton compile for this target in place of the machine's."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    # Not `active`, which looks for a GPU and raises if there is none.
    before = driver._active
    driver.set_active(_AbsentGPU(GPUTarget("cuda", capability, 32)))
    try:
        yield
    finally:
        driver.set_active(before)


def _inspect(cubin: bytes, shared_bytes: int, warps: int) -> Resources:
    """Read a compiled kernel's own account of itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    registers, shared = found["REG"], shared_bytes + found["SHARED"]
    return Resources(
        registers=registers,
        spill_bytes=found["STACK"] + found["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs_per_sm(registers, shared, warps),
        warps=warps,
        instructions=dict(Counter(INSTRUCTION.findall(sass))),
    )


def programs_per_sm(registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs fit an sm_90 multiprocessor by registers, shared memory, threads and the limit on blocks."""
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    if shared_bytes > SM90_SHARED_PER_BLOCK:
        return 0
    by_shared = SM90_SHARED_BYTES // (shared_bytes + SM90_RESERVED_SHARED)
    return min(SM90_REGISTERS // (of_warp * warps), SM90_THREADS // (32 * warps), SM90_BLOCKS, by_shared)


def _cuobjdump(option: str, path: Path) -> str:
    """Output of the cuobjdump that comes with Triton."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, option, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {option}: {done.stderr.strip()}")
    return done.stdout
