import os
import pathlib
import subprocess
import sys
import types

import pytest

from jmoe.cli import main as cli
from jmoe.errors import UserError

ROOT = pathlib.Path(cli.__file__).parents[2]


def command(run):
    """A command without arguments that does what the function does."""
    return types.SimpleNamespace(SUMMARY="Does it.", EXAMPLE="jmoe it", add_arguments=lambda parser: None, run=run)


@pytest.fixture
def status(monkeypatch):
    """Returns the exit status of a command that does what the function does."""

    def status_of(run):
        monkeypatch.setitem(cli.COMMANDS, "it", command(run))
        return cli.main(["it"])

    return status_of


def raises(error):
    def run(args):
        raise error

    return run


def test_the_status_is_that_of_the_command(status):
    assert status(lambda args: 0) == 0
    assert status(lambda args: 1) == 1


def test_a_mistake_of_the_user_is_one_line_without_traceback(status, capsys, monkeypatch):
    monkeypatch.delenv("JMOE_TRACEBACK", raising=False)
    assert status(raises(UserError("K=9 is more than E=8."))) == 2
    assert capsys.readouterr() == ("", "jmoe: K=9 is more than E=8.\n")


def test_the_traceback_of_a_mistake_can_be_asked_for(status, capsys, monkeypatch):
    monkeypatch.setenv("JMOE_TRACEBACK", "1")
    assert status(raises(UserError("K=9 is more than E=8."))) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert error.endswith("\njmoe: K=9 is more than E=8.\n")


def test_an_error_may_have_a_status_of_its_own(status, capsys):
    class StoppedError(UserError):
        exit_code = 130

    assert status(raises(StoppedError("Saved step 7 in runs/a."))) == 130
    assert capsys.readouterr().err == "jmoe: Saved step 7 in runs/a.\n"


def test_ctrl_c_ends_with_130(status, capsys):
    assert status(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.endswith("jmoe: interrupted.\n")


def test_a_bug_is_not_hidden(status):
    for error in (ValueError("bug"), ModuleNotFoundError("bug", name="jmoe.no_such_file"), ModuleNotFoundError("bug")):
        with pytest.raises(type(error), match="bug"):
            status(raises(error))


def test_a_missing_package_says_how_to_install_it(status, capsys):
    assert status(raises(ModuleNotFoundError("No module named 'optax'", name="optax"))) == 2
    assert capsys.readouterr().err.endswith(
        "jmoe: 'jmoe it' needs the module 'optax', which is not installed. "
        "This installs everything for training: pip install 'jmoe[train]'\n"
    )


def test_a_mistyped_command_is_recognised(capsys):
    assert cli.main(["trian", "x.py"]) == 2
    known = ", ".join(cli.COMMANDS)
    assert capsys.readouterr().err.endswith(
        f"jmoe: error: there is no command 'trian'. Did you mean 'train'? The commands are: {known}.\n"
    )
    assert cli.main(["zzz"]) == 2
    assert "there is no command 'zzz'. The commands are: train, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "mistake"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train", "x.py"], "the following arguments are required: --workdir"),
        (["train", "--workdir", "d"], "the following arguments are required: EXPERIMENT"),
        (["train", "x.py", "--work", "d"], "the following arguments are required: --workdir"),
        (["evaluate", "x.py", "--workdir", "d", "--step", "last"], "argument --step: invalid int value: 'last'"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_wrong_arguments_end_with_2(capsys, argv, mistake):
    assert cli.main(argv) == 2
    assert mistake in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_help_of_a_command_has_a_description_and_an_example_that_parses(capsys, name):
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    example = cli.COMMANDS[name].EXAMPLE
    assert cli.COMMANDS[name].SUMMARY in shown
    assert f"\nexample:\n  {example}\n" in shown
    assert cli._parse(example.split()[1:]).command == name


def test_the_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in cli.COMMANDS)


def run_python(*args, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *args], env=env, text=True, timeout=120, check=False, **options)


def test_help_is_answered_without_importing_jax():
    script = (
        "import sys\nfrom jmoe.cli.main import main\nassert main(['--help']) == 0\n"
        "sys.exit(' '.join({'jax', 'flax', 'numpy', 'optax'} & set(sys.modules)) or 0)"
    )
    done = run_python("-c", script, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_module_is_the_command(tmp_path):
    done = run_python("-m", "jmoe", "trian", capture_output=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean 'train'?" in done.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    script = (
        "import sys, types\nfrom jmoe.cli import main as cli\n"
        "def run(args):\n    sys.stdin.read()\n    print('x' * 100_000)\n    return 0\n"
        "cli.COMMANDS['it'] = types.SimpleNamespace(SUMMARY='', EXAMPLE='', add_arguments=lambda p: None, run=run)\n"
        "sys.exit(cli.main(['it']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        process.stdout.close()  # before it writes, because it waits for the end of its input
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
