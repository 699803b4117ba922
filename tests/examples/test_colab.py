"""The notebook, executed on a tiny model as it stands, but for its cell of parameters."""

import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests import tiny
from tests.patience import patience

ROOT = Path(__file__).parents[2]


def test_the_notebook_makes_pairs_shows_them_trains_and_draws_in_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(line.removeprefix("--config.").split("=", 1) for line in tiny.settings(tmp_path / "inputs", 4, 2))
    photographs = settings.pop("data.photographs")
    for key in ("train.steps", "train.warmup"):  # which the notebook has
        settings.pop(key)
    own = settings | {"data.resolutions": ["32x32"]}
    values = {
        "WORKDIR": str(tmp_path / "W"), "PHOTOGRAPHS": photographs, "MODELS": str(tmp_path / "models"), "DEVICE": "l4",
        "VARIANT": "portraits", "PROMPT": "a woman", "STEPS": {"stage1": 1}, "OWN": own,
    }  # fmt: skip
    notebook = nbformat.read(ROOT / "examples" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    done = NotebookClient(notebook, timeout=patience(200), kernel_name="python3").execute(cwd=str(tmp_path))
    shown = [output for cell in done.cells for output in cell.get("outputs", ())]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # before and after the training, and what diffusers draws
    assert any("IFrame" in str(output.get("data", {}).get("text/plain", "")) for output in shown)
    assert np.asarray(Image.open(tmp_path / "W" / "drawn.png")).std() > 0
    assert (tmp_path / "W" / "export" / "kohya_lora.safetensors").is_file()
    assert (tmp_path / "W" / "run.json").is_file()
