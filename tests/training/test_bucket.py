"""Checkpoints in a bucket, which a stand-in of Google Cloud Storage keeps in memory."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.index import Index
from hgdpo_jax.training import inputs, metrics, start
from hgdpo_jax.training.checkpoints import Checkpoints, tree_hash
from hgdpo_jax.training.finished import finished_policy
from hgdpo_jax.training.loop import train
from hgdpo_jax.training.policy import load_trainable, policy_of
from tests import tiny

PLACE = "gs://bucket/runs/mine"
pytestmark = pytest.mark.usefixtures("glance")


DOWNLOAD = objects.download


def download(request: Any, response: Any, storage: Any, *_: Any, **__: Any) -> None:
    """With a header that the stand-in leaves out and TensorStore needs."""
    DOWNLOAD(request, response, storage)
    if response.status < 400:
        about = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = about["generation"]


@pytest.fixture(scope="module", autouse=True)
def _bucket() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://localhost:{port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        patch.setattr(objects, "download", download)
        yield
    server.stop()


def test_a_run_keeps_its_checkpoints_there_and_goes_on_from_them(base: Path, tmp_path: Path) -> None:
    for stage in ("stage1", "stage2"):
        tiny.write_pairs(tmp_path / stage / "pairs")
    for steps in (2, 4):
        train(tiny.config(base, steps=steps, checkpoints=PLACE), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"content.json", "stage1", "stage2"}
    assert {path.name for path in (tmp_path / "stage1").iterdir()} == {"config.json", "logs", "pairs"}
    assert [line["step"] for line in metrics.read(tmp_path / "stage1" / "logs") if "loss/total" in line] == [1, 2, 3, 4]
    config = tiny.config(base, "stage2", start="stage1", steps=2, checkpoints=PLACE)
    checkpoints = Checkpoints(tmp_path / "stage2", PLACE)
    begin = start.start(config, tmp_path, inputs.read(config, tmp_path, Index()), checkpoints)
    like = policy_of(load_trainable(config, tiny.mesh()), config)
    easy = finished_policy(tmp_path, "stage1", like, config)
    found = checkpoints.restore_reference(like, begin.reference_hash)
    assert tree_hash(found) == tree_hash(easy) != tree_hash(like)
    with pytest.raises(
        UserError, match="train.checkpoints=: the checkpoints of .*stage1 are in gs://bucket/runs/mine;"
    ):
        train(tiny.config(base, steps=8), tmp_path)


def test_a_damaged_or_unfinished_checkpoint_there_is_passed_over(tmp_path: Path) -> None:
    place = "gs://bucket/damaged"
    with Checkpoints(tmp_path / "stage1", place) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jax.numpy.arange(1000.0) + step}, {})
    policy = epath.Path(place) / "stage1" / "policy"
    (policy / "3.sha256.json").unlink()  # as where it was killed before it wrote that
    hashes = json.loads((policy / "2.sha256.json").read_text())
    assert Checkpoints(tmp_path / "stage1", place).latest() == 2
    (policy / "2" / next(name for name in hashes if "/d/" in name)).write_bytes(b"other")
    assert Checkpoints(tmp_path / "stage1", place).latest() is None
    with Checkpoints(tmp_path / "stage1", place) as checkpoints:
        checkpoints.save(2, {"x": jax.numpy.arange(1000.0)}, {})
    assert Checkpoints(tmp_path / "stage1", place).latest() == 2
    assert sorted(path.name for path in policy.iterdir()) == ["2", "2.sha256.json"]


def test_a_bucket_that_cannot_be_reached_is_named(base: Path, tmp_path: Path) -> None:
    tiny.write_pairs(tmp_path / "stage1" / "pairs")
    with pytest.raises(UserError, match=r"train.checkpoints=gs://nowhere/run: cannot be reached \(.*nowhere.*\); give"):
        train(tiny.config(base, checkpoints="gs://nowhere/run"), tmp_path)
    assert not (tmp_path / "stage1" / "config.json").exists()
    with pytest.raises(UserError, match="train.checkpoints='s3://bucket/run': expects gs://bucket/folder, or nothing"):
        tiny.config(base, checkpoints="s3://bucket/run")
