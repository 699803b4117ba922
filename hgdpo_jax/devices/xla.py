"""How XLA compiles: its flags, and the precision of products."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from hgdpo_jax.config import AUTO

_ISA, _WIDTH, _JOINED = "--xla_cpu_max_isa", "--xla_cpu_prefer_vector_width", "--xla_gpu_dot_merger_threshold_mb"


def dtype_on(platform: str) -> str:
    """The `model.dtype` that suits devices: of those with 16 bits that with the finer steps, in which margins are an
    eighth as noisy (docs/performance.md). A TPU's units multiply bfloat16 alone, a processor's neither.

    Args:
        platform: of JAX; a GPU's is gpu, cuda or rocm.
    """
    return {"cpu": "float32", "tpu": "bfloat16"}.get(platform, "float16")


def settle_dtype(model: ConfigDict, platform: str) -> None:
    """Replaces `model.dtype=auto` by what suits devices: whatever is made from the config says which it was.

    Args:
        model: settings, which are changed.
        platform: see :func:`dtype_on`.
    """
    if model.dtype == AUTO:
        model.dtype = dtype_on(platform)


def use_precision(dtype: str) -> None:
    """Sets how exact products of float32 numbers are from now on, on every kind of device: GPUs and TPUs round them
    unless told otherwise.

    Args:
        dtype: `model.dtype`, settled. With float32 products are float32. Otherwise they have 10 bits at least, which is
            TF32 on GPUs and three products of bfloat16 on TPUs: the VAE and the judges are float32 whatever the UNet
            is.
    """
    jax.config.update("jax_default_matmul_precision", "float32" if dtype == "float32" else "tensorfloat32")


def cpuinfo() -> str:
    """What Linux says of the processor; empty on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def xla_flags(given: str, cpuinfo: str) -> str:
    """`XLA_FLAGS` for all programs of a command.

    - Intel's processors with AVX-512: programs are compiled for AVX2. XLA warns of each AVX-512 program that it finds
      in the compilation cache with a screen of errors, or refuses it, though it compiled it itself (jax-ml/jax#38445).
    - Other processors with AVX-512: XLA takes half of such a vector unless told.
    - GPUs: XLA joins products of one input, LoRA's with its layer's. To cut large results apart again costs a step of
      SD1.5 a tenth of its memory traffic (benchmarks/LOG.md), so only small ones are joined.

    Args:
        given: flags of the user, which win.
        cpuinfo: see :func:`cpuinfo`.
    """
    flags = {_JOINED: "8"}  # MB
    if "avx512f" in cpuinfo:
        flags |= {_ISA: "AVX2"} if "GenuineIntel" in cpuinfo else {_WIDTH: "512"}
    return " ".join([*given.split(), *(f"{name}={value}" for name, value in flags.items() if name not in given)])
