"""How XLA compiles: its flags, the precision of products, the cache of compiled programs."""

from pathlib import Path

import jax

_ISA, _WIDTH, _JOINED = "--xla_cpu_max_isa", "--xla_cpu_prefer_vector_width", "--xla_gpu_dot_merger_threshold_mb"


def use_precision(dtype: str) -> None:
    """How exact products of float32 numbers are from now on, on every kind of device: GPUs and TPUs round them unless
    told otherwise.

    Args:
        dtype: `model.dtype`. With float32 products are float32; else they have 10 bits at least, which on GPUs is TF32
            and on TPUs three products of bfloat16: the VAE and the judges are float32 whatever the UNet is.
    """
    jax.config.update("jax_default_matmul_precision", "float32" if dtype == "float32" else "tensorfloat32")


def processor() -> str:
    """What Linux says of it; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def xla_flags(given: str, processor: str) -> str:
    """`XLA_FLAGS` with what programs are compiled with here.

    On Intel's processors with AVX-512 XLA complains of each that it finds in the compilation cache with a screen of
    errors, or refuses it, though it compiled it itself (jax-ml/jax#38445); compiled for AVX2 they are taken. On others
    it takes half of such a vector unless told. For GPUs XLA joins products of one input, LoRA's with its layer's:
    cutting large results apart again costs a step of SD1.5 a tenth of its memory traffic (benchmarks/LOG.md).

    Args:
        given: what the user set, which wins.
        processor: what Linux says of it.
    """
    flags = {_JOINED: "8"}  # MB
    if "avx512f" in processor:
        flags |= {_ISA: "AVX2"} if "GenuineIntel" in processor else {_WIDTH: "512"}
    return " ".join([*given.split(), *(f"{name}={value}" for name, value in flags.items() if name not in given)])
