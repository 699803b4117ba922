"""Devices that a program is compiled for without having them, and their compilers."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import jax
from jax.experimental import topologies

from hgdpo_jax.devices.peaks import CORE
from hgdpo_jax.planning.chips import CHIPS, DTYPES, Chip
from hgdpo_jax.run.errors import UserError

_HOST = 8  # GPUs of a host
# Without a device XLA cannot try which of its own kernels is the fastest, and stops at the products of a LoRA.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_ONE_TPU: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)}  # of the four that a host has
_SHAPES = {"tpu": r"\d+x\d+(x\d+)?", "cuda": r"[1-8]|[1-9]\d+", "cpu": r"[1-9]\d*"}


@dataclass(frozen=True)
class Topology:
    """Devices of one kind that one program runs on.

    Attributes:
        name: as it was asked for.
        devices: described ones, which compile and do not run; processors in their place where the compiler is missing.
        options: of the compiler.
        compiler: its package and version; empty where it is not installed.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    options: dict[str, Any]
    compiler: str


def prepare_compilers(names: Sequence[str]) -> None:
    """Makes ready the compilers of some topologies; to be called before JAX looks for devices.

    Raises:
        UserError: there is no such topology.
    """
    on_processors = [name for name in names if platform_of(name) == "cpu" or not package_of(platform_of(name))]
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
    count = max(map(_count, on_processors), default=1)
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
    if not good or (platform == "cuda" and _count(name) > _HOST and not _whole_hosts(name)):
        gpus = [chip for chip, about in CHIPS.items() if about.platform == "cuda"]
        hosts = [chip for chip in gpus if CHIPS[chip].between_hosts]
        raise UserError(f"topology {name}: unknown; write v5e:4x4, v5p:2x2x2, v6e:8x8, cpu:2, up to 8 GPUs as h100:8 "
                        f"({', '.join(gpus)}), whole hosts of 8 as h100:64 ({', '.join(hosts)}), or a name alone for "
                        "one device")  # fmt: skip
    return platform


def _count(name: str) -> int:
    """Devices of a topology."""
    return math.prod(int(size) for size in name.partition(":")[2].split("x") if size)


def _whole_hosts(name: str) -> bool:
    return CHIPS[name.partition(":")[0]].between_hosts > 0 and _count(name) % _HOST == 0


def describe_topology(name: str) -> Topology:
    """The devices of a topology, after :func:`prepare_compilers`.

    Raises:
        UserError: there is no such topology, or its compiler knows none of this shape.
    """
    platform, count = platform_of(name), _count(name)
    kind, _, shape = name.partition(":")
    package = package_of(platform)
    hosts = max(1, count // _HOST) if platform == "cuda" else 1
    if platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
        operations = CORE * (os.cpu_count() or 1) / count
        source = "this machine's memory; operations of a core as measured (benchmarks/results/full_size.md)"
        chip = Chip("cpu", "cpu", memory, dict.fromkeys(DTYPES, operations), 0, 0, 0, source)
        return Topology(name, chip, _processors(name), {}, f"{package} {version(package)}")
    chip = CHIPS[kind]
    if hosts > 1:
        chip = replace(chip, interconnect=chip.between_hosts)
    if not package:
        return Topology(name, chip, _processors(name), {}, "")
    if platform == "tpu":
        asked = {"topology_name": f"{kind}:{shape}"} if shape else _ONE_TPU | {"topology_name": f"{kind}:1x1x1"}
    else:
        asked = {"target_config": chip.target_config, "topology": f"1x{hosts}x{count // hosts}"}
    try:
        devices = topologies.get_topology_desc(platform=platform, **asked).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {name}: its compiler says {' '.join(str(error).split())}") from error
    return Topology(name, chip, devices, _GPU_OPTIONS if platform == "cuda" else {}, f"{package} {version(package)}")


def _processors(name: str) -> Sequence[jax.Device]:
    """As many processors' devices as a topology has. Raises UserError where XLA_FLAGS gives fewer."""
    devices = jax.devices("cpu")[: _count(name)]
    if len(devices) < _count(name):
        raise UserError(f"topology {name}: XLA_FLAGS gives {len(devices)} devices; take "
                        "--xla_force_host_platform_device_count out of it")  # fmt: skip
    return devices


def extra_of(name: str) -> str:
    """The extra of this package that installs the compiler of a topology."""
    return {"tpu": "plan-tpu", "cuda": "plan-gpu"}[platform_of(name)]


def package_of(platform: str) -> str:
    """The package that has the compiler of a platform; empty where it is not installed."""
    packages = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "cpu": ("jaxlib",)}[platform]
    return next((package for package in packages if importlib.util.find_spec(package)), "")
