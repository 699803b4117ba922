"""Pickled PyTorch weights → a safetensors file: python from_pickle.py PICKLE... FILE.safetensors

To be run where PyTorch, NumPy and safetensors are installed, with or without this package. No code of the pickle is
run: of all that it names only tensors, arrays and ordered dictionaries are made; the rest, such as Lightning's
callbacks, is read as empty objects.
"""

import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file


class _Nothing(dict):
    """Stands for an object of any other class: takes what the pickle gives it, and keeps the items of a dictionary."""

    def __new__(cls, *_: Any, **__: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> "_Nothing":
        return _Nothing()

    def _ignore(self, *_: Any) -> None:
        pass

    __setstate__ = append = extend = add = _ignore
    __hash__ = object.__hash__  # type: ignore[assignment]  # a callback may be a key


# What a pickle may call, by the last part of its module's name, since PyTorch and NumPy have moved these.
_MADE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),  # bytes, in protocol 2
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numeric", "_frombuffer"): np.empty(1).__reduce_ex__(5)[0],
    ("multiarray", "scalar"): np.float32(0).__reduce__()[0],
    ("storage", "UntypedStorage"): torch.UntypedStorage,
    ("torch", "Size"): torch.Size,
    ("_utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("_utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("_utils", "_rebuild_tensor_v3"): torch._utils._rebuild_tensor_v3,
    ("_utils", "_rebuild_parameter"): lambda data, *_: data,
    ("_utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("_tensor", "_rebuild_from_type_v2"): lambda make, _, arguments, __: make(*arguments),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _MADE.get((module.rpartition(".")[2], name), _Nothing)


class _Pickle:
    """What torch.load reads pickles with, in place of the module `pickle`."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **settings: Any) -> Any:
        return _Unpickler(file, **settings).load()


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(value.shape))
    return value.detach().clone().contiguous() if isinstance(value, torch.Tensor) else None


def read(path: str) -> dict[str, torch.Tensor]:
    """The tensors and arrays of a checkpoint, those that lie in a dictionary of its own included.

    Raises:
        ValueError: it is not what torch.save writes, or it holds no tensors with names.
    """
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError("is a TorchScript program, not weights")
    try:
        found = torch.load(path, map_location="cpu", pickle_module=_Pickle, weights_only=False)
    except Exception as error:  # torch's and pickle's errors have no class in common
        raise ValueError(f"cannot be read as torch.save writes it ({' '.join(str(error).split())[:200]})") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    for name, inner in list(found.items()):
        if isinstance(inner, dict):
            found |= {f"{name}.{key}": value for key, value in inner.items()}
    named = {key: _tensor(value) for key, value in found.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if value is not None}
    if not tensors:
        raise ValueError("holds no tensors that have names")
    return tensors


def main(sources: list[str], target: Path) -> None:
    """Writes the tensors of all sources into one file. Exits with a line where that cannot be done."""
    if target.exists():
        sys.exit(f"{target}: is there already; give another name")
    tensors: dict[str, torch.Tensor] = {}
    for source in sources:
        try:
            tensors |= read(source)
        except (OSError, ValueError) as error:
            sys.exit(f"{source}: {error.strerror if isinstance(error, OSError) else error}")
    partial = target.with_name(f".partial.{target.name}")
    try:
        save_file(tensors, partial, {"format": "pt"})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__.splitlines()[0])
    main(sys.argv[1:-1], Path(sys.argv[-1]))
