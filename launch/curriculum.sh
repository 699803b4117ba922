#!/usr/bin/env bash
# All three stages and the text encoder (flow models have no such stage): pairs, then training.
# bash launch/curriculum.sh VARIANT WORKDIR [--check | --browse] [--config.key=value ...]
# Run again after a stop: finished shards and checkpoints are kept. Paths are relative to the folder it is run from, whose
# folder configs, where there is one, takes the place of the package's.
variant=${1:?which variant: sd15, sdxl, klein, portraits or portraits-flow} workdir=${2:?folder of the run}
shift 2
settings=() browse=
for argument; do
  case $argument in --browse) browse=$argument ;; *) settings+=("$argument") ;; esac  # a training makes no pairs
done
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt "$variant"
for stage in stage1 stage2 stage3; do
  python -m hgdpo_jax.pairs --config "configs/$stage.py:$variant" --workdir "$workdir" "${settings[@]}" $browse
  python -m hgdpo_jax.main --config "configs/$stage.py:$variant" --workdir "$workdir" "${settings[@]}"
done
case $variant in klein | portraits-flow) exit 0 ;; esac  # their text encoder is not trained
python -m hgdpo_jax.main --config "configs/text_encoder.py:$variant" --workdir "$workdir" "${settings[@]}" \
  --config.train.params=text_lora --config.train.blocks=all  # whatever the stages train
