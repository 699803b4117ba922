"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user gave is wrong; the message is one line that names it and says what to do."""
