#!/usr/bin/env bash
# All three stages with your own checkpoint and photographs:
#   bash launch/curriculum.sh W sd15 --config.model.base=MODEL --config.data.photographs=PHOTOS --config.pairs.scorer=SCORER
# Run again after an interruption: finished shards and steps are kept.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
workdir=${1:?usage: curriculum.sh WORKDIR VARIANT [--config.key=value ...]}
variant=${2:?usage: curriculum.sh WORKDIR VARIANT [--config.key=value ...]}
shift 2
for stage in stage1 stage2 stage3; do
  python -m hgdpo_jax.pairs --config "configs/$stage.py:$variant" --workdir "$workdir" "$@"
  python -m hgdpo_jax.main --config "configs/$stage.py:$variant" --workdir "$workdir" "$@"
done
