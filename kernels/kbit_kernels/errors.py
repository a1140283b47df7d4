"""The error that a user can meet."""


class KbitError(ValueError):
    """Something a user can mend: one plain sentence that names the file, tensor or option, says
    what was found and what to do. Commands print it on one line and exit with status 2."""
