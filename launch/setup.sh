#!/usr/bin/env bash
# Sourced by the other scripts with a requirements file, and perhaps a variant: takes the active environment where what is
# needed imports and JAX finds its devices, else makes .venv in the repository root once and installs the file there. That
# is for processors, to which sd15, sdxl and klein are left only where JAX_PLATFORMS=cpu says so. The folder stays the caller's.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
requirements=$1 large=
case ${2:-} in sd15 | sdxl | klein) [ "${JAX_PLATFORMS:-}" = cpu ] || large=$2 ;; esac
needed="hgdpo_jax.curriculum.build, hgdpo_jax.training.loop, hgdpo_jax.results.evaluation, jax; jax.devices()"
[ -z "$large" ] || needed+="; jax.default_backend() != 'cpu' or exit('JAX finds no GPU or TPU')"
[ "$requirements" != requirements-test.txt ] || needed="pytest, xdist, mypy, beartype, ipykernel, nbclient, torch, diffusers, peft, onnx, gcsfs, gcp_storage_emulator, $needed"
installed="from importlib.metadata import version; version('hgdpo_jax')"
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || python -c "$installed" > /dev/null 2>&1; then
  if missing=$(python -c "import $needed" 2>&1); then
    active=yes
  else
    echo "The active environment, $(command -v python), is not used: $(printf '%s' "$missing" | tail -n 1)" >&2
  fi
fi
if [ -z "${active:-}" ] && [ -n "$large" ]; then
  echo "$large needs a GPU or a TPU: activate an environment with pip install -e '$root[gpu]' (or [tpu]), or set" \
    "JAX_PLATFORMS=cpu if weeks on a processor are meant" >&2
  exit 1
fi
if [ -z "${active:-}" ]; then
  python=$(command -v python3.11 || command -v python3 || true)
  [ -n "$python" ] || { echo "hgdpo_jax needs Python 3.11 or newer: none found on PATH" >&2; exit 1; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "hgdpo_jax needs Python 3.11 or newer: $("$python" --version) found on PATH" >&2; exit 1; }
  "$root/.venv/bin/python" -c "import pip" > /dev/null 2>&1 ||
    "$python" -m venv --clear "$root/.venv"  # also one that was half made
  stamp=$root/.venv/$(basename "$requirements").installed
  if ! cat "$root"/requirements*.txt | cmp -s - "$stamp"; then
    echo "Installing $requirements into .venv (once; a few minutes)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/$requirements"
    cat "$root"/requirements*.txt > "$stamp"
  fi
  export PATH="$root/.venv/bin:$PATH"
fi

# On CPU, XLA runs one device's small operations on one core: let the mesh have a few. What the user sets comes later
# and wins.
cores=$(nproc)
export XLA_FLAGS="--xla_force_host_platform_device_count=$((cores < 2 ? 1 : cores < 4 ? 2 : 4)) ${XLA_FLAGS:-}"
