import pytest

from jmoe.errors import UserError
from jmoe.train.agreement import Agreement, _verdict


def test_one_process_hears_itself():
    agreement = Agreement("test")
    assert agreement.exchange("anything", {"a": (1, None)}) == [{"a": (1, None)}]
    assert (agreement.process, agreement.processes) == (0, 1)


def test_one_process_raises_what_it_raised():
    agreement = Agreement("test")
    assert agreement.together("counting", lambda: 3, tell=str) == (3, ["3"])
    for error in (UserError("No."), KeyError("x")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as raised:
            agreement.together("failing", fail)
        assert raised.value is error


def test_all_hear_what_all_say():
    assert _verdict("the list", [["the list", 3], ["the list", None]], [], 2) == [3, None]


def test_those_who_do_not_come_are_named():
    one = "Process 2 of 3 did not come to the list within 600 seconds."
    assert _verdict("the list", [["the list", 3], ["the list", 4]], [2], 3) == one
    many = "Processes 1, 2, 3, 4, 5, 6, 7, 8 and 3 more of 12 did not come to the list within 600 seconds."
    assert _verdict("the list", [["the list", 3]], list(range(1, 12)), 12) == many


def test_those_who_come_for_something_else_are_named():
    said = [["step 3", 0], ["step 3", 0], ["step 4", 0]]
    assert _verdict("step 3", said, [], 3) == "Process 0 of 3 came to step 3 when process 2 came to step 4."
