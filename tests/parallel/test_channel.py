import contextlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jmoe.errors import LOST, LostProcessError, UserError
from jmoe.parallel import channel
from jmoe.parallel.channel import Channel, Member, Server, listen

HERE, PID = socket.gethostname(), os.getpid()


@pytest.fixture
def meet(monkeypatch):
    """Has processes meet, as threads of this one; returns for each its channel or its error."""
    monkeypatch.setattr(channel, "_LINGER_SECONDS", 0.2)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen("127.0.0.1", 0))

        def meeting(indices, count, *, timeout=5.0, counts=None):
            server = Server(listener, count, timeout, announce="said")
            server.start()

            def one(i, count):
                try:
                    joined = Channel(listener.getsockname(), count, i, timeout=timeout)
                    stack.callback(joined._line.close)
                    return joined
                except UserError as error:
                    return error

            with ThreadPoolExecutor(len(indices)) as pool:
                return list(pool.map(one, indices, counts or [count] * len(indices)))

        yield meeting


def watched(channels):
    """For each the list of endings that it is told, and an event that is set at the first."""
    told = []
    for one in channels:
        endings, event = [], threading.Event()
        one.watch(lambda ending, endings=endings, event=event: (endings.append(ending), event.set()))
        told.append((endings, event))
    return told


def test_all_who_meet_know_each_other_and_what_process_0_announced(meet):
    channels = meet([2, 0, 1], 3)
    for one in channels:
        assert one.members == [Member(i, HERE, PID) for i in range(3)]
        assert one.announce == "said"


def test_every_process_gets_what_each_gave(meet):
    channels = meet([0, 1, 2], 3)
    watched(channels)
    for name in ("a", "b"):
        with ThreadPoolExecutor(3) as pool:
            gathered = list(pool.map(lambda i: channels[i].gather(name, f"{name}{i}" * 50_000, 5), range(3)))  # noqa: B023
        assert gathered == [[f"{name}{i}" * 50_000 for i in range(3)]] * 3


def test_a_name_is_used_again_and_again_by_each_at_its_own_pace(meet):
    channels = meet([0, 1, 2], 3)
    watched(channels)

    def often(i):
        found = []
        for turn in range(50):
            if turn % (7 + i) == 0:
                time.sleep(0.002)
            found.append(channels[i].gather("name", f"{i} {turn}", 5))
        return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(often, range(3)))
    assert found == [[[f"{i} {turn}" for i in range(3)] for turn in range(50)]] * 3


def test_who_gives_nothing_is_named_in_time(meet):
    channels = meet([0, 1], 2)
    watched(channels)
    with pytest.raises(
        LostProcessError, match=f"^No word about 'batch' from process 1 on {HERE} within 0.1 s. Run the"
    ):
        channels[0].gather("batch", "x", 0.1)


def test_who_comes_too_late_hears_the_same_and_the_next_time_is_a_new_one(meet):
    channels = meet([0, 1, 2], 3)
    watched(channels)
    sentence = f"^No word about the list from process 1 on {HERE} and process 2 on {HERE} within 0.1 s. Run the"
    for i in (0, 1, 2):
        with pytest.raises(LostProcessError, match=sentence):
            channels[i].gather("name", "before", 0.1, "the list")
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda i: channels[i].gather("name", f"after {i}", 5), range(3)))
        assert found == [["after 0", "after 1", "after 2"]] * 3


@pytest.mark.parametrize("done", [0, 1])
def test_nobody_waits_for_one_who_is_done(meet, done):
    channels = meet([0, 1, 2], 3)
    told = watched(channels)
    others = [one for i, one in enumerate(channels) if i != done]

    def sentence(one, name):
        with pytest.raises(LostProcessError) as error:
            one.gather(name, "x", 30)
        return str(error.value)

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(sentence, others[0], "early")
        time.sleep(0.1)  # it waits by now
        channels[done].close()
        sentences = [early.result(), *pool.map(lambda one: sentence(one, "late"), others)]
    assert time.monotonic() - began < 5
    for name, text in zip(("early", "late", "late"), sentences, strict=True):
        assert text.startswith(f"No word about '{name}' from process {done} on {HERE}, as it ended before. Run the")
    assert [endings for endings, _ in told] == [[], [], []]


def test_what_one_gave_before_it_was_done_counts(meet):
    channels = meet([0, 1], 2)
    watched(channels)
    with ThreadPoolExecutor(1) as pool:
        given = pool.submit(channels[1].gather, "name", "b", 5)
        time.sleep(0.1)
        channels[1].close()
        assert channels[0].gather("name", "a", 5) == ["a", "b"]
        assert isinstance(given.exception(5), LostProcessError)


def test_long_lists_are_cut_short():
    expected = {"a": "a", "ab": "a and b", "abc": "a, b and c", "abcdefghij": "a, b, c, d, e, f, g, h and 2 more"}
    assert {texts: channel._list(list(texts)) for texts in expected} == expected


def test_who_is_missing_is_named_to_those_who_came(meet):
    errors = meet([0, 3], 4, timeout=0.5)
    for error in errors:
        assert isinstance(error, LostProcessError)
        assert str(error).startswith(
            f"Processes 1 and 2 of 4 did not come within 0.5 s; there are 0 on {HERE}, 3 on {HERE}. See whether"
        )


def test_a_process_may_come_again_while_the_others_are_waited_for(meet):
    with listen("127.0.0.1", 0) as listener:
        Server(listener, 2, 5).start()
        given_up = channel._connect(listener.getsockname(), 5, "process 1", "")
        given_up.send(kind="hello", count=2, process=1, host="before", pid=1)
        given_up.close()
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda i: Channel(listener.getsockname(), 2, i, timeout=5), range(2)))
        assert [one.members[1].host for one in both] == [HERE] * 2
        for one in both:
            one._line.close()


def test_two_of_the_same_number_are_refused_with_all_others(meet):
    errors = meet([0, 1, 1], 3)
    for error in errors:
        assert type(error) is UserError
        assert str(error) == (
            f"Two processes are number 1 of 3: one on {HERE} (pid {PID}) and one on {HERE} (pid {PID}). Each "
            "needs a --process of its own, from 0 to 2."
        )


def test_one_who_comes_to_a_run_that_is_complete_does_not_disturb_it(meet):
    both = meet([0, 1], 2)
    told = watched(both)
    with pytest.raises(UserError, match="^Two processes are number 1 of 2: "):
        Channel(both[0]._line.socket.getpeername(), 2, 1, timeout=5)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda one: one.gather("after", "x", 5), both)) == [["x", "x"]] * 2
    assert told[0][0] == told[1][0] == []


def test_different_numbers_of_processes_are_refused(meet):
    errors = meet([0, 1], 2, counts=[2, 4])
    for error in errors:
        assert str(error) == (
            f"Process 1 on {HERE} was told of 4 processes, and process 0 of 2. All need the same --processes."
        )


def test_a_coordinator_that_cannot_be_reached_is_an_error_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(LostProcessError) as error:
        Channel(address, 2, 1, timeout=0.3, shown="host-0:1234")
    assert str(error.value) == (
        f"The coordinator host-0:1234 could not be reached from process 1 on {HERE} within 0.3 s (Connection refused). "
        "See whether process 0 runs there and whether a firewall lets the port through."
    )


def test_another_program_at_the_port_is_recognised():
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def another_program():
            connection, _ = listener.accept()
            connection.sendall(b"SSH-2.0-OpenSSH\n")
            connection.close()

        pool.submit(another_program)
        with pytest.raises(
            LostProcessError, match="^Process 1 reached a:1, but what answers there is not process 0 of"
        ):
            Channel(listener.getsockname(), 2, 1, timeout=5, shown="a:1")


def test_strangers_at_the_port_do_not_disturb_a_meeting(meet, monkeypatch):
    with listen("127.0.0.1", 0) as listener:
        Server(listener, 1, 5).start()
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"kind": "hello"}\n',
            b'{"kind": "end", "status": 1}\n',
            b"[]\n",
            b"7\n",
        ):
            with socket.create_connection(listener.getsockname()) as stranger:
                stranger.sendall(words)
                stranger.settimeout(5)
                assert stranger.recv(100) == b""  # it is shown out
        Channel(listener.getsockname(), 1, 0, timeout=5)._line.close()


def test_a_process_that_is_gone_is_told_to_all_others(meet):
    channels = meet([0, 1, 2], 3)
    told = watched(channels)
    channels[1]._line.socket.shutdown(socket.SHUT_RDWR)  # what the system does when it is killed
    for i in (0, 2):
        assert told[i][1].wait(5)
        (ending,) = told[i][0]
        assert (ending.status, ending.at_once) == (LOST, True)
        assert ending.sentence.startswith(f"Lost process 1 on {HERE}: its connection ended without a word, so")


def test_process_0_that_is_gone_is_noticed_by_all(meet):
    channels = meet([0, 1], 2)
    told = watched(channels)
    channels[1]._line.socket.shutdown(socket.SHUT_RD)  # as if its other end were gone
    assert told[1][1].wait(5)
    assert told[1][0][0].sentence.startswith(f"Lost process 0 on {HERE}, which the others meet at: ")


def test_why_a_process_ends_is_told_to_all_others_and_not_to_itself(meet):
    channels = meet([0, 1, 2], 3)
    told = watched(channels)
    channels[1].fail("The disk is full.", 2)
    for i in (0, 2):
        assert told[i][1].wait(5)
        (ending,) = told[i][0]
        assert (ending.sentence, ending.status, ending.at_once) == (
            f"Process 1 on {HERE} ended: The disk is full.", 2, False
        )  # fmt: skip
    assert told[1][0] == []


def test_after_a_failure_the_ends_of_the_others_are_no_news(meet):
    channels = meet([0, 1, 2], 3)
    told = watched(channels)
    channels[1].fail("The disk is full.", 2)
    assert told[0][1].wait(5)
    channels[2]._line.socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(LostProcessError):
        channels[0].gather("nothing", "x", 0.2)
    assert len(told[0][0]) == 1


def test_processes_that_are_done_may_go_in_any_order(meet):
    channels = meet([0, 1, 2], 3)
    told = watched(channels)
    for i in (1, 0, 2):
        channels[i].close()
        channels[i]._line.socket.shutdown(socket.SHUT_RDWR)
    channels[2].close()  # once more is nothing
    assert [endings for endings, _ in told] == [[], [], []]


def test_a_machine_that_does_not_answer_is_asked_by_the_system(meet):
    (one,) = meet([0], 1)
    assert one._line.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert one._line.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
