import queue
import threading
import time

import pytest

from jmoe.parallel import preemption
from jmoe.parallel.preemption import is_google_cloud, watched
from tests.parallel.metadata import serving

SENTENCE = "Google Cloud preempts this machine"


@pytest.fixture
def cloud():
    with serving() as metadata:
        yield metadata


@pytest.fixture
def told():
    return queue.Queue()


def watching(cloud, told):
    return watched(told.put, {"GCE_METADATA_HOST": cloud.address})


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "jmoe-preemption"]


def test_a_notice_is_told_as_soon_as_it_comes(cloud, told):
    cloud["preempted"] = "FALSE"
    with watching(cloud, told):
        while len(cloud.asked) < 2:  # what it is now, and then to be told of a change
            pass
        assert told.empty()
        cloud["preempted"] = "TRUE"
        assert told.get(timeout=10) == SENTENCE
    assert all("?wait_for_change=true&timeout_sec=" in path for path in cloud.asked)
    for thread in threads():
        thread.join(10)
    assert (told.empty(), len(cloud.asked)) == (True, 2)  # told once, and not asked again


def test_a_notice_that_came_before_is_told(cloud, told):
    cloud["preempted"] = "TRUE\n"
    with watching(cloud, told):
        assert told.get(timeout=10) == SENTENCE


def test_a_wait_without_a_change_is_repeated(cloud, told, monkeypatch):
    monkeypatch.setattr(preemption, "_ANSWERS_WITHIN", 0.01)
    monkeypatch.setattr(preemption, "_LEAST", 0.01)
    cloud["preempted"] = "FALSE"
    with watching(cloud, told):
        while len(cloud.asked) < 4:
            pass
        cloud["preempted"] = "TRUE"
        assert told.get(timeout=10) == SENTENCE


def test_a_server_that_fails_is_asked_again_and_what_changed_meanwhile_is_told(cloud, told, monkeypatch, caplog):
    monkeypatch.setattr(preemption, "_AGAIN_AFTER", 0.01)
    cloud.failing = 503
    cloud["preempted"] = "FALSE"
    with caplog.at_level("INFO"), watching(cloud, told):
        while len(cloud.asked) < 4:
            pass
        cloud["preempted"] = "TRUE"
        assert told.empty()
        cloud.failing = 0
        assert told.get(timeout=10) == SENTENCE
    assert caplog.text.count("do not answer: HTTP Error 503") == 1


def test_a_server_that_cannot_be_reached_is_asked_again(cloud, told, monkeypatch):
    monkeypatch.setattr(preemption, "_AGAIN_AFTER", 0.01)
    cloud["preempted"] = "TRUE"
    addresses = iter(["127.0.0.1:1", "127.0.0.1:1"])

    class Environment(dict):
        def get(self, name, otherwise=None):
            return next(addresses, cloud.address) if name == "GCE_METADATA_HOST" else otherwise

    with watched(told.put, Environment()):
        assert told.get(timeout=10) == SENTENCE


def test_a_server_that_does_not_wait_is_not_asked_all_the_time(cloud, told, monkeypatch):
    monkeypatch.setattr(preemption, "_ANSWERS_WITHIN", 0)
    cloud["preempted"] = "FALSE"
    with watching(cloud, told):
        time.sleep(0.5)
    assert len(cloud.asked) == 1


def test_nothing_is_watched_where_the_metadata_does_not_say(cloud, told):
    with watching(cloud, told):
        for thread in threads():
            thread.join(10)
            assert not thread.is_alive()
    assert len(cloud.asked) == 1
    assert told.empty()


def test_nothing_is_told_after_the_end(cloud, told):
    cloud["preempted"] = "FALSE"
    with watching(cloud, told):
        while len(cloud.asked) < 2:
            pass
        (thread,) = [thread for thread in threads() if thread.is_alive()]
    cloud["preempted"] = "TRUE"
    thread.join(10)
    assert not thread.is_alive()
    assert told.empty()


def test_elsewhere_nobody_is_asked(told, monkeypatch, tmp_path):
    monkeypatch.setattr(preemption, "_PRODUCT", tmp_path / "none")
    assert not is_google_cloud({})
    with watched(told.put, {}):
        assert not any(thread.is_alive() for thread in threads())
    product = tmp_path / "product_name"
    monkeypatch.setattr(preemption, "_PRODUCT", product)
    for name, known in (("Google Compute Engine\n", True), ("Standard PC\n", False)):
        product.write_text(name)
        assert is_google_cloud({}) == known
    assert is_google_cloud({"GCE_METADATA_IP": "127.0.0.1:1"})
