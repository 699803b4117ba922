"""Variables that change what is computed are refused, with their name; all others are free."""

import os
import subprocess
import sys

import pytest

from hgdpo_jax.run.environment import require_usual
from hgdpo_jax.run.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_ENABLE_X64", "1"),
        ("JAX_ENABLE_X64", "True"),
        ("JAX_ENABLE_X64", ""),  # JAX itself stops at it
        ("JAX_ENABLE_X64", "maybe"),
        ("JAX_DEFAULT_PRNG_IMPL", "rbg"),
        ("JAX_DEFAULT_PRNG_IMPL", "unsafe_rbg"),
        ("JAX_THREEFRY_PARTITIONABLE", "0"),
        ("JAX_RANDOM_SEED_OFFSET", "1"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
        ("JAX_NUMPY_RANK_PROMOTION", "raise"),
        ("JAX_DISABLE_JIT", "yes"),
        ("JAX_DEBUG_NANS", "on"),
        ("JAX_TRANSFER_GUARD", "disallow"),
        ("JAX_DEFAULT_DEVICE", "cpu"),
        ("FLAX_PYTREE_MODULE", "no"),
        ("NVIDIA_TF32_OVERRIDE", "1"),
        ("XLA_FLAGS", "--a=1 --xla_cpu_enable_fast_math=true --b"),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math"),
        ("XLA_FLAGS", "--xla_gpu_enable_fast_min_max=1"),
    ],
)
def test_what_changes_a_result_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError) as error:
        require_usual({name: value})
    assert str(error.value).startswith(f"{name}=") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_ENABLE_X64", "0"),
        ("JAX_ENABLE_X64", "False"),
        ("JAX_DEFAULT_PRNG_IMPL", "threefry2x32"),
        ("JAX_THREEFRY_PARTITIONABLE", "1"),
        ("JAX_RANDOM_SEED_OFFSET", "0"),
        ("JAX_NUMPY_DTYPE_PROMOTION", "standard"),
        ("JAX_PLATFORMS", "cpu"),
        ("JAX_COMPILATION_CACHE_DIR", "/tmp"),
        ("JAX_LOG_COMPILES", "1"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16"),  # model.dtype decides
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=false --xla_gpu_autotune_level=0"),
    ],
)
def test_what_changes_none_is_free(name: str, value: str) -> None:
    require_usual({name: value})


COMMAND = """
import sys
from pathlib import Path
from hgdpo_jax.run import command
def main():
    from hgdpo_jax.devices.start import start
    start(Path(sys.argv[1]))
command.run(main)
"""


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("JAX_ENABLE_X64", "1", "error: JAX_ENABLE_X64=1: would change what is computed; unset it; false is computed"),
        ("JAX_LOG_COMPILES", "perhaps", "error: invalid truth value 'perhaps' for environment 'JAX_LOG_COMPILES'; "
         "unset that variable, or correct it"),
        ("JAX_NUM_CPU_DEVICES", "two", 'error: Invalid value "two" for JAX flag jax_num_cpu_devices; unset that'),
        ("JAX_PLATFORMS", "cuda", "error: JAX_PLATFORMS=cuda: JAX finds no device (AssertionError); install jax"),
        ("JAX_PLATFORMS", "tpux", "error: JAX_PLATFORMS=tpux: JAX finds no device (Unable to initialize backend"),
    ],
)  # fmt: skip
def test_a_command_says_so_in_one_line(name: str, value: str, line: str) -> None:
    env = os.environ | {"PYTHONPATH": os.getcwd(), name: value}
    done = subprocess.run([sys.executable, "-c", COMMAND, "W"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(line)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nbAgg", "nosuch", ""])
def test_a_backend_of_a_notebook_does_not_matter(backend: str) -> None:
    code = "from hgdpo_jax.run import command\ndef main():\n    import matplotlib.figure\ncommand.run(main)"
    env = os.environ | {"PYTHONPATH": os.getcwd(), "MPLBACKEND": backend}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).stderr == b""
