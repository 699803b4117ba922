#!/usr/bin/env bash
# HG-DPO on the embedded portraits, from pairs to report. bash launch/demo.sh [WORKDIR [--config.key=value ...]]
# Run again after a stop: it goes on where it was.
workdir=${1:-runs/portraits}
source "$(dirname "${BASH_SOURCE[0]}")/curriculum.sh" portraits "$workdir" "${@:2}"
for command in pairs main; do  # what the curriculum is compared with
  python -m hgdpo_jax.$command --config configs/naive.py:portraits --workdir "$workdir" "${@:2}"
done
python -m hgdpo_jax.export --workdir "$workdir" --out "$workdir/export"
python -m hgdpo_jax.evaluate --config configs/stage3.py:portraits --workdir "$workdir" "${@:2}"
