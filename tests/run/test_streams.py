"""Whoever listens, a command does its work and says what it can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEAK = """
import logging, os, sys
from contextlib import suppress
from pathlib import Path
from hgdpo_jax.run import command
def speak():
    held = open(sys.argv[1], "w")  # as a lock is held
    for i in range(20_000):
        print(i, "ü…")
    logging.warning("warned ü…")
    for descriptor in (1, 2):  # as libraries do
        with suppress(BrokenPipeError):
            os.write(descriptor, b"!")
    held.write(Path("kept ü").name + sys.getfilesystemencoding())
command.run(speak)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "speak.py").write_text(SPEAK, encoding="utf-8")
    return tmp_path / "speak.py"


def speak(program: Path, redirected: str, *flags: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, what was printed, and what is in the file."""
    env = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    shell = f'"$@" {redirected}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", shell, "bash", sys.executable, *flags, str(program), str(program.with_name("file"))]
    done = subprocess.run(command, env=env, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode(), program.with_name("file").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "redirected", ["| head -1", "2>&1 | head -1", "| true", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/null"]
)
def test_who_does_not_listen_ends_nothing(redirected: str, program: Path) -> None:
    code, said, kept = speak(program, redirected)
    assert (code, kept) == (0, "kept üutf-8") and "Traceback" not in said and "BrokenPipe" not in said


def test_so_does_one_that_prints_at_once(program: Path) -> None:
    code, said, kept = speak(program, "| head -2", "-u")
    assert (code, kept) == (0, "kept üutf-8") and said.startswith("0 ü…\n1 ü…\n") and "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LC_ALL": "C"}, "0 ü…"),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "0 ü…"),
        ({"LANG": "nowhere", "LC_ALL": ""}, "0 ü…"),
        ({"PYTHONIOENCODING": "ascii"}, "0 \\xfc\\u2026"),
        ({"PYTHONIOENCODING": "latin-1"}, "0 ü\\u2026"),
    ],
)
def test_files_are_utf8_in_any_locale(environment: dict[str, str], said: str, program: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    file = program.with_name("file")
    done = subprocess.run([sys.executable, str(program), str(file)], env=env, capture_output=True, check=True)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    assert done.stdout.decode(encoding).splitlines()[0] == said
    assert file.read_text(encoding="utf-8") == "kept üutf-8"
