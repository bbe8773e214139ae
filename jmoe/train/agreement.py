"""Doing something in all processes of a run, and failing in all of them if it fails in one.

The processes tell each other what they found over the hosts' network (`jmoe/parallel/channel.py`), never through the
devices. A checkpoint is finished in a background thread while the training step runs, and devices carry out collective
operations in the order in which each process started them: one from the background thread would come before the step's
in one process and after it in another, and both would wait for ever. An agreement may be reached in any thread, and it
always ends: a process that does not come, because it hangs or failed elsewhere, is named after `SECONDS`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

from jmoe.errors import StorageError, UserError
from jmoe.parallel.hosts import Hosts
from jmoe.train.manifest import passes, reason

_T = TypeVar("_T")

SECONDS = 600.0  # how long a process waits for the others: longer than the slowest of them needs for its files


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A sequence of things that all processes do, the same ones in the same order.

    Whatever goes on at the same time, as a save in the background does, needs an agreement of its own.

    Attributes:
      hosts: the processes.
      name: of the sequence, the same in every process.
      errors: classes of errors that `together` raises as such in every process.
    """

    hosts: Hosts
    name: str
    errors: tuple[type[UserError], ...] = ()

    def together(
        self, what: str, action: Callable[[], _T], tell: Callable[[_T], Any] = lambda _: None
    ) -> tuple[_T, list[Any]]:
        """Does something in all processes, and raises in all of them if it failed in one.

        Args:
          what: what is done, for messages: "the checkpoint of step 300".
          action: what to do.
          tell: what the others hear of the result, nothing by default; anything that JSON can hold, a few kilobytes.

        Returns:
          the result here, and what each process tells of its own.

        Raises:
          LostProcessError: a process did not come in time; the message, the same in all processes, names it.
          UserError: as it was raised here, or in another process; that of the first process counts, whose number it
            tells unless all have failed. An error of another class is raised as it is where there is one process, and
            as a UserError with the reason where there are several, a StorageError if it may pass. Or a process came to
            do something else.
        """
        kinds = {kind.__name__: kind for kind in (*self.errors, StorageError, UserError)}
        result, failed, problem, told = None, None, None, None
        try:
            result = action()
            told = tell(result)
        except Exception as error:
            failed = error
            kind = next((name for name, kind in kinds.items() if isinstance(error, kind)), None)
            text = str(error).rstrip(". ") if kind else reason(error)
            problem = (StorageError.__name__ if kind is None and passes(error) else kind, text)
        said = self._exchange(what, (problem, told))
        if failed is not None and self.hosts.count == 1:
            raise failed
        problems = {process: problem for process, (problem, _) in enumerate(said) if problem}
        if problems:
            process, (kind, text) = next(iter(problems.items()))
            who = f" (process {process} of {self.hosts.count})" if len(problems) < self.hosts.count else ""
            raise kinds.get(kind, UserError)(f"{text}{who}.") from failed
        return cast(_T, result), [told for _, told in said]

    def _exchange(self, what: str, value: Any) -> list[Any]:
        """The values of all processes, in their order, once they have come for the same thing."""
        mine = json.dumps([what, value])
        said = [json.loads(text) for text in self.hosts.gather(self.name, mine, timeout=SECONDS, about=what)]
        for process, (other, _) in enumerate(said):
            if other != said[0][0]:
                raise UserError(
                    f"Process 0 of {self.hosts.count} came to {said[0][0]} when process {process} came to {other}."
                )
        return [value for _, value in said]
