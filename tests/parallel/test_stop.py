import os
import signal

import pytest

from jmoe.parallel.stop import AgreedStop
from tests.parallel import processes


def test_one_process_stops_at_once_and_without_its_devices():
    stop = AgreedStop()
    assert stop.update(None) is None
    assert stop.update(15) == 15
    assert not stop._pending


def steps(where):
    """Body of one of several processes: steps until a signal, which comes to one of them in the middle of step 5."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jmoe.train.signals import StopRequest

    me = jax.process_index()
    mesh = Mesh(np.array(jax.devices()).reshape(jax.process_count(), 1, -1), ("data", "fsdp", "expert"))
    split = NamedSharding(mesh, PartitionSpec(("data", "expert")))
    step_function = jax.jit(lambda x: x * 0 + x.mean() + 1, out_shardings=split)
    x = jax.make_array_from_callback((jax.device_count(),), split, lambda index: np.zeros(1, np.float32))
    stop = AgreedStop(mesh)
    with jax.set_mesh(mesh), StopRequest() as request:
        for step in range(1, 100):
            x = step_function(x)
            if (step, me) in ((5, 1), (6, 0)) and (where == "both" or me == int(where)):
                os.kill(os.getpid(), signal.SIGTERM if me == 1 else signal.SIGINT)
            agreed = stop.update(request.signum)
            if agreed is not None:
                break
    print(step, agreed, float(jnp.max(jax.device_get(x.addressable_data(0)))))


@pytest.mark.parametrize(
    ("where", "expected"), [("1", "7 15 7.0\n"), pytest.param("0", "8 2 8.0\n", marks=pytest.mark.slow)]
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(where, expected):
    outputs = processes.together("tests.parallel.test_stop:steps", 2, where, devices=2)
    assert outputs == [expected] * 2  # two steps after it was given


@pytest.mark.slow
def test_signals_to_both_in_different_steps_stop_both_after_the_same():
    assert processes.together("tests.parallel.test_stop:steps", 2, "both", devices=2) == ["7 15 7.0\n"] * 2


@pytest.mark.slow
def test_four_processes_stop_together():
    assert processes.together("tests.parallel.test_stop:steps", 4, "1") == ["7 15 7.0\n"] * 4
