#!/usr/bin/env bash
# One command on all hosts of a TPU slice, which is made unless it is there; needs gcloud. See docs/pods.md.
#   bash launch/tpu_vm.sh NAME ZONE TYPE python -m hgdpo_jax.main --config configs/stage1.py:sd15 --workdir /mnt/runs/mine …
# TYPE is such as v5litepod-16, v5p-32 or v6e-16. SPOT=1 asks for a spot slice, RUNTIME for another image. A command that
# was stopped by maintenance, or lost its slice, is started again.
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
lost= code=0

state() {  # nothing where there is no such slice
  "${vm[@]}" describe "${at[@]}" --format='value(state)' 2> /dev/null || true
}

on_all() {
  "${vm[@]}" ssh "${at[@]}" --worker=all --command="$1"
}

prepare() {
  local found
  while found=$(state); [ "$found" != READY ]; do
    case $found in
      "")  # where there is no room for a slice that was lost, there may be later
        "${vm[@]}" create "${at[@]}" --accelerator-type "$type" --version "${RUNTIME:-$image}" ${SPOT:+--spot} ||
          { [ -n "$lost" ] || exit 1; sleep 60; } ;;
      PREEMPTED | TERMINATED) "${vm[@]}" delete "${at[@]}" --quiet ;;  # it keeps its name until then
      *) echo "$name is $found; looking again in 60 s" >&2; sleep 60 ;;
    esac
  done
  "${vm[@]}" scp "$archive" "$name:" --zone "$zone" --worker=all
  on_all "tar xzf hgdpo_jax.tar.gz && { [ -x hgdpo/bin/python ] ||
    { sudo apt-get install -y -qq python3.11-venv && python3.11 -m venv hgdpo; }; } &&
    hgdpo/bin/pip install --quiet ./hgdpo_jax[tpu,gcs]"
}

run() {
  prepare
  code=0
  on_all "source hgdpo/bin/activate && HGDPO_DISTRIBUTED=1 $command" || code=$?
}

run
while [ "$code" = 75 ] || { [ "$code" != 0 ] && [ "$(state)" != READY ]; }; do
  lost=yes
  sleep 60
  run
done
exit "$code"
