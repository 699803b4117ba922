"""Converts the face networks of the npm package @vladmandic/face-api.

python -m tools.make_assets.face MODEL_FOLDER OUT      package/model → OUT/recognition, OUT/detector, OUT/landmarks
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from hgdpo_jax.devices.start import start
from hgdpo_jax.faces.landmarks import FaceLandmarks
from hgdpo_jax.faces.networks import FaceRecognition, TinyFaceDetector
from hgdpo_jax.models.convert import Model, abstract, from_torch, save_model, to_torch_layout
from hgdpo_jax.run import command
from hgdpo_jax.run.errors import UserError
from tools.make_assets.attributes import AgeGender, FaceExpression


def read_manifest(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Name → float32 array of a TensorFlow.js model: float32 as it is, 8-bit weights as scale · byte + min.

    Raises:
        UserError: a file is missing, or is not such a model.
    """
    path = folder / f"{name}-weights_manifest.json"
    found: dict[str, np.ndarray] = {}
    try:
        for group in json.loads(path.read_text()):
            data = b"".join((folder / file).read_bytes() for file in group["paths"])
            begin = 0
            for entry in group["weights"]:
                step = entry.get("quantization")
                values = np.frombuffer(data, np.uint8 if step else "<f4", math.prod(entry["shape"]), begin)
                begin += values.nbytes
                if step:  # in double precision as JavaScript has it, rounded once
                    values = (values * np.float64(step["scale"]) + step["min"]).astype(np.float32)
                found[entry["name"]] = values.reshape(entry["shape"])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; expected the folder model of @vladmandic/face-api") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of TensorFlow.js, or its data are short ({error})") from error
    return found


def recognition_weights(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch key → array in torch's layout, the scale layers folded: (x * k + b) s + t = x * (k s) + (b s + t)."""
    weights = {"fc.weight": to_torch_layout("kernel", stored["fc"])}
    for name in stored:
        layer = name.removesuffix("/conv/filters")
        if layer != name:
            scale, shift = stored[f"{layer}/scale/weights"], stored[f"{layer}/scale/biases"]
            key = layer.replace("/", ".")
            weights[f"{key}.weight"] = to_torch_layout("kernel", stored[name] * scale)
            weights[f"{key}.bias"] = stored[f"{layer}/conv/bias"] * scale + shift
    return weights


def layer_weights(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch key → array in torch's layout, of the networks without scale layers."""
    weights = {}
    for name, value in stored.items():
        layer, _, kind = name.rpartition("/")
        key = layer.replace("/", ".")
        dense = f"{key}.pointwise" if f"{layer}/pointwise_filter" in stored else key
        if kind == "depthwise_filter":  # [h, w, c, 1], where a convolution in groups has [h, w, 1, c]
            weights[f"{key}.depthwise.weight"] = to_torch_layout("kernel", value.swapaxes(2, 3))
        elif kind == "bias":
            weights[f"{dense}.bias"] = value
        else:
            weights[f"{dense}.weight"] = to_torch_layout("kernel", value)
    return weights


# Network → name of its files in the package, settings of its config.json, converter.
_NETWORKS: dict[type[nnx.Module], tuple[str, dict[str, int], Callable[..., dict[str, np.ndarray]]]] = {
    FaceRecognition: ("face_recognition_model", {"image_size": 150}, recognition_weights),
    TinyFaceDetector: ("tiny_face_detector_model", {}, layer_weights),
    FaceLandmarks: ("face_landmark_68_model", {}, layer_weights),
    FaceExpression: ("face_expression_model", {}, layer_weights),
    AgeGender: ("age_gender_model", {}, layer_weights),
}


def from_npm(folder: Path, cls: type[Model]) -> Model:
    """A face network, float32, from the package's own files.

    Args:
        folder: `model` of the package.
        cls: FaceRecognition, TinyFaceDetector, FaceLandmarks, FaceExpression or AgeGender.

    Raises:
        UserError: a file is missing or damaged, or holds another network.
    """
    name, settings, convert = _NETWORKS[cls]
    model = abstract(cls, {"architectures": [cls.__name__], **settings})
    from_torch(convert(read_manifest(folder, name)), model, str(folder / name))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODEL_FOLDER", help="package/model")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    start()
    for name, cls in (("recognition", FaceRecognition), ("detector", TinyFaceDetector), ("landmarks", FaceLandmarks)):
        save_model(from_npm(arguments.models, cls), arguments.out / name, np.float16)
    print(f"face networks in {arguments.out}")


if __name__ == "__main__":
    command.run(main)
