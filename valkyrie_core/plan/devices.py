"""Devices by name: what their makers publish. Estimates, nothing of it measured here.

| device | dense bf16 | memory | bandwidth | source |
|---|---|---|---|---|
| RTX 4090 | 165.2 TFLOP/s, fp32 accumulation | 24 GB | 1008 GB/s | NVIDIA Ada GPU Architecture white paper, appendix A |
| A100 80GB SXM | 312 TFLOP/s | 80 GB | 2039 GB/s | NVIDIA A100 Tensor Core GPU data sheet |
| H100 SXM | 989.4 TFLOP/s | 80 GB | 3350 GB/s | NVIDIA H100 Tensor Core GPU data sheet |

Data sheets of the H100 print the rate with sparsity, twice the dense one.
"""  # noqa: E501

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """What bounds the speed of a model, and what it must fit into."""

    name: str
    flops_per_second: float
    """In dense matrix products."""
    bytes_per_second: float
    """Of main memory."""
    memory: int | None
    """Bytes; None where nobody tells."""


PUBLISHED = (
    Device("RTX 4090", 165.2e12, 1008e9, 24 * 10**9),
    Device("A100 80GB", 312e12, 2039e9, 80 * 10**9),
    Device("H100 SXM", 989.4e12, 3350e9, 80 * 10**9),
)
ASSUMED_MFU = 0.4
"""Of published peaks: what well-tuned trainings of dense models are reported to reach on one
device, such as 0.4 to 0.5 by PaLM's authors (Chowdhery et al. 2022, arXiv 2204.02311). An
assumption, no promise."""
ASSUMED_START = 5e-6
"""Seconds to start an operation on a GPU, one kernel each, nothing compiled. An assumption."""
