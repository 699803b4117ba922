"""The exceptions that a command ends with, and what it says of them."""

import errno
import os
import re

_MEMORY = (
    "train with --config.train.checkpointing=everything or a larger --config.train.accumulate, draw with a smaller "
    "--config.pairs.batch or --config.evaluate.batch (sample: --batch); on a GPU XLA_CLIENT_MEM_FRACTION=0.9 gives JAX "
    "more; python -m hgdpo_jax.plan says what a step needs"
)
# What libraries write, whose classes differ, and what the user can do.
_REMEDIES = (
    ("|".join(re.escape(os.strerror(code)) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
     "", "free some disk space, the same command then goes on"),
    # A message that is too large has the same code.
    ("RESOURCE_EXHAUSTED: (?!.*message)|CUDA_ERROR_OUT_OF_MEMORY|CUDNN_STATUS_ALLOC_FAILED",
     "a device ran out of memory: ", _MEMORY),
    (f"Unable to allocate .* for an array|{os.strerror(errno.ENOMEM)}|std::bad_alloc|^MemoryError",
     "the host ran out of memory: ", _MEMORY),
    ("|".join(os.strerror(code) for code in (errno.EACCES, errno.EPERM, errno.EROFS)),
     "", "change the rights of that place, or choose another"),
    ("|".join(os.strerror(code) for code in (errno.ENAMETOOLONG, errno.ELOOP)), "", "choose another path"),
    ("Invalid value .* for JAX flag|[Ii]nvalid .* for environment", "", "unset that variable, or correct it"),
)  # fmt: skip
_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # of lines
_LONGEST = 300  # characters of what a library says; a compiler lists all that it could not place


class UserError(Exception):
    """Something the user gave is wrong; the message is one line that names it and says what to do.

    Attributes:
        code: that the command exits with.
    """

    code = 1


class Stopped(Exception):
    """A signal asked to stop, and what was under way is saved; the argument is the exit code."""


def as_line(error: BaseException) -> str | None:
    """The line that a command ends with, where the user can mend what went wrong: a mistake, a full disk, memory that
    ran out, a place without rights, a variable that JAX cannot read. None for other errors."""
    if isinstance(error, UserError):  # a name of a file may hold the end of a line
        return f"error: {str(error).translate({ord(end): ascii(end)[1:-1] for end in _ENDS})}"
    text = " ".join([*(str(error) or type(error).__name__).split(), *getattr(error, "__notes__", [])[:1]])
    for pattern, what, remedy in _REMEDIES:
        if re.search(pattern, text):
            shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
            return f"error: {what}{shown}; {remedy}"
    return as_line(error.__cause__) if error.__cause__ else None
