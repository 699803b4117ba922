"""Networks of the user's that read aligned faces: ONNX files whose input is RGB in [-1, 1], [n, 3, 112, 112]."""

from pathlib import Path

import numpy as np
from jaxtyping import Array, Float

from hgdpo_jax.faces.alignment import ALIGNED_SIZE
from hgdpo_jax.run.errors import UserError


class AlignedFaceNetwork:
    """One of them.

    Args:
        path: of the file.
        kind: what is expected, for errors.

    Raises:
        UserError: no such file, not ONNX, or a network with another input.
    """

    def __init__(self, path: str, kind: str) -> None:
        if not Path(path).is_file():
            raise UserError(f"face network {path}: no such file; give {kind} ONNX file")
        import onnxruntime  # only who brings a network of that kind needs it

        try:
            # Without a second try on the same processor, of which it would print five lines.
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"], enable_fallback=0)
        except Exception as error:  # onnxruntime's errors have no class in common
            reason = " ".join(str(error).split())
            raise UserError(f"face network {path}: not an ONNX file that can be read ({reason})") from error
        inputs = self._session.get_inputs()
        count, *shape = inputs[0].shape
        if len(inputs) > 1 or shape != [3, ALIGNED_SIZE, ALIGNED_SIZE] or (isinstance(count, int) and count != 1):
            shapes = " and ".join(f"{entry.name} {entry.shape}" for entry in inputs)
            raise UserError(
                f"face network {path}: its input is {shapes}; give {kind} network, whose input is "
                f"[n, 3, {ALIGNED_SIZE}, {ALIGNED_SIZE}]"
            )
        self._input = inputs[0].name

    def __call__(self, faces: Float[Array, "n 112 112 3"]) -> Float[np.ndarray, "n d"]:
        """Its first output of each face."""
        # One by one: many files are exported with a batch of one.
        pixels = np.asarray(faces, np.float32).transpose(0, 3, 1, 2)
        return np.concatenate([self._session.run(None, {self._input: face[None]})[0] for face in pixels])
