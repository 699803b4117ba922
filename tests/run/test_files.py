"""Files are whole or absent, a folder has one owner, and content is read once."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.data import shards
from hgdpo_jax.data.record import features
from hgdpo_jax.models.weights import write_weights
from hgdpo_jax.pictures.read import image_shape
from hgdpo_jax.pictures.write import write_png
from hgdpo_jax.run import command, files
from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import atomic_path, file_hash, filled, finish_filling, is_empty, retried, write_json
from hgdpo_jax.run.folder import require_plain
from hgdpo_jax.run.index import Index
from hgdpo_jax.run.locks import lock, lock_owner
from tests import tiny


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file", "folder"])
def test_what_takes_its_name_is_on_the_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real = {"fsync": os.fsync, "replace": os.replace}
    monkeypatch.setattr(os, "fsync", lambda f: done.append(os.readlink(f"/proc/self/fd/{f}")) or real["fsync"](f))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("renamed") or real["replace"](*names))
    with atomic_path(tmp_path / name) as temporary:
        if name == "folder":
            temporary.mkdir()
            (temporary / "a").write_text("a")
        else:
            temporary.write_text("a")
    written = [str(tmp_path / ".partial.folder" / "a")] * (name == "folder") + [str(tmp_path / f".partial.{name}")]
    assert done == [*written, "renamed", str(tmp_path)]


@pytest.fixture
def small_files() -> Iterator[None]:
    """As on a full disk, no file can grow beyond 10 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _shard(folder: Path) -> None:
    records = [tiny.record(str(i), np.random.default_rng(i), (16, 16, 8)) for i in range(4)]
    shards.write_shard(shards.shard_path(folder, "train", 0, 1), features(8, 77, loser=True), records)


def _weights(folder: Path) -> None:
    write_weights(folder / "model.safetensors", {"a": np.zeros(10_000, np.float32)}, np.float32)


def _picture(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    write_png(folder / "a.png", noise, {})


@pytest.mark.parametrize("write", [_shard, _weights, _picture])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    write: Callable[[Path], None], tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        command.run(lambda: write(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and line.startswith("error: ") and "free some disk space" in line
    assert f"while {tmp_path}/" in line
    assert not list(tmp_path.iterdir())


OWNER = """
import signal, sys
from pathlib import Path
from hgdpo_jax.run.locks import lock
with lock(Path(sys.argv[1])):
    print("mine", flush=True)
    signal.pause()
"""


OUTSIDE = """
import os, sys
from pathlib import Path
from hgdpo_jax.run.files import filled, finish_filling, is_empty
from hgdpo_jax.run.locks import lock, lock_owner
out, target = Path(sys.argv[1]), os.path.realpath(sys.argv[1])
def deny(event, given):
    # As where the folder is a mount, or the folder around it another user's.
    if event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.truncate", "os.symlink", "os.link"):
        paths = [str(path) for path in given if isinstance(path, (str, os.PathLike))]
    elif event == "open" and isinstance(given[0], str) and given[2] & (os.O_WRONLY | os.O_RDWR):
        paths = [given[0]]
    else:
        return
    for path in paths:
        real = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        if not real.startswith(target + "/"):
            raise PermissionError(13, f"{event} {path}")
sys.addaudithook(deny)
with lock(out):
    assert lock_owner(out)
    assert is_empty(out)
    with filled(out, "mark.json", {"a": 1}) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("w")
        (folder / "README.md").write_text("r")
    finish_filling(out, "mark.json")
assert not lock_owner(out)
"""


@pytest.mark.parametrize("kind", ["folder", "link", "link to a link", ".", "x" * 249, "x" * 255, "new file system"])
def test_a_folder_is_written_from_inside(kind: str, tmp_path: Path) -> None:
    """What it is, and what is around it, may be anything."""
    folder = tmp_path / (kind if kind.startswith("x") else "folder")
    folder.mkdir()
    given = folder
    for name in {"link": ["a"], "link to a link": ["b", "c"]}.get(kind, []):
        (tmp_path / name).symlink_to(given)
        given = tmp_path / name
    if kind == "new file system":
        (folder / "lost+found").mkdir()
    before = {*tmp_path.iterdir()}
    env = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    argument = "." if kind == "." else str(given)
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, argument], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} - {"lost+found"} == {"unet", "README.md", "mark.json"}
    assert (folder / "unet" / "weights").read_text() == "w" and {*tmp_path.iterdir()} == before


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_what_was_killed_while_it_moved_up_is_finished(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moved` files had the time."""

    def killed(*names: Path) -> None:
        if len([*tmp_path.iterdir()]) - 1 == moved:  # beside the folder they come from
            raise KeyboardInterrupt
        replace(*names)

    finish = files.finish_filling
    replace = os.replace
    monkeypatch.setattr(files, "finish_filling", lambda *_: None)
    with filled(tmp_path, "mark", {"a": 1}) as folder:
        for name in ("a", "z"):
            (folder / name).write_text(name)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, "mark")
    assert not (tmp_path / "mark").exists()
    monkeypatch.undo()
    finish_filling(tmp_path, "mark")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "mark", "z"]


@pytest.mark.parametrize("killed", [True, False])
def test_what_was_not_written_whole_is_taken_away(killed: bool, tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    if killed:
        (tmp_path / ".partial" / "unet").mkdir(parents=True)
        (tmp_path / ".partial" / "a").write_text("half")
    else:
        with pytest.raises(ZeroDivisionError), filled(tmp_path, "mark", {}) as folder:
            (folder / "a").write_text("half")
            raise ZeroDivisionError
    assert is_empty(tmp_path)
    finish_filling(tmp_path, "mark")
    assert [path.name for path in tmp_path.iterdir()] == ["lost+found"]


@pytest.mark.parametrize(
    "name", ["file/run", "link/run", "link", "x" * 256, "a/" + "x" * 300, "/dev/null/run", "/proc/run"]
)
def test_a_place_where_no_folder_can_be_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = {*tmp_path.iterdir()}
    with pytest.raises(UserError, match="cannot be written .*; choose another folder") as error, lock(tmp_path / name):
        pass
    assert "\n" not in str(error.value) and {*tmp_path.iterdir()} == before


def test_a_folder_that_a_command_made_and_did_not_fill_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises(UserError), lock(tmp_path / "a" / "b" / "c"):
        raise UserError("refused")
    assert not list(tmp_path.iterdir())
    with lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]
    with lock(tmp_path / "a"):  # which was there
        (tmp_path / "a" / "kept").unlink()
    assert (tmp_path / "a").is_dir()


def test_a_folder_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = r"file/run/stage1: cannot be written \(Not a directory\); choose another"
    with pytest.raises(UserError, match=line), lock(tmp_path / "file" / "run" / "stage1"):
        pass


def test_who_owns_a_folder_is_asked_as_nfs_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a lock needs a file that is open for writing."""
    modes = []

    def flock(descriptor: int, _: int) -> None:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)

    with lock(tmp_path / "stage1"):
        monkeypatch.setattr(fcntl, "flock", flock)
        assert lock_owner(tmp_path / "stage1") is None and modes == [os.O_RDWR]


def test_a_folder_has_one_owner_and_a_dead_ones_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "stage1"
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        line = rf"stage1: is being written by .*\(process {process.pid} on "
        with pytest.raises(UserError, match=line), lock(folder):
            pass
        assert f"process {process.pid}" in str(lock_owner(folder))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert lock_owner(folder) is None
    with lock(folder):
        assert f"process {os.getpid()}" in str(lock_owner(folder))
    assert lock_owner(folder) is None and not list(folder.iterdir())


def test_content_is_read_again_only_when_the_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = file_hash
    monkeypatch.setattr("hgdpo_jax.run.index.file_hash", lambda path: read.append(path) or real(path))
    picture = tmp_path / "a.png"
    Image.new("RGB", (30, 20)).save(picture)
    index = Index(tmp_path / "content.json")
    first = index.hash(picture)
    assert index.shape(picture, image_shape) == (20, 30)
    index.save()
    again = Index(tmp_path / "content.json")
    assert again.hash(picture) == first and read == [picture]
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("was opened"))
    assert again.shape(picture, image_shape) == (20, 30)
    monkeypatch.undo()
    Image.new("RGB", (10, 40)).save(picture)
    os.utime(picture, ns=(0, time.time_ns()))
    assert again.hash(picture) != first and again.shape(picture, image_shape) == (40, 10)
    read.clear()
    monkeypatch.setattr("hgdpo_jax.run.index.file_hash", lambda path: read.append(path) or real(path))
    os.utime(picture, ns=(0, 1))  # of the same size
    assert again.hash(picture) and read == [picture]


LEARN = """
import sys
from pathlib import Path
from hgdpo_jax.run.index import Index
path, own = Path(sys.argv[1]), map(Path, sys.argv[2:])
for file in own:
    index = Index(path)
    index.hash(file)
    index.save()
print("done")
"""


def test_commands_that_learn_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    files = [[tmp_path / f"{process}-{i}" for i in range(12)] for process in range(3)]
    for file in (file for own in files for file in own):
        file.write_text(file.name)
    path = tmp_path / "run" / "content.json"
    path.parent.mkdir()
    commands = [[sys.executable, "-c", LEARN, str(path), *map(str, own)] for own in files]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate()[0] for process in running] == ["done\n"] * 3
    assert set(json.loads(path.read_text())) == {str(file) for own in files for file in own}
    assert [entry.name for entry in path.parent.iterdir()] == ["content.json"]


def test_what_another_learnt_meanwhile_is_kept_and_what_changed_is_the_newest(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    path = tmp_path / "content.json"
    one, two = Index(path), Index(path)
    one.learn([tmp_path / "a", tmp_path / "none", tmp_path])
    two.learn([tmp_path / "a", tmp_path / "b"])
    one.save()
    (tmp_path / "a").write_text("changed")
    changed = two.hash(tmp_path / "a")
    two.save()
    one.save()  # nothing new
    kept = json.loads(path.read_text())
    assert {name for name, entry in kept.items() if entry[2]} == {str(tmp_path / name) for name in "ab"}
    assert kept[str(tmp_path / "a")][2] == changed != file_hash(tmp_path / "b")


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"a": 1}', '{"a": [1, 2]}', '{"a": null}', "\xff"])
def test_an_index_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "content.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"content.json: not JSON \(.*\); remove it, it will be made again"):
        Index(tmp_path / "content.json")


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENFILE])
def test_an_error_that_may_pass_is_waited_for_and_then_ends_the_command(
    code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    answers = [OSError(code, os.strerror(code))] * 2 + ["content"]

    def read() -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert retried(read, "a.jpg") == "content" and slept == [1, 3] and "trying again in 3 s" in caplog.text
    answers = [OSError(code, os.strerror(code))] * 9
    with pytest.raises(UserError, match=rf"a.jpg: cannot be read \({os.strerror(code)}\), nor could it be for 44 s"):
        retried(read, "a.jpg")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No"), PermissionError(errno.EACCES, "No"),
                                   OSError("image file is truncated"), ValueError("no number")])  # fmt: skip
def test_what_is_wrong_with_the_file_is_not_waited_for(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(type(error)):
        retried(Mock(side_effect=error), "a.jpg")


def test_a_lock_leaves_no_folder_that_it_made(tmp_path: Path) -> None:
    with lock(tmp_path / "run" / "stage1" / "pairs"):
        assert (tmp_path / "run" / "stage1").is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run" / "stage1" / "pairs"):
        (tmp_path / "run" / "stage1" / "pairs" / "manifest.json").touch()
    assert [entry.name for entry in (tmp_path / "run" / "stage1" / "pairs").iterdir()] == ["manifest.json"]
    with pytest.raises(ZeroDivisionError), lock(tmp_path / "other" / "out"):
        raise ZeroDivisionError
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_what_several_processes_write_at_once_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "building.json"
    with atomic_path(path, shared=True) as first:
        first.write_text("1")
        write_json(path, {"seed": 2}, shared=True)
        assert json.loads(path.read_text()) == {"seed": 2}
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a[1]", "[abc]", "a*", "a?"])
def test_a_workdir_that_checkpoints_would_take_for_a_pattern_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its path holds .* which checkpoints cannot be written under"):
        command.parse(command.run_parser(""), ["--config", "configs/stage1.py", "--workdir", str(tmp_path / name)])
    with pytest.raises(UserError, match="choose another folder"):
        require_plain(tmp_path / name / "stage1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://bucket/run"])
def test_object_storage_is_no_place_for_a_run(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: is object storage, .* NFS, Lustre, Filestore"):
        command.parse(command.run_parser(""), ["--config", "configs/stage1.py:portraits", "--workdir", name])
