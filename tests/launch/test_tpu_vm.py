"""launch/tpu_vm.sh with a stand-in of gcloud, which has one slice of one host: a folder, in which ssh runs."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.launch.stand_in import StandIns

ROOT = Path(__file__).parents[2]
SLICE = ["mine", "--zone", "europe-west4-b"]
ARGUMENTS = ["mine", "europe-west4-b", "v5litepod-16"]
COMMAND = ["python", "-m", "hgdpo_jax.main", "--workdir", "/mnt/runs/mine"]

GCLOUD = """
cd "$STAND_INS"
case $4 in
  describe)
    if [ -e api_down ]; then echo "ERROR: cannot be reached" >&2; exit 1; fi
    cat state 2> /dev/null || { echo "ERROR: (gcloud) NOT_FOUND: no such node" >&2; exit 1; } ;;
  create) ! next_line no_room && rm -rf host && mkdir host && echo READY > state ;;
  delete) rm state ;;
  scp)
    if end=$(next_line copies); then
      if [ "${end#* }" = gone ]; then rm state; else echo "${end#* }" > state; fi
      exit "${end%% *}"
    fi
    cp "$5" host ;;
  ssh) command=${!#} && cd host && bash -c "${command#--command=}" ;;
esac
"""
VENV = """
mkdir -p "$3/bin" && cp "$STAND_INS/on_host/"* "$3/bin"
echo 'PATH=$PWD/hgdpo/bin:$PATH' > "$3/bin/activate"
"""
# What the command ends with, and what has become of the slice by then.
PYTHON = """
echo "$HGDPO_DISTRIBUTED" >> "$STAND_INS/distributed"
read -r code state <<< "$(next_line ends)"
if [ "$state" = gone ]; then rm "$STAND_INS/state"; else echo "$state" > "$STAND_INS/state"; fi
exit "$code"
"""
SLEEP = """
rm -f "$STAND_INS/api_down"
next_line awake > "$STAND_INS/later" && mv "$STAND_INS/later" "$STAND_INS/state" || true
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script in a repository that is small to send."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("launch/tpu_vm.sh", "pyproject.toml"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init"], ["add", "."], ["commit", "--no-gpg-sign", "-m", "all"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return root / "launch" / "tpu_vm.sh"


@pytest.fixture
def cloud(tmp_path: Path) -> StandIns:
    """Where there is no slice yet."""
    programs = {"gcloud": GCLOUD, "sudo": "", "python3.11": VENV, "sleep": SLEEP}
    stand_ins = StandIns(tmp_path / "cloud", programs)
    on_host = stand_ins.folder / "on_host"
    on_host.mkdir()
    stand_ins.write(on_host / "python", PYTHON)
    stand_ins.write(on_host / "pip", "[ -f hgdpo_jax/pyproject.toml ]")
    return stand_ins


def events(cloud: StandIns) -> list[str]:
    """What happened, in turn: to the slice, copies to it, runs of the command, and waits."""
    calls = [call[4] if call[0] == "gcloud" else call[0] for call in cloud.calls("gcloud", "sleep", "python")]
    return [call for call in calls if call not in ("describe", "ssh")]


def test_a_slice_is_made_and_prepared_and_runs_the_command(script: Path, cloud: StandIns) -> None:
    command = [*COMMAND, "two words", "it's", '"quoted"', "$HOME", "*", "a;b|c&d", "back\\slash", "two\nlines"]
    cloud.tell("ends", ["0 READY"])
    assert cloud.run(script, *ARGUMENTS, *command).returncode == 0
    assert events(cloud) == ["create", "scp", "python"]
    made, sent = (next(call for call in cloud.calls("gcloud") if call[4] == what) for what in ("create", "scp"))
    assert made[5:] == [*SLICE, "--accelerator-type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]
    assert sent[6:] == ["mine:", "--zone", "europe-west4-b", "--worker=all"]
    for call in cloud.calls("gcloud"):
        assert call[1:4] == ["compute", "tpus", "tpu-vm"]
        assert call[4] != "ssh" or call[5:-1] == [*SLICE, "--worker=all"]
    assert cloud.calls("python") == [command]  # as they were typed
    assert (cloud.folder / "distributed").read_text() == "1\n"
    (installed,) = cloud.calls("pip")
    package, extras = installed[-1].rstrip("]").split("[")
    project = tomllib.loads((cloud.folder / "host" / package / "pyproject.toml").read_text())["project"]
    assert {*extras.split(",")} == {"tpu", "gcs"} <= project["optional-dependencies"].keys()


def test_a_slice_that_is_there_is_used_as_it_is(script: Path, cloud: StandIns) -> None:
    for _ in range(2):
        cloud.tell("ends", ["0 READY"])
        assert cloud.run(script, *ARGUMENTS, *COMMAND).returncode == 0
    assert events(cloud) == ["create", "scp", "python", "scp", "python"]
    assert len(cloud.calls("python3.11")) == 1 and len(cloud.calls("pip")) == 2  # this commit in the same environment


@pytest.mark.parametrize("end", ["0 READY", "0 gone", "1 READY", "2 READY", "130 READY"])
def test_what_is_done_or_a_mistake_is_not_started_again(end: str, script: Path, cloud: StandIns) -> None:
    cloud.tell("ends", [end])
    assert cloud.run(script, *ARGUMENTS, *COMMAND).returncode == int(end.split()[0])
    assert events(cloud) == ["create", "scp", "python"]


@pytest.mark.parametrize(
    ("end", "then"),
    [
        ("75 READY", []),  # SIGTERM, before maintenance
        ("255 gone", ["create"]),
        ("255 PREEMPTED", ["delete", "create"]),
        ("75 TERMINATED", ["delete", "create"]),
        ("1 REPAIRING", ["sleep", "sleep"]),
        ("255 READY", []),  # ssh lost a host of which nothing else is known yet
        ("137 PREEMPTED", ["delete", "create"]),
        ("1 gone", ["create"]),
    ],
)
def test_what_was_stopped_or_lost_its_slice_is_started_again(
    end: str, then: list[str], script: Path, cloud: StandIns
) -> None:
    cloud.tell("ends", [end, "0 READY"])
    cloud.tell("awake", ["REPAIRING", "REPAIRING", "READY"] if "REPAIRING" in end else [])
    ended = cloud.run(script, *ARGUMENTS, *COMMAND)
    assert ended.returncode == 0
    assert events(cloud) == ["create", "scp", "python", "sleep", *then, "scp", "python"]
    assert cloud.calls("python") == [COMMAND] * 2
    assert ended.stderr.count("mine is REPAIRING; looking again in 60 s") == then.count("sleep")


def test_where_there_is_no_room_a_lost_slice_is_waited_for_and_a_new_one_is_not(script: Path, cloud: StandIns) -> None:
    cloud.tell("no_room", ["no capacity"])
    assert cloud.run(script, *ARGUMENTS, *COMMAND).returncode == 1
    assert events(cloud) == ["create"]
    cloud.tell("ends", ["255 gone", "0 READY"])
    (cloud.folder / "state").write_text("READY\n")
    (cloud.folder / "host").mkdir()
    cloud.tell("awake", [])
    program = cloud.folder / "on_host" / "python"
    program.write_text(program.read_text().replace("exit", 'echo full > "$STAND_INS/no_room"\nexit'))
    assert cloud.run(script, *ARGUMENTS, *COMMAND).returncode == 0
    assert events(cloud)[1:] == ["scp", "python", "sleep", "create", "sleep", "create", "scp", "python"]


@pytest.mark.parametrize(
    ("end", "then"), [("1 gone", ["create"]), ("1 PREEMPTED", ["delete", "create"]), ("255 READY", [])]
)
def test_a_slice_that_is_lost_before_the_command_begins_is_made_again(
    end: str, then: list[str], script: Path, cloud: StandIns
) -> None:
    cloud.tell("copies", [end])
    cloud.tell("ends", ["0 READY"])
    assert cloud.run(script, *ARGUMENTS, *COMMAND).returncode == 0
    assert events(cloud) == ["create", "scp", "sleep", *then, "scp", "python"]


def test_where_gcloud_cannot_be_reached_a_running_slice_is_not_made_again(script: Path, cloud: StandIns) -> None:
    (cloud.folder / "api_down").touch()
    ended = cloud.run(script, *ARGUMENTS, *COMMAND)
    assert ended.returncode == 1 and ended.stderr == "ERROR: cannot be reached\n" and events(cloud) == []
    (cloud.folder / "api_down").unlink()
    cloud.tell("ends", ["75 READY", "0 READY"])
    program = cloud.folder / "on_host" / "python"
    program.write_text(program.read_text().replace("exit", '[ "$code" = 0 ] || touch "$STAND_INS/api_down"\nexit'))
    sleep = cloud.folder / "bin" / "sleep"
    sleep.write_text(sleep.read_text().replace("rm -f", "next_line naps > /dev/null || rm -f"))
    cloud.tell("naps", ["still"])
    assert cloud.run(script, *ARGUMENTS, *COMMAND).returncode == 0
    assert events(cloud) == ["create", "scp", "python", "sleep", "sleep", "scp", "python"]


@pytest.mark.parametrize("end", ["75 READY", "255 READY", "1 PREEMPTED"])
def test_tries_are_bounded(end: str, script: Path, cloud: StandIns) -> None:
    few = script.with_name("few.sh")
    few.write_text(script.read_text().replace("tries=100", "tries=3"))
    cloud.tell("ends", [end] * 5)
    ended = cloud.run(few, *ARGUMENTS, *COMMAND)
    assert ended.returncode == int(end.split()[0]) and ended.stderr == "mine: started 3 times without an end\n"
    assert events(cloud).count("python") == 3


@pytest.mark.parametrize("state", ["REPAIRING", "STOPPED", "UNKNOWN"])
def test_a_slice_that_never_gets_ready_is_not_waited_for_forever(state: str, script: Path, cloud: StandIns) -> None:
    soon = script.with_name("soon.sh")
    soon.write_text(script.read_text().replace("looks=1440", "looks=3"))
    (cloud.folder / "state").write_text(f"{state}\n")
    ended = cloud.run(soon, *ARGUMENTS, *COMMAND)
    assert ended.returncode == 1 and ended.stderr.endswith(f"mine is not ready after a day, but {state}\n")
    assert events(cloud) == ["sleep"] * 2


@pytest.mark.parametrize(
    ("kind", "environment", "version", "spot"),
    [
        ("v5p-32", {}, "v2-alpha-tpuv5", False),
        ("v6e-16", {"SPOT": "1"}, "v2-alpha-tpuv6e", True),
        ("v5litepod-8", {"RUNTIME": "newer"}, "newer", False),
        ("v7x-8", {"RUNTIME": "newest", "SPOT": "1"}, "newest", True),
    ],
)
def test_image_and_spot(
    kind: str, environment: dict[str, str], version: str, spot: bool, script: Path, cloud: StandIns
) -> None:
    cloud.tell("ends", ["0 READY"])
    assert cloud.run(script, *ARGUMENTS[:2], kind, *COMMAND, **environment).returncode == 0
    (made,) = [call for call in cloud.calls("gcloud") if call[4] == "create"]
    assert made[8:] == ["--accelerator-type", kind, "--version", version, *["--spot"] * spot]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([*ARGUMENTS[:2], "v7x-8", *COMMAND], "which runtime version has a v7x-8?"),
        (ARGUMENTS, "what is to run on mine?"),
        (ARGUMENTS[:2], "accelerator type, such as v5litepod-16"),
        ([], "name of the slice"),
    ],
)
def test_what_is_missing_is_one_line_before_anything_is_made(
    arguments: list[str], line: str, script: Path, cloud: StandIns
) -> None:
    ended = cloud.run(script, *arguments)
    assert ended.returncode != 0 and ended.stderr.endswith(line + "\n") and ended.stderr.count("\n") == 1
    assert cloud.calls() == []
