#!/usr/bin/env bash
# Steps, pools, attention and memory on one NVIDIA GPU, and diffusers beside them (benchmarks/README.md):
#     bash benchmarks/on_gpu.sh [OUT] [--small] [--seconds 570]
# Takes the active environment where it has what this needs. Where that has JAX for the device, the few packages that are
# missing are installed into build/on_gpu; where it has not, all is installed into env/, as the README does it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root:$root/build/on_gpu${PYTHONPATH:+:$PYTHONPATH}"
extra=[gpu] device="[name for name in ('jax_cuda13_plugin', 'jax_cuda12_plugin') if importlib.util.find_spec(name)][0]"
for argument; do [ "$argument" != --small ] || extra= device="'a processor'"; done
jax="import importlib.util, jax; $device"
works() { "$1" -c "$jax; import benchmarks.gpu.worker" > /dev/null 2>&1; }

python=$(command -v python || command -v python3)
if ! works "$python"; then
  if [ -x "$root/env/bin/python" ] && works "$root/env/bin/python"; then
    python=$root/env/bin/python
  elif "$python" -c "$jax" > /dev/null 2>&1; then
    # Without what they depend on, which would bring another JAX.
    mapfile -t missing < <("$python" - "$root/pyproject.toml" <<'PYTHON'
import importlib.metadata, re, sys, tomllib
needed = "flax optax ml-collections transformers huggingface_hub safetensors jaxtyping etils pillow tqdm".split()
have = {re.sub("[-_.]+", "-", each.name).lower() for each in importlib.metadata.distributions()}
for line in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    name = re.match(r"[\w-]+", line)[0]
    if name in needed and name.lower().replace("_", "-") not in have:
        print(line)
PYTHON
    )
    echo "Installing into build/on_gpu: ${missing[*]}" >&2
    "$python" -m pip install --quiet --no-deps --target "$root/build/on_gpu" "${missing[@]}" ||
      { echo "Cannot be installed: bring wheels of them, with PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER" >&2; exit 1; }
  elif [ -n "$extra" ] && [ ! -e /dev/nvidiactl ] && ! command -v nvidia-smi > /dev/null; then
    echo "No NVIDIA GPU is here, and no JAX for one; --small tries the script out on a processor" >&2
    exit 2
  else
    echo "Installing this package with JAX into env/" >&2
    "$python" -m venv "$root/env"
    python=$root/env/bin/python
    "$python" -m pip install --quiet -e "$root$extra"
  fi
  "$python" -c "$jax; import benchmarks.gpu.worker"  # says what is still missing
fi
exec "$python" -m benchmarks.gpu "$@"
