"""What devices can do at most: operations a second in dense products."""

import re
from typing import NamedTuple

from jax.sharding import Mesh

CORE = 2e10  # operations a second that a processor's core was measured to do (benchmarks/results/full_size.md)


class Peak(NamedTuple):
    """Operations a second of one device, in 1e12, of dense products with float32 sums.

    Attributes:
        half: with float16, and with bfloat16 unless said.
        tf32: with tf32; where a device has none, with float32.
        float32: with float32.
        source: that states them.
        bfloat16: False where the device has none: XLA then computes with float32.
    """

    half: float
    tf32: float
    float32: float
    source: str
    bfloat16: bool = True


def _tpu(half: float) -> Peak:
    """A product of float32 numbers is six of bfloat16, one of tf32 three."""
    return Peak(half, half / 3, half / 6, "cloud.google.com/tpu/docs")


# What JAX calls a device → its peak as its maker states it, without sparsity, which doubles most figures that are
# advertised, and with float32 sums, which halve a GeForce's. A TPU's chip is one device; a B200 is an eighth of an HGX
# board. A part of a GPU (MIG) is not listed, nor are cards that share a name but for a letter (A10G, RTX 3090 Ti).
_PEAKS: dict[str, Peak] = {
    r"TPU v4": _tpu(275.0),
    r"TPU v5e|TPU v5 lite": _tpu(197.0),
    r"TPU v5p?": _tpu(459.0),
    r"TPU v6e|TPU v6 lite": _tpu(918.0),
    r"Tesla T4": Peak(65.0, 8.1, 8.1, "NVIDIA's T4 data sheet", bfloat16=False),
    r"NVIDIA A100(-SXM4-\d\dGB|-PCIE-40GB| 80GB PCIe)": Peak(312.0, 156.0, 19.5, "NVIDIA's A100 data sheet"),
    r"NVIDIA A10": Peak(125.0, 62.5, 31.2, "NVIDIA's A10 data sheet"),
    r"NVIDIA L4": Peak(121.0, 60.0, 30.3, "NVIDIA's L4 data sheet"),
    r"NVIDIA L40S": Peak(362.05, 183.0, 91.6, "NVIDIA's L40S data sheet"),
    r"NVIDIA GeForce RTX 3090": Peak(71.0, 35.6, 35.6, "NVIDIA's whitepaper of GA102"),
    r"NVIDIA GeForce RTX 4090": Peak(165.2, 82.6, 82.6, "NVIDIA's whitepaper of Ada"),
    r"NVIDIA GeForce RTX 5090": Peak(209.5, 104.8, 104.8, "NVIDIA's whitepaper of RTX Blackwell"),
    r"NVIDIA H100 80GB HBM3": Peak(989.0, 494.5, 67.0, "NVIDIA's H100 data sheet"),
    r"NVIDIA H200( 141GB HBM3e)?": Peak(989.0, 494.5, 67.0, "NVIDIA's H200 data sheet"),
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": Peak(835.5, 417.5, 60.0, "NVIDIA's H100 and H200 data sheets"),
    r"NVIDIA H100 PCIe": Peak(756.0, 378.0, 51.0, "NVIDIA's H100 data sheet"),
    r"NVIDIA B200": Peak(2250.0, 1125.0, 75.0, "NVIDIA's page of HGX"),
}


def known_peak(device_kind: str) -> Peak | None:
    """The peak of a device; None where it is not known.

    Args:
        device_kind: what JAX calls it.
    """
    return next((found for pattern, found in _PEAKS.items() if re.fullmatch(pattern, device_kind)), None)


def peak(device_kind: str, dtype: str) -> float | None:
    """Operations a second of a device; None where it is not known.

    Args:
        device_kind: what JAX calls it.
        dtype: as `model.dtype`.
    """
    found = known_peak(device_kind)
    if found is None:
        return None
    bfloat16 = found.half if found.bfloat16 else found.float32
    return 1e12 * {"tf32": found.tf32, "float32": found.float32, "bfloat16": bfloat16}.get(dtype, found.half)


def mesh_peak(mesh: Mesh, dtype: str) -> float | None:
    """The sum of :func:`peak` over the devices of a mesh; None where one is not known."""
    peaks = [peak(device.device_kind, dtype) for device in mesh.devices.flat]
    known = [value for value in peaks if value is not None]
    return sum(known) if len(known) == len(peaks) else None
