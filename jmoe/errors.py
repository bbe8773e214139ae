"""Errors that a user can cause, and the exit statuses of the command line.

A scheduler or a script may go by the status of `jmoe train`; on many hosts all processes end with the same one, except
that a process which is killed has the status of its signal.

    0     done
    1     a bug, with a traceback
    2     a mistake of the user, in one sentence (UserError)
    75    another process of the run is lost, or never came, or storage failed in a way that may pass; the same command
          goes on from the last checkpoint (LOST)
    76    no step ended for too long; the stacks of all threads are printed before it (STUCK). The same command goes on
    130   Ctrl-C: stopped, and saved what there was (InterruptedRunError)
    141   the reader of the output went away
    143   SIGTERM or the notice of a preemption: the same (InterruptedRunError). The same command goes on
"""

LOST = 75  # what sysexits.h has for "try again later"
STUCK = 76


class UserError(ValueError):
    """What was wanted, what came and what to do, in one readable sentence.

    The command line prints the sentence without a traceback and exits with `exit_code`.
    """

    exit_code: int = 2


class LostProcessError(UserError):
    """A process of the run never came or went away; the same command may succeed later."""

    exit_code: int = LOST


class StorageError(UserError):
    """Storage failed, or is taken, in a way that may pass by itself; the same command may succeed later."""

    exit_code: int = LOST


class InterruptedRunError(UserError):
    """A run was asked to stop and has saved its state; the exit status is that of a process ended by the signal."""

    def __init__(self, message: str, signum: int):
        """Takes the message and the number of the signal (2 for Ctrl-C, so that the exit status is 130)."""
        super().__init__(message)
        self.exit_code = 128 + signum
