"""The one exception that a user is meant to read."""


class AbqError(ValueError):
    """Bad input. The message is one line and holds the offending value; the command line prints it and exits with 2."""
