"""What a kernel takes of a GPU: registers, spills, shared memory, occupancy and instructions, with no GPU at hand.

Triton's wheel holds ptxas and cuobjdump, and its compiler takes a target that the machine does not have: so a launch on
meta tensors compiles for sm_90 anywhere.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_kernels.launch import DIVISIBILITY, Launch

# Limits of one multiprocessor, compute capability 9.0 (CUDA programming guide, table of technical specifications).
SM90_REGISTERS, SM90_THREADS, SM90_BLOCKS = 65536, 2048, 32
SM90_SHARED_BYTES, SM90_SHARED_PER_BLOCK, SM90_RESERVED_SHARED = 228 * 1024, 227 * 1024, 1024
REGISTER_UNIT = 256  # registers are handed to a warp in portions of this many
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
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
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    signature, constants, attributes = _specialize(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return _inspect(compiled.asm["cubin"], compiled.metadata.shared, launch.num_warps)


def _specialize(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """(signature, constants, attributes) as Triton derives them from a call: ones become constants, 16s are hinted."""
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
            continue
        value = launch.arguments[name]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            # Allocations are aligned; a view is if its offset is.
            if value.storage_offset() * value.element_size() % DIVISIBILITY == 0:
                attributes[(position,)] = [["tt.divisibility", DIVISIBILITY]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % DIVISIBILITY == 0:
                attributes[(position,)] = [["tt.divisibility", DIVISIBILITY]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


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
