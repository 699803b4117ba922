"""The README's first command, `bash launch/demo.sh`, in a few steps on a few of its photographs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import tiny
from tests.patience import patience

SCRIPT = Path(__file__).parents[2] / "launch" / "demo.sh"


def test_the_demo_ends_with_a_report_and_a_model(tmp_path: Path) -> None:
    values = {
        "data.photographs": tiny.write_photographs(tmp_path / "photographs", train=4, heldout=2),
        "pairs.pool_size": 2,
        "pairs.steps": 2,
        "pairs.batch": 4,
        "train.steps": 1,
        "train.batch": 2,
        "evaluate.images_per_prompt": 1,
        "evaluate.steps": 2,
        "evaluate.batch": 4,
    }
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # that of the tests, whatever is active, without what users do not have
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "bin" / "sitecustomize.py").write_text(
        'import sys\nsys.modules.update(dict.fromkeys(("torch", "diffusers", "peft")))\n'
    )
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": f"{tmp_path}/bin",
        "PIP_NO_INDEX": "1",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    command = ["bash", str(SCRIPT), f"{tmp_path}/run", *(f"--config.{key}={value}" for key, value in values.items())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience(300))
    assert done.returncode == 0, done.stderr
    assert "is not used" not in done.stderr  # the tests' environment
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"base", "easy", "normal", "hard", "hard + text encoder", "naive"} <= results["models"].keys()
    assert "personalised" in results
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(name in page for name in results["models"])
    assert (tmp_path / "run" / "export" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
