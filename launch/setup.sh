#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv in the repository root once, installs $1 (a requirements file), activates it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=$1
python=$(command -v python3.11 || command -v python3 || true)
[ -n "$python" ] || { echo "hgdpo_jax needs Python 3.11 or newer: none found on PATH" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "hgdpo_jax needs Python 3.11 or newer: $("$python" --version) found on PATH" >&2; exit 1; }
.venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv  # also one that was half made
stamp=.venv/$(basename "$requirements").installed
if ! cat requirements*.txt | cmp -s - "$stamp"; then
  echo "Installing $requirements into .venv (once; a few minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  cat requirements*.txt > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

# On CPU, XLA runs one device's small operations on one core: let the mesh have a few.
cores=$(nproc)
export XLA_FLAGS=${XLA_FLAGS:---xla_force_host_platform_device_count=$((cores < 2 ? 1 : cores < 4 ? 2 : 4))}
