#!/usr/bin/env bash
# One command on all hosts of a TPU slice, which is made unless it is there; needs gcloud. See docs/pods.md.
#   bash launch/tpu_vm.sh NAME ZONE TYPE python -m hgdpo_jax.main --config configs/stage1.py:sd15 --workdir /mnt/runs/mine …
# TYPE is such as v5litepod-16, v5p-32 or v6e-16. SPOT=1 asks for a spot slice, RUNTIME for another image. A command that
# was stopped by maintenance, or lost its slice, is started again, 100 times at most.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?name of the slice} zone=${2:?its zone} type=${3:?accelerator type, such as v5litepod-16}
shift 3
[ $# -gt 0 ] || { echo "what is to run on $name?" >&2; exit 2; }
case $type in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) image=${RUNTIME:?which runtime version has a $type?} ;;
esac
vm=(gcloud compute tpus tpu-vm)
at=("$name" --zone "$zone")
archive=$(mktemp -d)/hgdpo_jax.tar.gz
trap 'rm -r "$(dirname "$archive")"' EXIT
git archive --prefix=hgdpo_jax/ --output="$archive" HEAD
printf -v command '%q ' "$@"
tries=100 looks=1440 # of the command, as in gke_jobset.yaml; at a slice that is not ready, once a minute for a day

state() {  # nothing where there is no such slice
  local found
  if found=$("${vm[@]}" describe "${at[@]}" --format='value(state)' 2>&1); then
    echo "$found"
  elif [[ $found != *NOT_FOUND* ]]; then
    echo "$found" >&2
    echo unknown
  fi
}

on_all() {
  "${vm[@]}" ssh "${at[@]}" --worker=all --command="$1"
}

ready() {  # waits for the slice, which is made where there is none
  local found
  while found=$(state); [ "$found" != READY ]; do
    case $found in
      "") "${vm[@]}" create "${at[@]}" --accelerator-type "$type" --version "${RUNTIME:-$image}" ${SPOT:+--spot} && continue ;;
      PREEMPTED | TERMINATED) "${vm[@]}" delete "${at[@]}" --quiet && continue ;;  # it keeps its name until then
    esac
    # What is wrong at the first start may be a mistake; later there may be room again for a slice that was lost.
    case $try$found in 1 | 1unknown) exit 1 ;; esac
    [ $((looks -= 1)) -gt 0 ] || { echo "$name is not ready after a day, but ${found:-gone}" >&2; exit 1; }
    echo "$name is ${found:-gone}; looking again in 60 s" >&2
    sleep 60
  done
}

run() {
  "${vm[@]}" scp "$archive" "$name:" --zone "$zone" --worker=all &&
    on_all "tar xzf hgdpo_jax.tar.gz && { [ -x hgdpo/bin/python ] ||
      { sudo apt-get install -y -qq python3.11-venv && python3.11 -m venv hgdpo; }; } &&
      hgdpo/bin/pip install --quiet ./hgdpo_jax[tpu,gcs]" &&
    on_all "source hgdpo/bin/activate && HGDPO_DISTRIBUTED=1 $command"
}

for ((try = 1; try <= tries; try++)); do
  ready
  code=0
  run || code=$?
  case $code in
    0) exit 0 ;;
    75 | 255) ;;  # it is to go on; or ssh lost its host, which may not be known yet
    *) [ "$(state)" != READY ] || exit "$code" ;;
  esac
  sleep 60
done
echo "$name: started $tries times without an end" >&2
exit "$code"
