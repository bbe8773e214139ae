import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jmoe.errors import LostProcessError, StorageError, UserError
from jmoe.parallel.channel import Channel, Server, listen
from jmoe.parallel.hosts import Hosts
from jmoe.train import agreement
from jmoe.train.agreement import Agreement
from jmoe.train.manifest import UnreadableCheckpointError

HERE = socket.gethostname()


@pytest.fixture
def agree():
    """Has several processes, which are threads of this one, come to an agreement; what each returns or raises."""
    with contextlib.ExitStack() as stack:

        def all_agree(*bodies):
            count = len(bodies)
            listener = stack.enter_context(listen("127.0.0.1", 0))
            Server(listener, count, 5).start()
            pool = stack.enter_context(ThreadPoolExecutor(count))
            channels = list(pool.map(lambda i: Channel(listener.getsockname(), count, i, timeout=5), range(count)))
            agreements = [Agreement(Hosts(channel, i), "test") for i, channel in enumerate(channels)]

            def one(i):
                try:
                    return bodies[i](agreements[i])
                except Exception as error:
                    return error

            said = list(pool.map(one, range(count)))
            for channel in reversed(channels):
                channel.close()
                channel._line.close()
            return said

        yield all_agree


def fails(error):
    def action():
        raise error

    return action


def test_one_process_hears_itself():
    assert Agreement(Hosts(), "test").together("counting", lambda: 3, tell=str) == (3, ["3"])


def test_one_process_raises_what_it_raised():
    for error in (UserError("No."), KeyError("x")):
        with pytest.raises(type(error)) as raised:
            Agreement(Hosts(), "test").together("failing", fails(error))
        assert raised.value is error


def test_all_hear_what_all_tell_time_after_time(agree):
    def body(number):
        return lambda agreed: [agreed.together("it", lambda: number, tell=lambda n: {"a": n})[1] for _ in range(3)]

    heard = [[{"a": 7}, {"a": 8}]] * 3
    assert agree(body(7), body(8)) == [heard, heard]


def test_what_fails_in_one_fails_in_all_and_then_they_agree_again(agree):
    def body(error):
        def twice(agreed):
            with pytest.raises(UserError) as raised:
                agreed.together("it", fails(error) if error else lambda: 1)
            return raised.value, agreed.together("it", lambda: 2)[0]

        return twice

    for error, sentence, kind in (
        (UserError("The disk is full."), "The disk is full", UserError),
        (OSError(28, "Full"), "Full", UserError),
        (OSError(5, "Input/output error"), "Input/output error", StorageError),
        (StorageError("Not now."), "Not now", StorageError),
    ):
        for raised, after in agree(body(None), body(error), body(None)):
            assert (type(raised), str(raised), after) == (kind, f"{sentence} (process 1 of 3).", 2)


def test_what_fails_in_all_is_told_without_a_number_and_only_named_classes_are_kept(agree):
    def body(errors):
        def fail(agreed):
            unreadable = fails(UnreadableCheckpointError("It is damaged."))
            Agreement(agreed.hosts, "other", errors).together("it", unreadable)

        return fail

    for errors, kind in (((UnreadableCheckpointError,), UnreadableCheckpointError), ((), UserError)):
        for raised in agree(body(errors), body(errors)):
            assert (type(raised), str(raised)) == (kind, "It is damaged.")


def test_who_does_not_come_is_named_to_all_also_to_itself(agree, monkeypatch):
    monkeypatch.setattr(agreement, "SECONDS", 0.2)
    both = agree(
        lambda agreed: agreed.together("the list", lambda: 1),
        lambda agreed: agreed.together("the list", lambda: time.sleep(0.6)),
    )
    for raised in both:
        assert isinstance(raised, LostProcessError)
        assert str(raised).startswith(f"No word about the list from process 1 on {HERE} within 0.2 s. Run the same")


def test_who_comes_for_something_else_is_named(agree):
    def to(what):
        return lambda agreed: agreed.together(what, lambda: 1)

    for raised in agree(to("step 3"), to("step 3"), to("step 4")):
        assert isinstance(raised, UserError)
        assert str(raised) == "Process 0 of 3 came to step 3 when process 2 came to step 4."
