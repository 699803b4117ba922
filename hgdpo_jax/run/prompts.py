"""Files of prompts."""

from pathlib import Path

from hgdpo_jax.run.errors import UserError
from hgdpo_jax.run.files import read_lines


def read_prompts(path: Path, option: str) -> list[str]:
    """One prompt a line; empty lines are passed over.

    Args:
        path: of the file.
        option: that named it, such as `--prompts `.

    Raises:
        UserError: no such file, not UTF-8, no prompt in it, or one that stands there twice: the same seeds would draw
            it twice.
    """
    if not path.is_file():
        raise UserError(f"{option}{path}: no such file")
    seen: dict[str, int] = {}
    for number, prompt in read_lines(path):
        if prompt in seen:
            raise UserError(f"{path} line {number}: repeats line {seen[prompt]}, the same seeds would draw it twice; "
                            "remove it")  # fmt: skip
        seen[prompt] = number
    if not seen:
        raise UserError(f"{option}{path}: is empty; expects one prompt a line")
    return list(seen)
