"""Pickled PyTorch weights → a safetensors file: python from_pickle.py PICKLE... FILE.safetensors

To be run where PyTorch and safetensors are installed, with or without this package. No code of the pickle is run:
classes that it names, such as Lightning's, are read as empty ones.
"""

import sys

import torch
from safetensors.torch import save_file


def read(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, those that lie in a dictionary of its own included."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    empty = [(type(name.rpartition(".")[2], (), {}), name) for name in unsafe]
    with torch.serialization.safe_globals(empty):
        found = torch.load(path, map_location="cpu", weights_only=True)
    found = found.get("state_dict", found)
    for name, inner in list(found.items()):
        if isinstance(inner, dict):
            found |= {f"{name}.{key}": value for key, value in inner.items()}
    return {key: value.clone().contiguous() for key, value in found.items() if isinstance(value, torch.Tensor)}


if __name__ == "__main__":
    *sources, target = sys.argv[1:]
    save_file({key: value for source in sources for key, value in read(source).items()}, target, {"format": "pt"})
