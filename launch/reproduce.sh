#!/usr/bin/env bash
# Rows of the paper's tables and of ours (docs/rows.md), for each seed. bash launch/reproduce.sh VARIANT WORKDIR [--config.key=value ...]
# SEEDS="0 1 2" and PARTS="paper baselines ablations objectives lengths people" by default; the three stages come before any part.
# Run again after a stop, as often as you like: what is finished is not done again.
variant=${1:?which variant: portraits, sd15 or sdxl} workdir=${2:?folder of the runs}
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt "$variant"

once() { # RUN COMMAND SPEC ARGUMENTS ...: unless RUN/done says that it is finished
  local mark
  mark=$1/done/$(sha256sum <<<"${*:2}" | cut -c1-16)
  [ ! -e "$mark" ] || return 0
  [ "$2" != main ] || set -- "${@:1:3}" --config.train.alarms=0 "${@:4}"  # some rows are there to collapse
  python -m "hgdpo_jax.$2" --config "$3" --workdir "$1" --config.seed="$seed" "${@:4}" </dev/null || [ $? = 3 ]
  mkdir -p "$1/done" && echo "${*:2}" > "$mark"
}

train() { # RUN LINES ARGUMENTS ...
  local line
  while read -r line; do
    # shellcheck disable=SC2086  # a line is several arguments
    once "$1" $line "${@:3}"
  done <<<"$2"
}

measure() { # FOLDER ROWS ...: unless they are measured
  [ -e "$1/resamples.npz" ] || python -m hgdpo_jax.evaluate --runs "${@:2}" --seeds 4 --out "$1" </dev/null
}

case $variant in sd15 | sdxl) python -m tools.reproduction.cost "$variant" ;; esac
lines=$(python -m tools.reproduction.rows "$variant" paper)
stages=$(head -n 6 <<<"$lines")  # pairs and training of easy, normal, hard
for part in ${PARTS:-paper baselines ablations objectives lengths people}; do
  for seed in ${SEEDS:-0 1 2}; do
    run=$workdir/$seed
    train "$run" "$stages" "$@"
    if [ "$part" != people ]; then
      lines=$(python -m tools.reproduction.rows "$variant" "$part")
      train "$run" "$lines" "$@"
      mapfile -t drawn < <(python -m tools.reproduction.rows "$variant" "$part" "$run")
      measure "$run/rows/$part" "${drawn[@]}"
    elif [ "$variant" = portraits ]; then
      fewer=()  # people to learn from
      for count in 8 16 32 64; do
        fewer+=("$run-people-$count:hard")
        python -m tools.reproduction.people "$count" "$run-people-$count/captions.jsonl"
        train "$run-people-$count" "$stages" --config.data.photographs="$run-people-$count/captions.jsonl" "$@"
      done
      measure "$run/rows/people" "$run:base" "${fewer[@]}" "$run:hard"
    fi
  done
done
python -m tools.reproduction.document "$variant" "$workdir" > "$workdir/reproduction.part"
mv "$workdir/reproduction.part" "$workdir/reproduction.md"
echo "$workdir/reproduction.md"
