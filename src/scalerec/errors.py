"""The one error a user can cause."""


class InputError(ValueError):
    """What is wrong, where (file, column, row or option) and what to do, in one line; the command line exits with 2."""
