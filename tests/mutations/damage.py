"""How a file is damaged: its bytes, or what it says."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

# What takes the place of a value in JSON.
_VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 3, 10**7, 10**30, 0.5, float("nan"), float("inf"), "", "x", "1",
                            "../x", "a\nb", "\ud800", [], [0], ["x", None], {}, {"x": []})  # fmt: skip


def of_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four of: a byte changed, a piece cut out, a piece repeated, the end cut off."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(found))) if found else 0
        length = int(rng.integers(1, 17))
        match rng.integers(4):
            case 0 if found:
                found[at] = rng.integers(256)
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length]
            case 3 if rng.random() < 0.3:
                del found[at:]
    return bytes(found)


def of_json(content: bytes, rng: np.random.Generator) -> bytes:
    """One or two values of a JSON file are others, or gone, or there under another name."""
    holder = [json.loads(content)]
    for _ in range(rng.integers(1, 3)):
        place, key = _some_place(holder, rng)
        match rng.integers(5):
            case 0 if isinstance(place, dict):
                del place[key]
            case 1 if isinstance(place, dict):
                place[f"{key}x"] = place.pop(key)
            case 2 if isinstance(place, list):
                place.insert(key, copy.deepcopy(place[key]))
            case _:
                place[key] = copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])
    return json.dumps(holder[0] if holder else None).encode()


def _some_place(value: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A list or an object somewhere in a value, and one of its places; places near the root are the likelier ones."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[rng.integers(len(keys))]
        if not (isinstance(value[key], dict | list) and value[key]) or rng.random() < 0.1:
            return value, key
        value = value[key]


def of_lines(content: bytes, rng: np.random.Generator) -> bytes:
    """As :func:`of_json`, in a line of JSON lines."""
    lines = content.splitlines()
    at = rng.integers(len(lines))
    lines[at] = of_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def of_tensors(content: bytes, rng: np.random.Generator) -> bytes:
    """Some tensors of a safetensors file have another value, shape, dtype or name, or are gone."""
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
    for _ in range(rng.integers(1, 3)):
        name = list(tensors)[rng.integers(len(tensors))]
        x = tensors.pop(name)
        match rng.integers(8):
            case 0:
                name = name[: rng.integers(len(name))] + "x"
            case 1:
                x = x.reshape(-1)
            case 2:
                x = x[..., :-1] if x.ndim else x.reshape(1, 1)
            case 3:
                x = x.astype([np.int32, np.float64, np.bool_, np.uint8, np.float16][rng.integers(5)])
            case 4:
                x = np.full_like(x, [np.nan, np.inf, -np.inf][rng.integers(3)])
            case 5:
                x = x[:0] if x.ndim else x
            case 6:
                x = np.zeros((), x.dtype)
            case 7:
                continue
        tensors[name] = np.ascontiguousarray(x)
    return save(tensors, metadata) if tensors else save({}, metadata)


def of_header(content: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file whose header says something else."""
    length = int.from_bytes(content[:8], "little")
    header = of_json(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def of_arrays(content: bytes, rng: np.random.Generator) -> bytes:
    """An .npz file without one of its arrays, or with another one in its place."""
    arrays, buffer = dict(np.load(io.BytesIO(content))), io.BytesIO()
    name = list(arrays)[rng.integers(len(arrays))]
    del arrays[name]
    if rng.random() < 0.5:
        arrays[name] = np.zeros(rng.integers(0, 3, rng.integers(0, 3)), np.float32)
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def damaged(name: str, content: bytes, rng: np.random.Generator) -> bytes:
    """A damaged file, by the end of its name: half of them say something else, half have other bytes."""
    kinds = {".json": (of_json,), ".jsonl": (of_lines,), ".safetensors": (of_tensors, of_tensors, of_header)}
    kinds[".npz"] = (of_arrays,)
    own = kinds.get(Path(name).suffix, ())
    if not own or rng.random() < 0.35:
        return of_bytes(content, rng)
    return own[rng.integers(len(own))](content, rng)
