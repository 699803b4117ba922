// Run by face.sh in a folder with the npm packages and the inputs *.raw; writes face.json there.
const fs = require("fs");
const { createRequire } = require("module");

const packages = createRequire(`${process.cwd()}/`);
const faceapi = packages("@vladmandic/face-api/dist/face-api.node-wasm.js");
const folder = "node_modules/@vladmandic/face-api/model";
const round = (value) => Number(value.toPrecision(7));
const rounded = (values) => Array.from(values, round);

function images(size) {
  const data = new Float32Array(fs.readFileSync(`${size}.raw`).buffer.slice(0));
  const length = size * size * 3;
  return Array.from({ length: data.length / length }, (_, i) =>
    faceapi.tf.tensor3d(data.slice(i * length, (i + 1) * length), [size, size, 3]));
}

function centre(points) {
  const mean = (values) => values.reduce((a, b) => a + b) / values.length;
  return { x: mean(points.map(({ x }) => x)), y: mean(points.map(({ y }) => y)) };
}

function fivePoints(landmarks) {
  const [nose, mouth] = [landmarks.getNose(), landmarks.getMouth()];
  const points = [centre(landmarks.getLeftEye()), centre(landmarks.getRightEye()), nose[3], mouth[0], mouth[6]];
  return points.map(({ x, y }) => rounded([x, y]));
}

async function main() {
  await faceapi.tf.setBackend("cpu");
  await faceapi.tf.ready();
  const {
    faceRecognitionNet: recognition, tinyFaceDetector: detector, faceLandmark68Net: landmark,
    faceExpressionNet: expression, ageGenderNet: ageGender,
  } = faceapi.nets;
  for (const net of [recognition, detector, landmark, expression, ageGender]) await net.loadFromDisk(folder);

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

  const [landmarks, expressions, people] = [[], [], []];
  for (const image of images(112)) {
    landmarks.push(rounded((await landmark.forward(image)).dataSync()));
    const probabilities = Object.entries(await expression.predictExpressions(image));
    expressions.push(Object.fromEntries(probabilities.map(([name, value]) => [name, round(value)])));
    const { age, gender, genderProbability } = await ageGender.predictAgeAndGender(image);
    people.push({ age: round(age), gender, genderProbability: round(genderProbability) });
  }

  const points = [];
  for (const image of images(112)) {
    const framed = image.pad([[56, 56], [56, 56], [0, 0]]);
    const options = new faceapi.TinyFaceDetectorOptions({ inputSize: 224 });
    points.push(fivePoints((await faceapi.detectSingleFace(framed, options).withFaceLandmarks()).landmarks));
  }

  const weights = {};
  for (const [net, paths] of [[recognition, ["conv32_1/conv2/conv/filters", "conv64_2/conv1/conv/filters", "fc"]],
    [detector, ["conv2/depthwise_filter", "conv8/bias"]]]) {
    for (const path of paths) weights[path] = rounded(net.getParamFromPath(path).dataSync().slice(0, 8));
  }
  const answers = { descriptors, faces, landmarks, expressions, people, points, weights };
  fs.writeFileSync("face.json", `${JSON.stringify(answers)}\n`);
}

main();
