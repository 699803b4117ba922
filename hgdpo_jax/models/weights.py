"""Weights on disk: safetensors files, whole or in shards, read tensor by tensor."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hgdpo_jax.errors import UserError

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Weights(Mapping[str, np.ndarray]):
    """Key → array of some safetensors files. Every look-up reads that one tensor; nothing is mapped or kept.

    Args:
        files: whole files, or the shards of one.

    Raises:
        UserError: a file is missing, a pickle, or not a whole safetensors file.
    """

    def __init__(self, *files: Path) -> None:
        self.files = files
        self.metadata: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        for path in files:
            refuse_pickle(path)
            if not path.is_file():
                raise UserError(f"{path}: no such file")
            try:
                # Memory-mapped pages would count as ours until the last tensor is read.
                handle = safe_open(path, "numpy", backend="pread")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
            self.metadata |= handle.metadata() or {}
            self._handles |= dict.fromkeys(handle.keys(), handle)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._handles[key].get_slice(key).get_shape())

    def __getitem__(self, key: str) -> np.ndarray:
        return self._handles[key].get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def open_folder(folder: Path) -> Weights:
    """The weights of a model folder: one file or shards, full precision before `fp16`, as diffusers names them.

    Raises:
        UserError: there are none, only pickles, or a shard is missing.
    """
    for variant in ("", ".fp16"):
        for stem in STEMS:
            whole = folder / f"{stem}{variant}.safetensors"
            if whole.is_file():
                return Weights(whole)
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                for shard in shards:
                    if not (folder / shard).is_file():
                        raise UserError(f"{folder / shard}: no such file; {index.name} names it")
                return Weights(*(folder / shard for shard in shards))
    for path in sorted(folder.glob("*")):
        refuse_pickle(path)
    raise UserError(f"{folder}: no weights; expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a pickle, which can run code when it is opened, with the command that converts it."""
    if path.suffix in PICKLES:
        source, target = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(".safetensors")))
        code = (
            "import sys, torch; from safetensors.torch import save_file; a, b = sys.argv[1:]; "
            "d = torch.load(a, map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
            "save_file({k: v.clone().contiguous() for k, v in d.items() if isinstance(v, torch.Tensor)}, b)"
        )
        raise UserError(
            f'{path}: is a pickle; convert it where PyTorch is installed: python -c "{code}" {source} {target}'
        )
