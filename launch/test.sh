#!/usr/bin/env bash
# Lint, types and the test suite, on CPU, one process per core. Further arguments go to pytest: bash launch/test.sh tests/models -x
# With --full instead: Stable Diffusion 1.5 and XL, FLUX.2's transformer and VAE, and a layer of Qwen3, at full size against diffusers (24 GB
# of memory, 40 GB of disk).
flags=${XLA_FLAGS:-}  # the user's: setup.sh would add the number of devices of a run
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
cd "$root"
export XLA_FLAGS=$flags
if [ "${1:-}" = --full ]; then
  export MALLOC_MMAP_THRESHOLD_=65536  # what PyTorch frees goes back to the system before JAX needs it
  export XLA_FLAGS="--xla_backend_optimization_level=3 $flags"  # as a run compiles
  exec python -m pytest -s tests/full/full_size*.py tests/full/flux2.py "${@:2}"
fi
ruff check .
ruff format --check --quiet .
mypy & types=$!  # beside the tests: alone it would keep one core busy and leave the others idle
python -m pytest --numprocesses auto --dist worksteal "$@" || failed=$?
wait "$types"
exit "${failed:-0}"
