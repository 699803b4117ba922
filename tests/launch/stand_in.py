"""Programs that stand in for others: each writes down what it was given, and answers as it was told."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.patience import patience

_LOGGED = r"""#!/usr/bin/env bash
{ printf '%s\x1f' NAME "$@"; printf '\x1e'; } >> "$STAND_INS/calls"
next_line() {
  local line
  read -r line 2> /dev/null < "$STAND_INS/$1" && sed -i 1d "$STAND_INS/$1" && echo "$line"
}
"""


class StandIns:
    """A folder of programs that come first on PATH.

    Args:
        folder: which may not exist yet; the programs find it as $STAND_INS.
        programs: name → what it does in bash, after it wrote down its arguments.
    """

    def __init__(self, folder: Path, programs: dict[str, str]) -> None:
        self.folder, self._bin = folder, folder / "bin"
        self._bin.mkdir(parents=True)
        for name, body in programs.items():
            self.write(self._bin / name, body)

    def write(self, path: Path, body: str) -> None:
        """A program beside those on PATH."""
        path.write_text(_LOGGED.replace("NAME", path.name) + body + "\n")
        path.chmod(0o755)

    def tell(self, name: str, lines: Sequence[str]) -> None:
        """A file of answers, a line each, which a program takes one by one with `next_line NAME`."""
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a script of ours among them."""
        env = os.environ | {"PATH": f"{self._bin}:{os.environ['PATH']}", "STAND_INS": str(self.folder)} | environment
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=patience(30))

    def calls(self, *names: str) -> list[list[str]]:
        """Name and arguments of each call in turn, of all programs or of some."""
        log = self.folder / "calls"
        calls = [call.split("\x1f")[:-1] for call in log.read_text().split("\x1e")[:-1]] if log.exists() else []
        return [call for call in calls if not names or call[0] in names]
