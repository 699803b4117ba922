"""Variables of the environment that would change what is computed or drawn: they are refused.

Settings say what is computed, and a result says which settings it was made with. A variable would change it unseen:
other random numbers, other types, numbers that are not checked. Those that change only speed, devices or logs are free.
"""

import os
import re
from collections.abc import Mapping

from hgdpo_jax.run.errors import UserError

# Name → what JAX and Flax take unless told; None: any value is another.
_USUAL: dict[str, str | None] = {
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_THREEFRY_PARTITIONABLE": "true",
    "JAX_RANDOM_SEED_OFFSET": "0",
    "JAX_ENABLE_CUSTOM_PRNG": "false",
    "JAX_LEGACY_PRNG_KEY": "allow",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "false",
    "JAX_ENABLE_X64": "false",
    "JAX_EXPLICIT_X64_DTYPES": None,
    "JAX_DEFAULT_DTYPE_BITS": None,
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_ALLOW_F16_REDUCTIONS": "true",
    "JAX_SOFTMAX_CUSTOM_JVP": None,
    "JAX_DEFAULT_DEVICE": None,
    "JAX_DISABLE_JIT": "false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
    "JAX_NO_TRACING": "false",
    "JAX_NO_EXECUTION": "false",
    "JAX_DEBUG_NANS": "false",  # they stop at numbers that are masked
    "JAX_DEBUG_INFS": "false",
    "JAX_TRANSFER_GUARD": "allow",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": "allow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "allow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "allow",
    "JAX_MOCK_GPU_TOPOLOGY": None,
    "MOCK_NUM_GPU_PROCESSES": "0",
    "FLAX_FIX_RNG_SEPARATOR": "false",
    "FLAX_ARRAY_REF": "false",
    "FLAX_PYTREE_MODULE": "true",
    "FLAX_HIJAX_VARIABLE": "false",
    "FLAX_ALWAYS_SHARD_VARIABLE": "true",
    "FLAX_USE_FLAXLIB": "false",
    "NNX_GRAPH_MODE": "true",
    "NNX_GRAPH_UPDATES": "true",
    "NVIDIA_TF32_OVERRIDE": None,
}
_WORDS = {**dict.fromkeys(("y", "yes", "t", "on", "1"), "true"), **dict.fromkeys(("n", "no", "f", "off", "0"), "false")}
# With these XLA takes NaN for a number.
_FAST = re.compile(r"--(xla_cpu_enable_fast_math|xla_cpu_enable_fast_min_max|xla_gpu_enable_fast_min_max)(=(\S*))?")


def require_usual(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError for a variable that would change what is computed."""
    for name, usual in _USUAL.items():
        value = environment.get(name)
        if value is not None and usual not in (value.lower(), _WORDS.get(value.lower(), value)):
            instead = "unset it" if usual is None else f"unset it; {usual} is computed with"
            raise UserError(f"{name}={value}: would change what is computed; {instead}")
    for flag in _FAST.finditer(environment.get("XLA_FLAGS", "")):
        if flag[3] is None or flag[3].lower() not in ("false", "0"):
            raise UserError(f"XLA_FLAGS={flag[0]}: would hide NaN; leave it out")
