"""The README's first command, `bash launch/demo.sh`: the whole of it on a tiny model, and what it takes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from flax import nnx

from hgdpo_jax.config import ASSETS
from hgdpo_jax.run.settings import load_config
from hgdpo_jax.scoring.judges import Judges
from hgdpo_jax.training.finished import with_trained_adapter
from hgdpo_jax.training.policy import load_trainable
from tests import tiny
from tests.patience import patience

SCRIPT = Path(__file__).parents[2] / "launch" / "demo.sh"


def test_the_demo_ends_with_a_report_and_a_model(tmp_path: Path) -> None:
    """Its looks at a training, its judge and its networks for faces are those of every run."""
    judge = {"evaluate.scorer": ASSETS / "portraits" / "judge"}
    settings = tiny.settings(tmp_path / "inputs", train=4, heldout=2, **judge)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    # Users have none of these packages.
    absent = 'import sys\nsys.modules.update(dict.fromkeys(("torch", "diffusers", "peft")))\n'
    (programs / "sitecustomize.py").write_text(absent)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(programs),
        "VIRTUAL_ENV": sys.prefix,  # so that the script looks whether the tests' environment will do
        "PIP_NO_INDEX": "1",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    run = tmp_path / "my run"
    command = ["bash", str(SCRIPT), str(run), *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience(200))
    assert done.returncode == 0, done.stderr
    assert "is not used" not in done.stderr
    results = json.loads((run / "results.json").read_text())
    models = {"base", "easy", "normal", "hard", "hard + text encoder", "naive"}
    assert models == results["models"].keys() and "hard - naive" in results["differences"]
    page = (run / "report.html").read_text()
    assert all(name in page for name in models)
    assert (run / "export" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_the_embedded_models_fit_each_other(tmp_path: Path) -> None:
    config, mesh = load_config("configs/stage3.py:portraits"), tiny.mesh()
    pipeline, encoder = with_trained_adapter(load_trainable(config, mesh), config.adapter, tmp_path, mesh)
    assert pipeline.adapter is not None and encoder is not None
    assert pipeline.licence == "apache-2.0"  # what the card of the demo's export says
    Judges(config.pairs.scorer, config.evaluate.scorer, config.evaluate.other_scorer, config.evaluate.scorers, mesh)


def test_the_embedded_flow_model_is_whole() -> None:
    pipeline = load_trainable(load_config("configs/stage3.py:portraits-flow"), tiny.mesh())
    sizes = [x.size for x in jax.tree.leaves(nnx.state(pipeline.denoiser, nnx.Param)) if isinstance(x, jax.Array)]
    assert sum(sizes) <= 3e6 and pipeline.licence == "apache-2.0"
