// npm i @vladmandic/face-api@1.7.15 @tensorflow/tfjs@4.22.0 @tensorflow/tfjs-backend-wasm@4.22.0, then in that folder
// PYTHONPATH=REPOSITORY python -m tests.models.test_face && node REPOSITORY/tests/goldens/face.js    writes face.json
const fs = require("fs");
const { createRequire } = require("module");

const packages = createRequire(`${process.cwd()}/`);
const faceapi = packages("@vladmandic/face-api/dist/face-api.node-wasm.js");
const folder = "node_modules/@vladmandic/face-api/model";
const rounded = (values) => Array.from(values, (value) => Number(value.toPrecision(7)));

function images(size) {
  const data = new Float32Array(fs.readFileSync(`${size}.raw`).buffer.slice(0));
  const length = size * size * 3;
  return Array.from({ length: data.length / length }, (_, i) =>
    faceapi.tf.tensor3d(data.slice(i * length, (i + 1) * length), [size, size, 3]));
}

async function main() {
  await faceapi.tf.setBackend("cpu");
  await faceapi.tf.ready();
  const { faceRecognitionNet: recognition, tinyFaceDetector: detector } = faceapi.nets;
  await recognition.loadFromDisk(folder);
  await detector.loadFromDisk(folder);
  const descriptors = [];
  for (const image of images(150)) descriptors.push(rounded(await recognition.computeFaceDescriptor(image)));
  const faces = {};
  for (const size of [224, 320]) {
    faces[size] = [];
    const options = new faceapi.TinyFaceDetectorOptions({ inputSize: size, scoreThreshold: 0.02 });
    for (const image of images(size)) {
      const found = await detector.locateFaces(image, options);
      faces[size].push(found.map(({ score, box }) => rounded([score, box.left, box.top, box.right, box.bottom])));
    }
  }
  const weights = {};
  for (const [net, paths] of [[recognition, ["conv32_1/conv2/conv/filters", "conv64_2/conv1/conv/filters", "fc"]],
    [detector, ["conv2/depthwise_filter", "conv8/bias"]]]) {
    for (const path of paths) weights[path] = rounded(net.getParamFromPath(path).dataSync().slice(0, 8));
  }
  fs.writeFileSync("face.json", `${JSON.stringify({ descriptors, faces, weights })}\n`);
}

main();
