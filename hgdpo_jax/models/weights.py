"""Weights on disk: safetensors files, whole or in shards, read and written tensor by tensor."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path, shipped

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_PICKLED = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))  # how their files begin
CONVERTER = shipped("tools") / "from_pickle.py"  # for where PyTorch is installed
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


class _Place(NamedTuple):
    """Where a tensor is."""

    file: Path
    begin: int  # byte in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


class Weights(Mapping[str, np.ndarray]):
    """Key → array of some safetensors files. A look-up maps one tensor into memory, read-only, and checks its numbers.

    Args:
        files: whole files, or the shards of one.

    Raises:
        UserError: a file is missing, a pickle, in 8 bits, or not a whole safetensors file; at a look-up, the tensor
            holds NaN or infinity, or its dtype is not read.
    """

    def __init__(self, *files: Path) -> None:
        self.files = files
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        for path in files:
            refuse_pickle(path)
            if not path.is_file():
                raise UserError(f"{path}: is a folder; expected a file" if path.is_dir() else f"{path}: no such file")
            try:
                with safe_open(path, "numpy"):
                    pass  # it has checked that the header is sound and the file as long as it says
            except (SafetensorError, OSError) as error:
                if _begins_as_a_pickle(path):
                    raise UserError(_how_to_convert([path])) from error
                raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            self.metadata |= header.pop("__metadata__", {})
            for key, entry in header.items():
                if entry["dtype"].startswith("F8"):
                    raise UserError(f"{path}: is in 8 bits (weight {key} has dtype {entry['dtype']}); take the file in "
                                    "16 or 32 bits")  # fmt: skip
                begin = 8 + length + entry["data_offsets"][0]
                self._places[key] = _Place(path, begin, tuple(entry["shape"]), entry["dtype"])

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._places[key].shape

    def size(self, key: str, axis: int = 0) -> int:
        """One of a tensor's sizes, without reading it. Raises UserError where it has not so many."""
        path, _, shape, _ = self._places[key]
        if axis >= len(shape):
            raise UserError(f"{path}: weight {key} is {shape}; it is of another model, or broken")
        return shape[axis]

    def __getitem__(self, key: str) -> np.ndarray:
        path, begin, shape, dtype = self._places[key]
        if dtype not in _DTYPES:
            raise UserError(f"{path}: weight {key} has dtype {dtype}; expected one of {', '.join(_DTYPES)}")
        if not math.prod(shape):  # nothing can be mapped
            return np.empty(shape, jnp.dtype(_DTYPES[dtype]))
        # One mapping a tensor: the pages of a mapped whole file would count as ours until its last tensor is read.
        values = np.asarray(np.memmap(path, jnp.dtype(_DTYPES[dtype]), "r", begin, (math.prod(shape),)))
        if not np.isfinite(values).all():
            raise UserError(f"{path}: weight {key} has NaN or infinity; the file is broken, take another")
        return values.reshape(shape)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class LazyWeights(Mapping[str, np.ndarray]):
    """Key → array, made by a function of its own at each look-up."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = makers

    def __getitem__(self, key: str) -> np.ndarray:
        return self._makers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def under(weights: Weights, prefix: str, unused: str = "$^") -> LazyWeights:
    """What lies under a prefix of the keys, without it, but for the keys in which a pattern is found."""
    found = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
    return LazyWeights(
        {name: partial(weights.__getitem__, key) for name, key in found.items() if not re.search(unused, name)}
    )


def chosen(names: Container[str]) -> str | None:
    """The name of the weights among the files of a model folder: one file, or the index of shards; None if it has none.

    Full precision comes before the variant that diffusers calls `fp16`.
    """
    for variant in ("", ".fp16"):
        for stem in STEMS:
            for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
                if name in names:
                    return name
    return None


def shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        UserError: it is not an index.
    """
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weights ({error}); copy it again") from error


def open_folder(folder: Path) -> Weights:
    """The weights of a model folder: one file or shards; see :func:`chosen`.

    Raises:
        UserError: there are none, only pickles, or a shard is missing.
    """
    name = chosen({path.name for path in folder.glob("*")})
    if name is None:
        refuse_pickle(*sorted(path for path in folder.glob("*.bin") if "pytorch_model" in path.name))
        raise UserError(f"{folder}: no weights; expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")
    if not name.endswith(".json"):
        return Weights(folder / name)
    for shard in shards(folder / name):
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard}: no such file; {name} names it")
    return Weights(*(folder / shard for shard in shards(folder / name)))


def copy_model(source: Path, target: Path) -> None:
    """Copies a model folder as it is: its configs, and the weights that :func:`chosen` chooses, under the names that
    are read without a variant.

    Raises:
        UserError: see :func:`open_folder`.
    """
    weights = open_folder(source).files
    name = chosen({path.name for path in source.glob("*")})
    assert name is not None  # or it had not been opened
    target.mkdir()
    configs = [path for path in sorted(source.glob("*.json")) if ".safetensors.index" not in path.name]
    for path in (*configs, *weights):
        shutil.copyfile(path, target / path.name)
    if name.endswith(".json"):  # shards are found by their names in it
        shutil.copyfile(source / name, target / name.replace(".fp16", ""))
    else:
        (target / name).rename(target / name.replace(".fp16", ""))


def write_weights(
    path: Path, tensors: Mapping[str, np.ndarray], dtype: DTypeLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file. Only one tensor at a time is copied.

    Args:
        path: of the file.
        tensors: key → array.
        dtype: that of the file; whole numbers keep their own.
        metadata: of the header, beside the format.
    """

    def own(tensor: np.ndarray) -> np.dtype:
        return tensor.dtype if np.issubdtype(tensor.dtype, np.integer) else jnp.dtype(dtype)

    names = {jnp.dtype(known): name for name, known in _DTYPES.items()}
    # Wide numbers first, as safetensors writes them: all begin at multiples of their size.
    ordered = sorted(tensors.items(), key=lambda item: (-own(item[1]).itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.size * own(tensor).itemsize
        header[key] = {"dtype": names[own(tensor)], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(np.ascontiguousarray(tensor, own(tensor)).tobytes())


def refuse_pickle(*paths: Path) -> None:
    """Raises UserError for a pickle, which can run code when it is opened, with the command that converts it.

    Args:
        paths: one file, or all shards of one.
    """
    pickles = [path for path in paths if path.suffix.lower() in PICKLES]
    if pickles:
        raise UserError(_how_to_convert(pickles))


def _begins_as_a_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLED)


def _how_to_convert(pickles: Sequence[Path]) -> str:
    first = pickles[0]
    # transformers' file has a name of its own as a pickle; shards become one file.
    stem = re.sub(r"^pytorch_model", "model", re.sub(r"-\d+-of-\d+$", "", first.stem))
    target = first.with_name(f"{stem}.safetensors")
    target = first.with_name(f"{stem}_converted.safetensors") if target == first else target
    command = shlex.join([str(path) for path in (CONVERTER, *pickles, target)])
    return f"{first}: is a pickle; convert it where PyTorch is installed: python {command}"
