"""How fast GPUs and their links are: the numbers and the assumptions of the roofline. Imports no torch.

Nothing here was measured: peaks are NVIDIA's, the shares of them that a run reaches are assumptions. Times made of them rank
layouts, and are not compared with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.rehearsal.machine import GpuName

GPUS_PER_NODE = 8

# Shares of the peaks, and the least time of an operation on a GPU.
MATRIX_SHARE = 0.7
MEMORY_SHARE = 0.8
LINK_SHARE = 0.75
OPERATION_SECONDS = 3e-6

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Peaks of a GPU in its usual machine."""

    matrix: float  # FLOP/s of bf16 matrix products, without sparsity
    matrix_fp8: float  # the same in FP8; where the GPU has none, of bf16
    memory: float  # bytes/s
    link: float  # bytes/s to the other GPUs of the node, in each direction
    network: float  # bytes/s to other nodes, in each direction, of each GPU's own adapter
    source: str

    def lines(self, gpus_per_node: int) -> list[str]:
        """What a time is made of, a line each with its source."""
        return [
            f"matrix products {MATRIX_SHARE:.0%} of {self.matrix / _TERA:,.0f} TFLOP/s in bf16, "
            f"{self.matrix_fp8 / _TERA:,.0f} in FP8, and memory {MEMORY_SHARE:.0%} of {self.memory / _GIGA:,.0f} GB/s "
            f"({self.source}; the shares are assumed)",
            f"an operation takes the longer of its products and its bytes, and at least {OPERATION_SECONDS * 1e6:.0f} us "
            "(assumed); operations, their sizes and all communication are those of the rehearsal",
            f"links {LINK_SHARE:.0%} (assumed) of {self.link / _GIGA:,.0f} GB/s within a node of {gpus_per_node} GPUs, "
            f"{self.network / _GIGA:,.0f} GB/s for each GPU between nodes ({self.source})",
            "tensor, context, expert and pipeline communication waits for nothing else and is waited for (Baton's schedule)",
            "pipeline bubble: (stages - 1) / virtual stages micro batches of the slowest stage (arXiv:2104.04473, 2.2)",
            "gradients and weights of data parallelism hide behind the backward pass of the last micro batch and the forward "
            "pass of the first, with --overlap",
            "experts get equal numbers of tokens (assumed)",
        ]


_DGX_A100 = "NVIDIA's data sheets of the A100 and of DGX A100: 8 x 200 Gb/s"
_DGX_H100 = "NVIDIA's data sheets of the {} and of DGX {}: 8 x 400 Gb/s"

SPEEDS: dict[GpuName, Speed] = {
    "a100-40": Speed(matrix=312e12, matrix_fp8=312e12, memory=1555e9, link=300e9, network=25e9, source=_DGX_A100),
    "a100-80": Speed(matrix=312e12, matrix_fp8=312e12, memory=2039e9, link=300e9, network=25e9, source=_DGX_A100),
    "l40s": Speed(
        matrix=362e12,
        matrix_fp8=733e12,
        memory=864e9,
        link=32e9,
        network=25e9,
        source="NVIDIA's data sheet of the L40S: PCIe 4 x16; a 200 Gb/s adapter for each GPU is assumed",
    ),
    "h100-80": Speed(
        matrix=989e12,
        matrix_fp8=1979e12,
        memory=3350e9,
        link=450e9,
        network=50e9,
        source=_DGX_H100.format("H100 SXM", "H100"),
    ),
    "h200": Speed(
        matrix=989e12,
        matrix_fp8=1979e12,
        memory=4800e9,
        link=450e9,
        network=50e9,
        source=_DGX_H100.format("H200 SXM", "H200"),
    ),
    "b200": Speed(
        matrix=2250e12,
        matrix_fp8=4500e12,
        memory=8000e9,
        link=900e9,
        network=50e9,
        source=_DGX_H100.format("B200", "B200"),
    ),
}
