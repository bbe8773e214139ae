"""How the processes of a job tell each other what they found: each says something, and all hear what everyone said.

This goes through the coordination service that `jax.distributed` starts, over the hosts' network, and never through the
devices. A checkpoint is finished in a background thread while the training step runs, and devices carry out collective
operations in the order in which each process started them: one from the background thread would come before the step's
in one process and after it in another, and both would wait for ever. An exchange here may happen in any thread, and it
always ends: a process that does not come, because it was killed or failed elsewhere, is named after `SECONDS`.

Exchanges of one `Agreement` are numbered, so every process has to make the same ones in the same order. Whatever goes
on at the same time, as a save in the background does, needs an `Agreement` of its own.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
from jax._src import distributed  # the service has no public interface; nothing else of jmoe touches it

from jmoe.errors import UserError
from jmoe.train.manifest import reason

_T = TypeVar("_T")

SECONDS = 600.0  # how long a process waits for the others: longer than the slowest of them needs for its files
_GRACE = 30.0  # how much longer the others wait for process 0, so that it is its sentence that all of them raise


class Agreement:
    """A sequence of exchanges between all processes of the job.

    With one process, each exchange returns at once what it was given.
    """

    def __init__(self, name: str, errors: Sequence[type[UserError]] = ()):
        """Opens the sequence.

        Args:
          name: the same in every process, and used once.
          errors: classes of errors that `together` raises as such in every process.
        """
        self._name = f"jmoe/{name}"
        self._errors = {kind.__name__: kind for kind in (*errors, UserError)}
        self._turn = 0
        self.process, self.processes = jax.process_index(), jax.process_count()

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Returns the values of all processes, in their order; called by each of them.

        Args:
          what: what it is about, for messages: "the checkpoint of step 300".
          value: anything that JSON can hold; a few kilobytes at most.

        Raises:
          UserError: a process did not come in time or came for something else; the message, which is the same in all
            processes that process 0 could reach, names it.
        """
        if self.processes == 1:
            return [value]
        turn, self._turn = self._turn, self._turn + 1
        mine = json.dumps([what, value])
        heard = json.loads(self._collect(turn, what, mine) if self.process == 0 else self._say(turn, what, mine))
        if isinstance(heard, str):
            raise UserError(heard)
        return heard

    def together(
        self, what: str, action: Callable[[], _T], tell: Callable[[_T], Any] = lambda _: None
    ) -> tuple[_T, list[Any]]:
        """Does something in all processes, and raises in all of them if it failed in one.

        Args:
          what: what is done, as in `exchange`.
          action: what to do.
          tell: what the others hear of the result; nothing by default.

        Returns:
          the result here, and what each process tells of its own.

        Raises:
          UserError: as it was raised here, or in another process; that of the first process counts, whose number it
            tells unless all have failed. An error of another class is raised as it is where there is one process, and
            as a UserError with the reason where there are several. Or as in `exchange`.
        """
        result, failed, problem, told = None, None, None, None
        try:
            result = action()
            told = tell(result)
        except Exception as error:
            failed = error
            kind = next((name for name, kind in self._errors.items() if isinstance(error, kind)), None)
            problem = (kind, str(error).rstrip(". ") if kind else reason(error))
        said = self.exchange(what, (problem, told))
        if failed is not None and self.processes == 1:
            raise failed
        problems = {process: problem for process, (problem, _) in enumerate(said) if problem}
        if problems:
            process, (kind, text) = next(iter(problems.items()))
            who = f" (process {process} of {self.processes})" if len(problems) < self.processes else ""
            raise self._errors.get(kind, UserError)(f"{text}{who}.") from failed
        return cast(_T, result), [told for _, told in said]

    def _say(self, turn: int, what: str, mine: str) -> str:
        """Tells process 0 and waits for what it heard from all."""
        client = _client()
        try:
            client.key_value_set(f"{self._name}/{turn}/{self.process}", mine)
            return client.blocking_key_value_get(f"{self._name}/{turn}/all", _milliseconds(SECONDS + _GRACE))
        except jax.errors.JaxRuntimeError as error:
            return json.dumps(f"Process 0 of {self.processes} did not come to {what}{_within(error)}.")

    def _collect(self, turn: int, what: str, mine: str) -> str:
        """What all said, or a sentence about who did not, told to all."""
        client = _client()
        deadline = time.monotonic() + SECONDS
        said, missing = [mine], []
        try:
            for process in range(1, self.processes):
                try:
                    left = _milliseconds(deadline - time.monotonic())
                    said.append(client.blocking_key_value_get(f"{self._name}/{turn}/{process}", left))
                except jax.errors.JaxRuntimeError as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise
                    missing.append(process)
            heard = json.dumps(_verdict(what, [json.loads(text) for text in said], missing, self.processes))
            client.key_value_set(f"{self._name}/{turn}/all", heard)
            if not missing:  # all have come here, so all have read what was said the turn before
                client.key_value_delete(f"{self._name}/{turn - 1}/")
            return heard
        except jax.errors.JaxRuntimeError as error:
            return json.dumps(f"The {self.processes} processes could not talk about {what}{_within(error)}.")


def _client() -> Any:
    """The connection to the coordination service: keys and values that one process sets and others wait for."""
    return distributed.global_state.client


def _verdict(what: str, said: list[list], missing: list[int], processes: int) -> list[Any] | str:
    """The values that were said, or the sentence that all should raise."""
    if missing:
        who = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        some = f"Process {who}" if len(missing) == 1 else f"Processes {who}"
        return f"{some} of {processes} did not come to {what} within {SECONDS:g} seconds."
    for process, (other, _) in enumerate(said):
        if other != what:
            return f"Process 0 of {processes} came to {what} when process {process} came to {other}."
    return [value for _, value in said]


def _within(error: Exception) -> str:
    """Why the service did not answer."""
    if "DEADLINE_EXCEEDED" in str(error):
        return f" within {SECONDS + _GRACE:g} seconds"
    return f": {(str(error).splitlines() or [type(error).__name__])[0][:200].rstrip('. ')}"


def _milliseconds(seconds: float) -> int:
    return max(1, int(1000 * seconds))
