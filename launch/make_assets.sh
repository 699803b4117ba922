#!/usr/bin/env bash
# Makes hgdpo_jax/assets/portraits again from its sources. Takes about half an hour on two cores. Needs npm.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
work=${1:-runs/assets}
portraits=$PWD/hgdpo_jax/assets/portraits
mkdir -p "$work/npm" "$work/wheel"
(cd "$work/npm" && npm pack --silent @tabler/preview@1.2.0 && tar xzf tabler-preview-1.2.0.tgz)
(cd "$work/npm" && npm pack --silent @vladmandic/face-api@1.7.15 && mkdir -p face-api &&
  tar xzf vladmandic-face-api-1.7.15.tgz -C face-api)
python -m pip download --quiet --no-deps --dest "$work/wheel" open_clip_torch==3.3.0
unzip -o -q -j "$work"/wheel/open_clip_torch-3.3.0-*.whl open_clip/bpe_simple_vocab_16e6.txt.gz -d "$work/wheel"
avatars=$work/npm/package/dist/static/avatars
python -m hgdpo_jax.assets.face "$work/npm/face-api/package/model" hgdpo_jax/assets/face
python -m hgdpo_jax.assets.photographs "$avatars" "$portraits"
python -m hgdpo_jax.assets.photographs "$avatars" "$portraits" --views base "$work/views"
python -m hgdpo_jax.assets.photographs "$avatars" "$portraits" --views train "$work/others"
python -m hgdpo_jax.assets.base "$portraits" --vocabulary "$work/wheel/bpe_simple_vocab_16e6.txt.gz"
python -m hgdpo_jax.assets.vae "$portraits"
python -m hgdpo_jax.pairs --config configs/stage0_sft.py:portraits --workdir "$work/run" --config.data.photographs="$work/views"
python -m hgdpo_jax.main --config configs/stage0_sft.py:portraits --workdir "$work/run" --config.data.photographs="$work/views"
python -m hgdpo_jax.export --workdir "$work/run" --out "$work/export"
python -m hgdpo_jax.assets.base "$portraits" --unet "$work/export/unet"
python -m hgdpo_jax.assets.scorer "$portraits"
for command in pairs main; do
  python -m hgdpo_jax.$command --config configs/personalise.py:portraits --workdir "$work/run" --config.data.photographs="$work/others"
done
python -m hgdpo_jax.export --workdir "$work/run" --stage personalise --format peft --out "$work/adapter"
cp "$work/adapter/ip_adapter.safetensors" "$portraits"
