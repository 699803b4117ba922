#!/usr/bin/env bash
# Lint and the test suite, on CPU, one process per core. Further arguments go to pytest: bash launch/test.sh tests/models -x
# With --full instead: Stable Diffusion 1.5 and XL at full size against diffusers (24 GB of memory, 40 GB of disk).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
if [ "${1:-}" = --full ]; then
  export MALLOC_MMAP_THRESHOLD_=65536  # what PyTorch frees goes back to the system before JAX needs it
  exec python -m pytest -s tests/full/full_size.py "${@:2}"
fi
ruff check .
python -m pytest --numprocesses auto --dist loadfile "$@"
