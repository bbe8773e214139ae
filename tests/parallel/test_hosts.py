import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from jmoe.errors import LOST, LostProcessError, UserError
from jmoe.parallel import hosts
from jmoe.parallel.channel import Channel, Server, listen
from jmoe.parallel.hosts import Host, Hosts, code_version, format_table, package_versions
from tests.parallel import processes

HERE = socket.gethostname()


def sentences(*parts):
    """What comparing says in processes that have these parts; they are threads of this one."""
    count = len(parts)
    with listen("127.0.0.1", 0) as listener, ThreadPoolExecutor(count) as pool:
        Server(listener, count, 5).start()
        channels = list(pool.map(lambda i: Channel(listener.getsockname(), count, i, timeout=5), range(count)))
        together = [Hosts(channel, i, timeout=5) for i, channel in enumerate(channels)]

        def compare(i):
            try:
                return together[i].compare(parts[i])
            except UserError as error:
                return str(error)

        said = list(pool.map(compare, range(count)))
        for channel in reversed(channels):
            channel.close()
            channel._line.close()
        return said


def test_one_process_compares_and_gathers_with_nobody():
    one = Hosts()
    one.compare({"config": "a"})
    assert one.gather("name", "value") == ["value"]
    with one as entered:
        assert (entered.count, entered.process) == (1, 0)
    one.fail("nobody hears it", 2)


def test_the_table_of_one_process_has_its_devices():
    (host,) = Hosts().table()
    assert (host.process, host.devices, host.platform) == (0, "1 x cpu", "cpu")


def test_the_table_is_aligned():
    lines = format_table(
        [Host(0, "a", "4 x TPU v5 lite", "tpu", "0.10.2", "0.1"), Host(10, "host-10", "1 x cpu", "cpu", "0.1", "0.1")]
    )
    assert lines.split("\n") == [
        "process  host     devices          platform  jax     jmoe",
        "0        a        4 x TPU v5 lite  tpu       0.10.2  0.1",
        "10       host-10  1 x cpu          cpu       0.1     0.1",
    ]


def test_hosts_that_are_alike_pass():
    assert sentences({"a": "x", "b": "y"}, {"b": "y", "a": "x"}) == [None, None]


def test_the_host_that_differs_from_most_is_named_on_all():
    (sentence,) = set(sentences(*[{"a": "same", "b": "x"}] * 2, {"a": "same", "b": "y"}))
    assert sentence == (
        f"The hosts differ in b: it is 'y' in process 2 ({HERE}), and 'x' in process 0 ({HERE}), process 1 ({HERE}). "
        "Make them the same on all hosts."
    )


def test_of_configurations_the_option_is_named():
    ours, theirs = ({"model": {"k": 2, "layers": [1, 3]}, "seed": seed} for seed in (0, 1))
    (sentence,) = set(sentences({"the experiment": json.dumps(ours)}, {"the experiment": json.dumps(theirs)}))
    assert (
        f"The hosts differ in the experiment, seed: it is '1' in process 1 ({HERE}), and '0' in process 0" in sentence
    )
    theirs = {"model": {"k": 2, "layers": [1, 3, 5]}, "seed": 0}
    (sentence,) = set(sentences({"the experiment": json.dumps(ours)}, {"the experiment": json.dumps(theirs)}))
    assert "The hosts differ in the experiment, model.layers.2: it is '5'" in sentence


def test_a_part_that_a_host_lacks_is_a_difference():
    (sentence,) = set(sentences({"a": "x"}, {}))
    assert f"The hosts differ in a: it is '(nothing)' in process 1 ({HERE}), and 'x' in process 0" in sentence


def test_long_values_are_shown_from_where_they_differ():
    (sentence,) = set(sentences({"a": "x" * 500 + "34" + "y" * 500}, {"a": "x" * 500 + "12" + "y" * 500}))
    shown = "..." + "x" * 20 + "{}" + "y" * 38 + "..."
    assert f"it is '{shown.format(12)}' in process 1" in sentence
    assert f"and '{shown.format(34)}' in process 0" in sentence


def test_the_code_version_changes_with_any_source(tmp_path, monkeypatch):
    for package in ("jmoe", "kernels_pallas"):
        (tmp_path / package / "part").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "part" / "a.py").write_text("x = 1\n")
    source = tmp_path / "jmoe" / "part" / "a.py"
    found = []
    for change in (source.stat, lambda: source.write_text("x = 2\n"), lambda: source.rename(source.with_name("b.py"))):
        change()
        monkeypatch.setattr(
            hosts.importlib.util, "find_spec",
            lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path / name)]}),
        )  # fmt: skip
        found.append(code_version())
        monkeypatch.undo()
    assert len(set(found)) == 3
    assert code_version() == code_version()
    assert code_version().startswith("jmoe ")


def test_package_versions_name_what_is_installed():
    import jax
    import numpy as np

    versions = package_versions().split(", ")
    assert versions[0] == f"python {sys.version.split()[0]}"
    assert f"jax {jax.__version__}" in versions
    assert f"numpy {np.__version__}" in versions


@pytest.mark.parametrize("code", [None, 0, 3, "The disk is full."])
def test_sys_exit_is_an_end_like_any_other_unless_it_gives_a_status(code):
    status = {3: 3, "The disk is full.": 1}.get(code)
    with listen("127.0.0.1", 0) as listener, ThreadPoolExecutor(2) as pool:
        Server(listener, 2, 5).start()
        channels = list(pool.map(lambda i: Channel(listener.getsockname(), 2, i, timeout=5), range(2)))
        told = []
        channels[0].watch(told.append)
        assert Hosts(channels[1], 1)._leave(SystemExit(code)) == status
        with pytest.raises(LostProcessError):
            channels[0].gather("name", "", timeout=0.1)  # what the other was told has come before the answer
        assert [ending.status for ending in told] == ([] if status is None else [status])
        for channel in reversed(channels):
            channel._line.close()


def run(coordinator, count, process, what):
    """Body of one of several processes that are started and then do what they are told."""
    import os
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jmoe.cli.main import COMMANDS, main
    from jmoe.parallel.startup import Addresses, start

    def job(args):
        addresses = Addresses(coordinator=coordinator, processes=int(count), process=int(process), local=True)
        with start(addresses, timeout=60) as here:
            if what == "compare":
                here.compare({"code": "same", "config": "same"})
                here.compare({"code": "same", "config": f"steps={5 if process == '1' else 9}"})
            if what == "fail" and process == "1":
                raise UserError("The disk is full.")
            split = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec("all"))
            x = jax.make_array_from_callback((jax.device_count(),), split, lambda index: np.zeros(1, np.float32))
            step = jax.jit(lambda x: x * 0 + jnp.sum(x) + 1, out_shardings=split)
            for i in range(20 if what == "end" else 100_000):
                x = step(x)
                x.block_until_ready()
                if i == 10:
                    print("step 10", flush=True)
                    if what == "wait":
                        time.sleep(600)
            if what == "end":
                return 0
        return 0

    options = {"SUMMARY": "", "EXAMPLE": "", "add_arguments": lambda parser: None, "run": job}
    COMMANDS["job"] = type("Job", (), options)  # pyright: ignore[reportArgumentType]
    status = main(["job"])
    os.environ.clear()
    sys.exit(status)


RUN = "tests.parallel.test_hosts:run"


@pytest.mark.slow
def test_different_hosts_end_on_all_with_the_same_sentence():
    with processes.start([processes.starter(RUN, "compare")] * 2) as running:
        ended = running.wait(60)
    for process in ended:
        assert process.status == 2, process.stderr
        last = process.stderr.splitlines()[-1]
        assert last.startswith("jmoe: The hosts differ in config: it is 'steps=5' in process 1 (")
        assert "Traceback" not in process.stderr
        assert "Check failure" not in process.stderr
    assert "process  host" in ended[0].stderr
    assert "process  host" not in ended[1].stderr


@pytest.mark.parametrize("gone", [1, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["steps", pytest.param("wait", marks=pytest.mark.slow)])
def test_when_a_process_is_killed_the_others_end_in_a_sentence(gone, what):
    with processes.start([processes.starter(RUN, what)] * 2) as running:
        for i in range(2):
            running.wait_for(i, "step 10")
        running.kill(gone)
        other = running.wait(20)[1 - gone]
    assert other.status == LOST, other.stderr
    assert other.stderr.splitlines()[-1].startswith(f"jmoe: Lost process {gone} on ")
    assert other.stderr.endswith("Run the same command on all hosts to go on from the last checkpoint.\n")


@pytest.mark.slow
def test_what_ends_one_host_is_said_on_all():
    with processes.start([processes.starter(RUN, "fail")] * 3) as running:
        ended = running.wait(60)
    assert [process.status for process in ended] == [2, 2, 2]
    for process in (0, 2):
        assert ended[process].stderr.splitlines()[-1].startswith("jmoe: Process 1 on ")
        assert ended[process].stderr.endswith(" ended: The disk is full.\n")
    assert ended[1].stderr.splitlines()[-1] == "jmoe: The disk is full."


@pytest.mark.slow
def test_processes_that_are_done_end_without_a_word():
    with processes.start([processes.starter(RUN, "end")] * 2) as running:
        ended = running.wait(60)
    assert [process.status for process in ended] == [0, 0]
    assert ended[1].stderr == ""


def over_devices():
    """Body of a process that JAX has started: it meets the others over the devices."""
    import jax

    here = hosts.current()
    assert here is hosts.current()
    with here:
        print(here.gather("name", f"value {jax.process_index()}"), len(here.table()))


@pytest.mark.slow
def test_processes_that_jax_has_started_meet_over_the_devices():
    outputs = processes.together("tests.parallel.test_hosts:over_devices", 2)
    assert outputs == ["['value 0', 'value 1'] 2\n"] * 2


def not_entered(how):
    """Body of a process that JAX has started and that never enters the hosts it asks."""
    import time

    import jax

    here = hosts.current()
    print(here.gather("name", f"value {here.process}"), flush=True)
    if how == "fail" and here.process == 1:
        raise KeyError("a bug")
    if how == "fail":
        here.gather("name", "")  # in which process 1 is missing
    jax.distributed.shutdown()  # so that JAX's own farewell does not have them wait for each other
    if here.process == int(how):
        time.sleep(2)
        print("still here")


@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 1])
def test_processes_that_have_not_entered_may_end_in_any_order(last):
    outputs = processes.together("tests.parallel.test_hosts:not_entered", 2, str(last))
    assert outputs[last] == "['value 0', 'value 1']\nstill here\n"
    assert outputs[1 - last] == "['value 0', 'value 1']\n"


@pytest.mark.slow
def test_an_error_of_one_that_has_not_entered_ends_all():
    with processes.start([processes.function("tests.parallel.test_hosts:not_entered", "fail")] * 2) as running:
        first, second = running.wait(60)
    assert (first.status, second.status) == (1, 1)
    assert second.stderr.splitlines()[-1] == "KeyError: 'a bug'"
    assert first.stderr.splitlines()[-1] == f"jmoe: Process 1 on {HERE} ended: KeyError: 'a bug'"
