"""The converter of pickles: what torch.save and Lightning wrote in any year is read, and nothing in it is run."""

import argparse
import collections
import datetime
import pathlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tools.from_pickle import main, read


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package with a callback and a dictionary of its own, which is there while a checkpoint is written."""
    module = type(sys)("pytorch_lightning")
    for name, base in (("Callback", object), ("AttributeDict", dict)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


WEIGHTS = collections.OrderedDict(
    a=torch.arange(3.0),
    half=torch.ones(2, dtype=torch.float16),
    brain=torch.ones(2, 2, dtype=torch.bfloat16),
    view=torch.arange(6.0).reshape(2, 3).T,
    parameter=torch.nn.Parameter(torch.ones(2)),
    scalar=torch.tensor(4),
    array=np.arange(4, dtype=np.float32).reshape(2, 2).T,
    other_bytes=np.arange(3, dtype=">f4"),
)


@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (False, 2), (True, 4), (True, 5)])
def test_the_weights_of_a_training_are_read_without_what_wrote_it(
    zipped: bool, protocol: int, lightning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = {
        "state_dict": WEIGHTS,
        "callbacks": {lightning.Callback: {"best_model_score": np.float32(3)}, lightning.Callback(): 1},
        "hyper_parameters": lightning.AttributeDict(lr=np.float64(1), of=argparse.Namespace(a=1)),
        "when": datetime.datetime(2022, 8, 1, tzinfo=datetime.UTC),
        "others": [pathlib.PurePosixPath("x"), {1, 2}, 3j, b"\x80", torch.float16, torch.device("cpu"), slice(1, 2)],
        "containers": [collections.Counter("aab"), collections.defaultdict(list, a=[1]), collections.deque([1])],
        "random": [np.random.default_rng(0), np.random.RandomState(0).get_state(), torch.get_rng_state()],
        "objects": np.array([None, {"a": 1}], object),
    }
    path = tmp_path / "model.ckpt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    main([str(path)], tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        expected = torch.from_numpy(np.array(value, np.float32)) if isinstance(value, np.ndarray) else value.data
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)


class Runs:
    """Would make a file when it is read."""

    def __init__(self, path: Path, function: Any) -> None:
        self.path, self.function = path, function

    def __reduce__(self) -> Any:
        return self.function, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [Path.touch, eval, np.load, torch.load, exec])
def test_no_code_of_a_pickle_is_run(zipped: bool, function: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    inside = f"open({str(mark)!r}, 'w')" if function in (eval, exec) else mark
    state = {"a": torch.ones(1), "x": Runs(inside, function)}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert read(str(tmp_path / "x.pt")).keys() == {"a"}
    assert not mark.exists()


def _broken(folder: Path, kind: str) -> Path:
    path = folder / "x.pt"
    if kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif kind == "page":
        path.write_text("<html>")
    elif kind == "half":
        torch.save({"a": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind != "absent":
        torch.save({"list": [torch.ones(1)], "empty": {}, "model": torch.nn.Linear(2, 2)}[kind], path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("script", "is a TorchScript program, not weights"),
        ("page", "cannot be read as torch.save writes it"),
        ("half", "cannot be read as torch.save writes it"),
        ("absent", "No such file or directory"),
        ("list", "holds no tensors that have names"),
        ("empty", "holds no tensors that have names"),
        ("model", "holds no tensors that have names"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_leaves_nothing(kind: str, message: str, tmp_path: Path) -> None:
    path, target = _broken(tmp_path, kind), tmp_path / "y.safetensors"
    with pytest.raises(SystemExit) as error:
        main([str(path)], target)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and message in line and "\n" not in line
    assert not target.exists() and {*tmp_path.iterdir()} <= {path}


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    (tmp_path / "y.safetensors").write_text("mine")
    with pytest.raises(SystemExit, match=r"y\.safetensors: is there already; give another name"):
        main([str(tmp_path / "x.pt")], tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_text() == "mine"
