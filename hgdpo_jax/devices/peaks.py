"""What devices can do at most: operations a second in dense products."""

import re
from typing import NamedTuple

from jax.sharding import Mesh

CORE = 2e10  # operations a second that a processor's core was measured to do (benchmarks/results/full_size.md)


class Peak(NamedTuple):
    """Operations a second of one device, in 1e12: with float16 or bfloat16, with tf32, with float32."""

    half: float
    tf32: float
    float32: float


def _tpu(half: float) -> Peak:
    """A product of float32 numbers is six of bfloat16, one of tf32 three."""
    return Peak(half, half / 3, half / 6)


# What JAX calls a device → its peak without sparsity, as its maker states it. TPU: cloud.google.com/tpu/docs/v4, v5e,
# v5p and v6e (a chip is one device). GPU: the data sheets of A100, H100 and H200, and the page of HGX for the B200 (an
# eighth of a board). A part of a GPU (MIG) is not listed.
_PEAKS: dict[str, Peak] = {
    r"TPU v4": _tpu(275.0),
    r"TPU v5e|TPU v5 lite": _tpu(197.0),
    r"TPU v5p?": _tpu(459.0),
    r"TPU v6e|TPU v6 lite": _tpu(918.0),
    r"NVIDIA A100(-SXM4-\d\dGB|-PCIE-40GB| 80GB PCIe)": Peak(312.0, 156.0, 19.5),
    r"NVIDIA H100 80GB HBM3|NVIDIA H200( 141GB HBM3e)?": Peak(989.0, 494.5, 67.0),
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": Peak(835.5, 417.5, 60.0),
    r"NVIDIA H100 PCIe": Peak(756.0, 378.0, 51.0),
    r"NVIDIA B200": Peak(2250.0, 1125.0, 75.0),
}


def peak(device_kind: str, dtype: str) -> float | None:
    """Operations a second of a device; None where it is not known.

    Args:
        device_kind: what JAX calls it.
        dtype: as `model.dtype`.
    """
    for pattern, known in _PEAKS.items():
        if re.fullmatch(pattern, device_kind):
            return 1e12 * {"tf32": known.tf32, "float32": known.float32}.get(dtype, known.half)
    return None


def mesh_peak(mesh: Mesh, dtype: str) -> float | None:
    """The sum of :func:`peak` over the devices of a mesh; None where one is not known."""
    peaks = [peak(device.device_kind, dtype) for device in mesh.devices.flat]
    known = [value for value in peaks if value is not None]
    return sum(known) if len(known) == len(peaks) else None
