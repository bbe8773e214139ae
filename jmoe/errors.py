"""Errors that a user can cause."""


class UserError(ValueError):
    """What was wanted, what came and what to do, in one readable sentence.

    The command line prints the sentence without a traceback and exits with `exit_code`.
    """

    exit_code: int = 2


class InterruptedRunError(UserError):
    """A run was asked to stop and has saved its state; the exit status is that of a process ended by the signal."""

    def __init__(self, message: str, signum: int):
        """Takes the message and the number of the signal (2 for Ctrl-C, so that the exit status is 130)."""
        super().__init__(message)
        self.exit_code = 128 + signum
