"""The one exception that a user can cause."""


class DmxError(ValueError):
    """Something the user gave cannot be used.

    The message says what was wanted, what was found (naming the file, field or row) and what to do. The
    command line prints it without a traceback and exits with status 2.
    """
