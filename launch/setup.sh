#!/usr/bin/env bash
# Sourced by the other scripts with a requirements file: takes the active environment where what is needed imports and
# JAX finds its devices, else makes .venv in the repository root once and installs the file there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1
needed="hgdpo_jax.curriculum.build, hgdpo_jax.training.loop, hgdpo_jax.results.evaluation, jax; jax.devices()"
[ "$requirements" != requirements-test.txt ] || needed="pytest, xdist, mypy, beartype, torch, diffusers, peft, onnx, gcsfs, gcp_storage_emulator, $needed"
installed="from importlib.metadata import version; version('hgdpo_jax')"
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || python -c "$installed" > /dev/null 2>&1; then
  if missing=$(python -c "import $needed" 2>&1); then
    active=yes
  else
    echo "The active environment, $(command -v python), is not used: $(printf '%s' "$missing" | tail -n 1)" >&2
  fi
fi
if [ -z "${active:-}" ]; then
  python=$(command -v python3.11 || command -v python3 || true)
  [ -n "$python" ] || { echo "hgdpo_jax needs Python 3.11 or newer: none found on PATH" >&2; exit 1; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "hgdpo_jax needs Python 3.11 or newer: $("$python" --version) found on PATH" >&2; exit 1; }
  .venv/bin/python -c "import pip" > /dev/null 2>&1 || "$python" -m venv --clear .venv  # also one that was half made
  stamp=.venv/$(basename "$requirements").installed
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "Installing $requirements into .venv (once; a few minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cat requirements*.txt > "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
fi

# On CPU, XLA runs one device's small operations on one core: let the mesh have a few. What the user sets comes later
# and wins.
cores=$(nproc)
export XLA_FLAGS="--xla_force_host_platform_device_count=$((cores < 2 ? 1 : cores < 4 ? 2 : 4)) ${XLA_FLAGS:-}"
