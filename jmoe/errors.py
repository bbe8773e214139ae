"""Errors that a user can cause."""


class UserError(ValueError):
    """What was wanted, what came and what to do, in one readable sentence.

    The command line prints the sentence without a traceback and exits with `exit_code`.
    """

    exit_code: int = 2
