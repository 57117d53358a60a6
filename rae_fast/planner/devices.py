"""What GPUs can do, for machines that one does not have yet: data sheets, and how much of them is reached."""

from __future__ import annotations

from dataclasses import dataclass

from rae_fast.errors import UserError, nearest

# Measured on an H200 (research/kernels.md, section 1): 788 of 989 TFLOP/s in an 8192^3 bfloat16 product on random data,
# 4.3 of 4.8 TB/s in a copy. Other devices are taken to reach the same shares.
MATRIX_SHARE = 788 / 989
COPY_SHARE = 4.3 / 4.8
LINK_SHARE = 0.8  # of a link's rate in one direction that a ring reaches with large messages (computed, not measured)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as people call it.
        memory_gb: 1e9 bytes.
        sheet_tflops: dense bfloat16 products, of the data sheet.
        sheet_tbs: memory bandwidth, of the data sheet.
        link_gbs: to the other GPUs of its node, one direction.
        source: where the figures come from.
    """

    name: str
    memory_gb: float
    sheet_tflops: float
    sheet_tbs: float
    link_gbs: float
    source: str

    @property
    def memory_bytes(self) -> float:
        """Bytes."""
        return self.memory_gb * 1e9

    @property
    def tflops(self) -> float:
        """Products that can be reached."""
        return self.sheet_tflops * MATRIX_SHARE

    @property
    def tbs(self) -> float:
        """Bandwidth that can be reached."""
        return self.sheet_tbs * COPY_SHARE


GPUS = {
    "b200": Gpu("B200 SXM", 180, 2250, 8.0, 900, "NVIDIA DGX B200 data sheet, per GPU, dense"),
    "h200": Gpu("H200 SXM", 141, 989, 4.8, 450, "NVIDIA H200 data sheet, SXM, dense"),
    "h100": Gpu("H100 SXM", 80, 989, 3.35, 450, "NVIDIA H100 data sheet, SXM5, dense"),
    "h100-pcie": Gpu("H100 PCIe", 80, 756, 2.0, 64, "NVIDIA H100 data sheet, PCIe 5.0 x16 without a bridge, dense"),
    "a100": Gpu("A100 80GB SXM", 80, 312, 2.039, 300, "NVIDIA A100 data sheet, SXM4 80 GB, dense"),
    "l40s": Gpu("L40S", 48, 362, 0.864, 32, "NVIDIA L40S data sheet, PCIe 4.0 x16, dense"),
    "rtx4090": Gpu("RTX 4090", 24, 165, 1.008, 32, "NVIDIA Ada architecture white paper, float32 sums, dense"),
    "rtx3090": Gpu("RTX 3090", 24, 71, 0.936, 32, "NVIDIA GA102 white paper, float32 sums, dense"),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UserError: it is not in the table.
    """
    key = name.casefold().replace(" ", "")
    if key not in GPUS:
        raise UserError(f"--gpu {name}{nearest(key, GPUS)}", f"one of {', '.join(GPUS)}")
    return GPUS[key]
