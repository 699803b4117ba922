"""The exceptions that a command ends with."""


class UserError(Exception):
    """Something the user gave is wrong; the message is one line that names it and says what to do."""


class Stopped(Exception):
    """A signal asked to stop, and what was under way is saved; the argument is the exit code."""
