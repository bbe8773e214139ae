import os
import socket
import sys
import threading

import pytest

from jmoe.cli.main import main
from jmoe.errors import LOST, UserError
from jmoe.parallel import channel, hosts, startup
from jmoe.parallel.startup import Addresses, check, cluster, start
from tests.parallel import processes
from tests.parallel.metadata import serving

HERE = socket.gethostname()
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_addresses_that_are_given_are_taken():
    assert check(Addresses(coordinator="10.0.0.5:1234", processes=4, process=3)) == ("10.0.0.5", 1234, 4, 3)
    assert check(Addresses(coordinator="[fd00::5]:1", processes=2, process=0)) == ("fd00::5", 1, 2, 0)
    assert check(Addresses(coordinator="127.0.0.1:1234", processes=2, process=1, local=True)) == (
        "127.0.0.1",
        1234,
        2,
        1,
    )


def test_one_process_needs_no_addresses():
    assert check(Addresses()) is None
    assert check(Addresses(processes=1)) is None
    assert check(Addresses(processes=1, process=0)) is None
    assert check(Addresses(coordinator="localhost:1", processes=1, process=0)) is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"coordinator": "a:1"},
            "--coordinator came without --processes and --process. Every process needs all three, --coordinator "
            "HOST:PORT --processes N --process I, or none of them to have the cluster say.",
        ),
        ({"coordinator": "a:1", "process": 0}, "--coordinator and --process came without --processes. Every"),
        ({"processes": 2}, "--processes came without --coordinator and --process. Every"),
        ({"processes": 1, "process": 1}, "--processes and --process came without --coordinator. Every"),
        ({"local": True}, "--local is about --coordinator, --processes and --process; give them, too."),
        (
            {"coordinator": "host-0", "processes": 2, "process": 0},
            "--coordinator host-0 is not an address: HOST:PORT was wanted, with a port from 1 to 65535, such as "
            "host-0:1234, 10.0.0.5:1234 or [fd00::5]:1234.",
        ),
        ({"coordinator": "host-0:0", "processes": 2, "process": 0}, "--coordinator host-0:0 is not an address: "),
        ({"coordinator": "host-0:65536", "processes": 2, "process": 0}, "--coordinator host-0:65536 is not an"),
        ({"coordinator": "http://host-0:80", "processes": 2, "process": 0}, "--coordinator http://host-0:80 is"),
        ({"coordinator": "fd00::5:1234", "processes": 2, "process": 0}, "--coordinator fd00::5:1234 is not an"),
        ({"coordinator": ":1234", "processes": 2, "process": 0}, "--coordinator :1234 is not an address"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "--processes must be 1 or more, not 0."),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            "--process 2 is not one of the 2 processes: they count from 0 to 1.",
        ),
        ({"coordinator": "a:1", "processes": 2, "process": -1}, "--process -1 is not one of the 2 processes"),
    ],
)
def test_addresses_that_cannot_be_meant_are_refused(given, sentence):
    with pytest.raises(UserError) as error:
        check(Addresses(**given))
    assert str(error.value).startswith(sentence)


LOOPBACK = ["localhost", "LOCALHOST.", "db.localhost", "127.0.0.1", "127.8.9.1", "[::1]", "[::ffff:127.0.0.1]"]
UNSPECIFIED = ["0.0.0.0", "0", "[::]", "[::ffff:0.0.0.0]"]


@pytest.mark.parametrize("host", LOOPBACK + UNSPECIFIED)
@pytest.mark.parametrize("process", [0, 1])
def test_a_coordinator_of_several_hosts_at_which_each_reaches_itself_is_refused(host, process):
    with pytest.raises(UserError) as error:
        check(Addresses(coordinator=f"{host}:1234", processes=2, process=process))
    assert str(error.value) == (
        f"The coordinator {host}:1234 is a loopback or unspecified address, at which a host reaches only itself. "
        "Give the name or address of the machine of process 0 as the other hosts see it; or --local, if all 2 "
        "processes run on this machine."
    )


def test_a_name_that_resolves_to_loopback_is_refused_but_not_the_own_name_of_process_0(monkeypatch):
    names = {
        "any": ["0.0.0.0", "::"],
        "mapped": ["::ffff:127.0.0.1"],
        "linked": ["fe80::1%lo"],
        "inner": ["127.0.0.1", "::1"],
        "mixed": ["127.0.1.1", "10.0.0.5"],
        "me": ["127.0.1.1"],
    }

    def resolve(host, port):
        if host not in names:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, None, 0, "", (address, 0)) for address in names[host]]

    monkeypatch.setattr(startup.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(startup.socket, "gethostname", lambda: "me")
    monkeypatch.setattr(startup.socket, "getfqdn", lambda: "me.cluster")
    for host, process, refused in [
        ("any", 1, True),
        ("mapped", 1, True),
        ("linked", 1, False),
        ("inner", 0, True),
        ("inner", 1, True),
        ("mixed", 1, False),
        ("me", 0, False),  # a machine often has its own name at 127.0.1.1
        ("me", 1, True),
        ("not-yet-known", 1, False),
    ]:
        assert startup._is_own(host, process) is refused, (host, process)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a pod
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),  # the tests of topologies set such variables; there is no TPU
    ],
)
def test_a_cluster_is_found_by_its_environment_only_when_it_started_several(environment, found, monkeypatch):
    monkeypatch.setattr(startup, "_has_tpu", lambda: False)
    assert cluster(environment) == found


def test_an_indexed_kubernetes_job_needs_its_package(monkeypatch):
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(startup, "_has_tpu", lambda: False)
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: object())
    assert cluster(environment) == "Kubernetes"
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="needs the package 'kubernetes': pip install 'jax\\[k8s\\]'. Or give --coordin"
    ):
        cluster(environment)


@pytest.mark.parametrize(
    ("environment", "endpoints", "found"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, None),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, None, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, None, "TPU"),
        ({}, "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2", "TPU"),
        ({}, "unknown:unknown:10.0.0.1", None),
        ({}, None, None),  # chips elsewhere than in Google's cloud
        ({"TPU_SKIP_MDS_QUERY": "1"}, "a,b", None),
        ({"TPU_WORKER_HOSTNAMES": "a"}, "a,b", None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "1", "JOB_COMPLETION_INDEX": "1"}, None, "TPU"),
    ],
)
def test_a_tpu_slice_of_several_hosts_is_found(environment, endpoints, found, monkeypatch):
    monkeypatch.setattr(startup, "_has_tpu", lambda: True)
    with serving() as metadata:
        if endpoints is not None:
            metadata["attributes/worker-network-endpoints"] = endpoints
        assert cluster({"GCE_METADATA_IP": metadata.address} | environment) == found


@pytest.mark.parametrize(("slices", "found"), [(2, "TPU"), (1, None)])
def test_slices_of_one_host_each_are_found_by_their_metadata(slices, found, monkeypatch):
    monkeypatch.setattr(startup, "_has_tpu", lambda: True)
    with serving() as metadata:
        metadata["attributes/worker-network-endpoints"] = "unknown:unknown:10.0.0.1"
        metadata["attributes/tpu-env"] = f"ACCELERATOR_TYPE: 'v5litepod-4'\nMEGASCALE_NUM_SLICES: '{slices}'\n"
        assert cluster({"GCE_METADATA_IP": metadata.address}) == found


def test_one_process_starts_nothing(monkeypatch):
    import jax

    monkeypatch.setattr(startup, "cluster", lambda: None)
    monkeypatch.setattr(hosts, "_current", None)
    with start() as alone:
        assert (alone.count, alone.process) == (1, 0)
        assert hosts.current() is alone
    assert not jax.distributed.is_initialized()
    monkeypatch.setattr(startup, "cluster", lambda: "SLURM")
    assert start(Addresses(processes=1)).count == 1


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_command_line_refuses_addresses_in_a_sentence(command, capsys, tmp_path):
    experiment = processes.ROOT / "experiments" / "digits_vmoe.py"
    arguments = [command, str(experiment), "--workdir", str(tmp_path / "run")]
    assert main([*arguments, "--coordinator", "localhost:1234", "--processes", "2", "--process", "1"]) == 2
    assert main([*arguments, "--processes", "2"]) == 2
    assert main([*arguments, "--startup-timeout", "0"]) == 2
    out, err = capsys.readouterr()
    first, second, third = err.splitlines()
    assert first.startswith("jmoe: The coordinator localhost:1234 is a loopback or unspecified address")
    assert second.startswith("jmoe: --processes came without --coordinator and --process.")
    assert third == "jmoe: --startup-timeout must be more than 0 seconds and at most 10,000,000, not 0."
    assert (out, (tmp_path / "run").exists()) == ("", False)


def jmoe(*arguments):
    """The command that trains for a moment in one of several processes."""
    experiment = str(processes.ROOT / "experiments" / "digits_vmoe.py")
    local = ["--coordinator", "{coordinator}", "--local", *arguments]
    return [sys.executable, "-m", "jmoe", "train", experiment, "--workdir", os.devnull + "/never", *local]


def sentences(ended, status):
    """The last line of each process, which must have that status and no traceback."""
    for process in ended:
        assert process.status == status, process.stderr
        assert "Traceback" not in process.stderr
        assert "Check failure" not in process.stderr
    return [process.stderr.splitlines()[-1] for process in ended]


@pytest.mark.slow
def test_a_missing_host_is_named_by_those_who_came():
    commands = [jmoe("--processes", "3", "--process", i, "--startup-timeout", "4") for i in "02"]
    with processes.start(commands) as running:
        said = sentences(running.wait(30), LOST)
    assert set(said) == {
        f"jmoe: Process 1 of 3 did not come within 4 s; there are 0 on {HERE}, 2 on {HERE}. See whether the same "
        "command runs on every host, with the same coordinator, and what it says there."
    }


@pytest.mark.slow
def test_two_processes_of_one_number_are_told_to_all():
    commands = [jmoe("--processes", "3", "--process", i, "--startup-timeout", "20") for i in "011"]
    with processes.start(commands) as running:
        said = sentences(running.wait(30), 2)
    assert len(set(said)) == 1
    assert said[0].startswith(f"jmoe: Two processes are number 1 of 3: one on {HERE} (pid ")


@pytest.mark.slow
def test_two_of_process_0_on_a_machine_are_told_to_both():
    commands = [jmoe("--processes", "2", "--process", "0", "--startup-timeout", "20")] * 2
    with processes.start(commands) as running:
        said = sentences(running.wait(30), 2)
    assert len(set(said)) == 1
    assert said[0].startswith(f"jmoe: Two processes are number 0 of 2: one on {HERE} (pid ")


def test_a_port_or_an_address_that_cannot_be_had_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        threading.Thread(target=lambda: taken.accept()[0].close(), daemon=True).start()
        with pytest.raises(
            UserError, match=f"listen at 127.0.0.1:{port}: Address already in use. Is another process 0"
        ):
            start(Addresses(coordinator=f"127.0.0.1:{port}", processes=2, process=0, local=True), timeout=5)
    with pytest.raises(
        UserError, match=rf"Cannot assign requested address\. 192\.0\.2\.1 is no address of .*{HERE}: give"
    ):
        start(Addresses(coordinator="192.0.2.1:1234", processes=2, process=0, local=True), timeout=5)


def test_an_unknown_name_is_told_from_a_wall(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(channel.socket, "create_connection", unknown)
    with pytest.raises(
        UserError, match=r"not known\)\. See whether the name is spelled right, and known on this host\."
    ):
        start(Addresses(coordinator="hsot-0:1234", processes=2, process=1), timeout=0.1)


@pytest.mark.slow
def test_an_unreachable_coordinator_is_a_sentence_in_time():
    with processes.start([jmoe("--processes", "2", "--process", "1", "--startup-timeout", "1")]) as running:
        (ended,) = running.wait(30)
    (said,) = sentences([ended], LOST)
    assert said.startswith("jmoe: The coordinator 127.0.0.1:")
    assert f" could not be reached from process 1 on {HERE} within 1 s (Connection refused). See whether" in said


def found(timeout):
    """Body of a process that a cluster has started."""
    with start(timeout=float(timeout)) as here:
        here.compare({"config": "same"})
        print(here.process, here.count)


def slurm(process, timeout):
    """The command and the environment of one task of two."""
    code = f"from tests.parallel.test_startup import found; found({timeout})"
    variables = SLURM | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
    return ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-c", code]


@pytest.mark.slow
def test_the_tasks_of_a_slurm_step_find_each_other():
    port = {"JAX_COORDINATOR_PORT": str(processes.free_port())}
    with processes.start([slurm(i, 30) for i in range(2)], environment=port) as running:
        ended = running.wait(40)
    assert [(process.status, process.stdout) for process in ended] == [(0, "0 2\n"), (0, "1 2\n")]


@pytest.mark.slow
def test_a_task_that_is_missing_is_a_sentence_in_time():
    port = {"JAX_COORDINATOR_PORT": str(processes.free_port())}
    command = [*slurm(0, 3)]
    with processes.start([command], environment=port) as running:
        (ended,) = running.wait(30)
    (said,) = sentences([ended], LOST)
    assert said.startswith("jmoe: Not all processes came to the coordinator of this SLURM job within 3 s. See whether")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_help_has_the_options_of_many_hosts(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--coordinator HOST:PORT", "--processes N", "--process I", "--local", "--startup-timeout SECONDS"):
        assert option in shown
