#!/usr/bin/env bash
# Asks @vladmandic/face-api for the answers that the tests of the face networks expect, and writes them to face.json:
# run it whenever the embedded photographs change. Needs npm. The networks whose weights are not embedded are compared
# with it here, as no test can.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/setup.sh" requirements-test.txt
goldens=$PWD/tests/goldens
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python -m tests.faces.test_networks "$work"
(cd "$work" && npm install --silent --no-audit --no-fund @vladmandic/face-api@1.7.15 @tensorflow/tfjs@4.22.0 \
  @tensorflow/tfjs-backend-wasm@4.22.0 && node "$goldens/face.js")
mv "$work/face.json" "$goldens/face.json"
python -m tests.tools.test_face_attributes "$work/node_modules/@vladmandic/face-api/model"
