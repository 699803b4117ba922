"""What one device of each kind can do, and how XLA is told of it without having it."""

from dataclasses import dataclass, field
from typing import Any

from hgdpo_jax.devices.peaks import known_peak, peak

_MIB, _GIB = 2**20, 2**30
DTYPES = ("float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Chip:
    """What one device can do.

    Attributes:
        kind: what JAX calls it.
        platform: of JAX.
        memory: bytes that a program may fill.
        peak: operations a second, by `model.dtype`.
        bandwidth: bytes a second of its memory; 0 where that is not known.
        interconnect: bytes a second that it sends to the others of its slice or host, all links together; 0 likewise.
        between_hosts: bytes a second that a GPU sends to another host; 0 where only one host is known.
        source: of these numbers.
        on_chip: bytes of arrays that a TPU keeps between operations instead of in its memory: as much as makes
            estimates agree with what its compiler does (docs/plan.md).
        gpu: what XLA wants to know of a GPU beside them.
    """

    kind: str
    platform: str
    memory: float
    peak: dict[str, float]
    bandwidth: float
    interconnect: float
    between_hosts: float
    source: str
    on_chip: float = 0.0
    gpu: dict[str, Any] = field(default_factory=dict)

    @property
    def has_bfloat16(self) -> bool:
        """False where XLA computes in float32 what should be bfloat16."""
        found = known_peak(self.kind)
        return found is None or found.bfloat16

    @property
    def target_config(self) -> str:
        """XLA's GpuTargetConfigProto of a GPU; what is not filled in is the same for all of these."""
        return _GPU.format(**self.gpu, kind=self.kind, bandwidth=self.bandwidth, memory=self.memory)


_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {of_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""


def _peaks(kind: str) -> tuple[dict[str, float], str]:
    """Peaks by `model.dtype`, and their source."""
    found = known_peak(kind)
    assert found
    return {dtype: peak(kind, dtype) or 0.0 for dtype in DTYPES}, found.source


def _tpu(kind: str, memory: float, bandwidth: float, interconnect: float, on_chip: float) -> Chip:
    peaks, source = _peaks(kind)
    source += "; memory: what libtpu lets a program fill"
    return Chip(kind, "tpu", memory * _GIB, peaks, bandwidth, interconnect, 0.0, source, on_chip * _MIB)


def _gpu(kind: str, memory: tuple[int, str], bandwidth: float, links: tuple[float, float], **gpu: Any) -> Chip:
    """A GPU.

    Args:
        kind: see :class:`Chip`.
        memory: bytes, and their source.
        bandwidth: see :class:`Chip`; from the source of the peak.
        links: `interconnect` and `between_hosts`.
        **gpu: architecture, multiprocessors (`cores`), bytes of its cache, and GHz.
    """
    peaks, source = _peaks(kind)
    source += f", dense; memory: {memory[1]}"
    return Chip(kind, "cuda", memory[0], peaks, bandwidth, *links, source, gpu=gpu)


def _stated(memory: int) -> tuple[int, str]:
    return memory, "xla/backends/gpu/target_config/specs of OpenXLA, Apache-2.0"


def _reported(gib: float) -> tuple[int, str]:
    return int(gib * _GIB), "what CUDA reports, as PyTorch's messages in public issues quote it"


# Bytes a second to the other GPUs of a host, and to another host. In NVIDIA's DGX: NVLink, and an adapter of 200 or 400
# Gb/s for each GPU. Else: 16 lanes of PCIe's third, fourth or fifth generation.
_DGX_A100, _DGX_H100, _DGX_B200 = (300e9, 25e9), (450e9, 50e9), (900e9, 50e9)
_PCIE_3, _PCIE_4, _PCIE_5 = (16e9, 0.0), (32e9, 0.0), (64e9, 0.0)

# Compute capability; of each multiprocessor: bytes of shared memory, how many of them one block may have, threads, and
# units for float32 (CUDA's programming guide, "Compute Capabilities").
_TURING = {"major": 7, "minor": 5, "shared": 65_536, "of_block": 65_536, "threads": 1024, "units": 64}
_GA100 = {"major": 8, "minor": 0, "shared": 167_936, "of_block": 166_912, "threads": 2048, "units": 64}
_GA102 = {"major": 8, "minor": 6, "shared": 102_400, "of_block": 101_376, "threads": 1536, "units": 128}
_ADA = _GA102 | {"minor": 9}
_HOPPER = {"major": 9, "minor": 0, "shared": 233_472, "of_block": 232_448, "threads": 2048, "units": 128}
_BLACKWELL = _HOPPER | {"major": 10}
_RTX_BLACKWELL = _GA102 | {"major": 12, "minor": 0}
_A100 = _GA100 | {"cores": 108, "cache": 40 * _MIB, "clock": 1.41}
_H100 = _HOPPER | {"cores": 132, "cache": 50 * _MIB, "clock": 1.98}
_B200 = _BLACKWELL | {"cores": 148, "cache": 132_644_864, "clock": 1.965}
_RTX_3090 = _GA102 | {"cores": 82, "cache": 6 * _MIB, "clock": 1.695}
_RTX_4090 = _ADA | {"cores": 128, "cache": 72 * _MIB, "clock": 2.52}
_RTX_5090 = _RTX_BLACKWELL | {"cores": 170, "cache": 96 * _MIB, "clock": 2.407}

CHIPS = {
    "v5e": _tpu("TPU v5e", 15.75, 819e9, 200e9, 96),
    "v5p": _tpu("TPU v5p", 95.74, 2765e9, 600e9, 16),
    "v6e": _tpu("TPU v6e", 31.25, 1640e9, 400e9, 64),
    "t4": _gpu("Tesla T4", _reported(14.56), 320e9, _PCIE_3, **_TURING, cores=40, cache=4 * _MIB, clock=1.59),
    "a10": _gpu("NVIDIA A10", _reported(22.05), 600e9, _PCIE_4, **_GA102, cores=72, cache=6 * _MIB, clock=1.695),
    "l4": _gpu("NVIDIA L4", _reported(22.03), 300e9, _PCIE_4, **_ADA, cores=58, cache=48 * _MIB, clock=2.04),
    "l40s": _gpu("NVIDIA L40S", _reported(44.39), 864e9, _PCIE_4, **_ADA, cores=142, cache=96 * _MIB, clock=2.52),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", _reported(23.56), 936e9, _PCIE_4, **_RTX_3090),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", _reported(23.52), 1008e9, _PCIE_4, **_RTX_4090),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", _reported(31.34), 1792e9, _PCIE_5, **_RTX_5090),
    "a100-40gb": _gpu("NVIDIA A100-SXM4-40GB", _stated(42_331_013_120), 1555.2e9, _DGX_A100, **_A100),
    "a100-80gb": _gpu("NVIDIA A100-SXM4-80GB", _stated(85_100_068_864), 2039.04e9, _DGX_A100, **_A100),
    "h100": _gpu("NVIDIA H100 80GB HBM3", _stated(84_929_347_584), 3352.32e9, _DGX_H100, **_H100),
    "h200": _gpu("NVIDIA H200 141GB HBM3e", _stated(151_397_597_184), 4800e9, _DGX_H100, **_H100),
    "b200": _gpu("NVIDIA B200", _stated(191_514_411_008), 7672.32e9, _DGX_B200, **_B200),
}
