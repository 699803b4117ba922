"""Devices that a program is compiled for without having them: what they can do, and their compilers."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import jax
from jax.experimental import topologies

from hgdpo_jax.devices.peaks import CORE, peak
from hgdpo_jax.run.errors import UserError

_GIB = 2**30
_DTYPES = ("float32", "tf32", "float16", "bfloat16")


@dataclass(frozen=True)
class Chip:
    """What one device can do.

    Attributes:
        platform: of JAX.
        memory: bytes that a program may fill.
        peak: operations a second, by `model.dtype`.
        bandwidth: bytes a second of its memory; 0 where that is not known.
        interconnect: bytes a second that it sends to the others of its slice or host, all links together; 0 likewise.
            Of GPUs of several hosts: to another host.
        source: of these numbers.
        gpu: what XLA wants to know of a GPU beside them.
    """

    platform: str
    memory: float
    peak: dict[str, float]
    bandwidth: float
    interconnect: float
    source: str
    gpu: dict[str, Any] = field(default_factory=dict)


def _peaks(kind: str) -> dict[str, float]:
    return {dtype: peak(kind, dtype) or 0.0 for dtype in _DTYPES}


def _tpu(kind: str, memory: float, bandwidth: float, interconnect: float) -> Chip:
    source = "cloud.google.com/tpu/docs; memory: what libtpu lets a program fill"
    return Chip("tpu", memory * _GIB, _peaks(kind), bandwidth, interconnect, source)


def _gpu(name: str, memory: int, bandwidth: int, interconnect: float, **gpu: Any) -> Chip:
    source = "NVIDIA's data sheets, dense; memory: xla/backends/gpu/target_config/specs of OpenXLA, Apache-2.0"
    return Chip("cuda", memory, _peaks(name), bandwidth, interconnect, source, {"name": name, **gpu})


_HOST, _BETWEEN_HOSTS = 8, 50e9  # GPUs of a host, and bytes a second to others: an adapter of 400 Gb/s each (DGX)
_HOPPER = {"major": 9, "cores": 132, "cache": 52_428_800, "clock": 1.98}
_BLACKWELL = {"major": 10, "cores": 148, "cache": 132_644_864, "clock": 1.965}
CHIPS = {
    "v5e": _tpu("TPU v5e", 15.75, 819e9, 200e9),
    "v5p": _tpu("TPU v5p", 95.74, 2765e9, 600e9),
    "v6e": _tpu("TPU v6e", 31.25, 1640e9, 400e9),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 84_929_347_584, 3_352_320_000_000, 450e9, **_HOPPER),
    "h200": _gpu("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4_800_000_000_000, 450e9, **_HOPPER),
    "b200": _gpu("NVIDIA B200", 191_514_411_008, 7_672_320_000_000, 900e9, **_BLACKWELL),
}

# GpuTargetConfigProto of XLA; what is not filled in is the same for these GPUs.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""
# Without a device XLA cannot try which of its own kernels is the fastest, and stops at the products of a LoRA.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_ONE_TPU: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)}  # of the four that a host has
_SHAPES = {"tpu": r"\d+x\d+(x\d+)?", "cuda": r"[1-8]|[1-9]\d+", "cpu": r"[1-9]\d*"}


@dataclass(frozen=True)
class Topology:
    """Devices of one kind that one program runs on.

    Attributes:
        name: as it was asked for.
        devices: described ones, which compile and do not run.
        options: of the compiler.
        compiler: its version.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    options: dict[str, Any]
    compiler: str


def prepare_compilers(names: Sequence[str]) -> None:
    """Makes ready the compilers of some topologies; to be called before JAX looks for devices.

    Raises:
        UserError: there is no such topology, or a compiler is not installed.
    """
    kinds = {name: platform_of(name) for name in names}
    for name, platform in kinds.items():
        if platform != "cpu" and not _package(platform):
            extra = {"tpu": "plan-tpu", "cuda": "plan-gpu"}[platform]
            raise UserError(f'topology {name}: its compiler is not installed; pip install -e ".[{extra}]"')
    # The compilers may run beside a program that has the devices, and need not be told which these are.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }.items():
        os.environ.setdefault(key, value)
    count = max([int(name.partition(":")[2] or 1) for name, platform in kinds.items() if platform == "cpu"], default=1)
    flag, flags = f"--xla_force_host_platform_device_count={count}", os.environ.get("XLA_FLAGS", "")
    if flag not in flags.split():
        os.environ["XLA_FLAGS"] = f"{flag} {flags}"  # what the user sets comes later and wins
    jax.config.update("jax_platforms", "cpu")  # what is here is left alone
    # Programs for other devices, 400 MB of one, cannot be read from there again; what was counted is kept instead.
    jax.config.update("jax_enable_compilation_cache", False)


def platform_of(name: str) -> str:
    """The platform of a topology. Raises UserError where there is no such topology."""
    chip, colon, shape = name.partition(":")
    platform = "cpu" if chip == "cpu" else CHIPS[chip].platform if chip in CHIPS else ""
    good = platform and (not colon or re.fullmatch(_SHAPES[platform], shape))
    if not good or (platform == "cuda" and int(shape or 1) > _HOST and int(shape) % _HOST):
        raise UserError(f"topology {name}: unknown; write v5e:4x4, v5p:2x2x2, v6e:8x8, h100:8, h100:64, h200:8, "
                        "b200:8 (up to 8, or whole hosts of 8), cpu:2, or a name alone for one device")  # fmt: skip
    return platform


def describe_topology(name: str) -> Topology:
    """The devices of a topology, after :func:`prepare_compilers`.

    Raises:
        UserError: there is no such topology, or its compiler knows none of this shape.
    """
    platform = platform_of(name)
    kind, _, shape = name.partition(":")
    if platform == "cpu":
        count = int(shape or 1)
        devices = jax.devices("cpu")[:count]
        if len(devices) < count:
            raise UserError(f"topology {name}: XLA_FLAGS gives {len(devices)} devices; take "
                            "--xla_force_host_platform_device_count out of it")  # fmt: skip
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
        operations = CORE * (os.cpu_count() or 1) / count
        source = "this machine's memory; operations of a core as measured (benchmarks/results/full_size.md)"
        chip = Chip("cpu", memory, dict.fromkeys(_DTYPES, operations), 0, 0, source)
        return Topology(name, chip, devices, {}, f"jaxlib {version('jaxlib')}")
    chip = CHIPS[kind]
    if platform == "tpu":
        asked = {"topology_name": f"{kind}:{shape}"} if shape else _ONE_TPU | {"topology_name": f"{kind}:1x1x1"}
    else:
        text = _GPU.format(**chip.gpu, bandwidth=chip.bandwidth, memory=chip.memory)
        count = int(shape or 1)
        hosts = max(1, count // _HOST)
        if hosts > 1:
            chip = replace(chip, interconnect=_BETWEEN_HOSTS)
        asked = {"target_config": text, "topology": f"1x{hosts}x{count // hosts}"}
    try:
        devices = topologies.get_topology_desc(platform=platform, **asked).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {name}: its compiler says {' '.join(str(error).split())}") from error
    package = _package(platform)
    return Topology(name, chip, devices, _GPU_OPTIONS if platform == "cuda" else {}, f"{package} {version(package)}")


def _package(platform: str) -> str:
    """That has the compiler; empty where there is none."""
    packages = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "cpu": ("jaxlib",)}[platform]
    return next((package for package in packages if importlib.util.find_spec(package)), "")
