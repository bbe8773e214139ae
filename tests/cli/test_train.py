import pytest

from jmoe.cli.main import main


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_mistyped_experiment_is_one_line_and_makes_no_work_folder(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_vmoe.py").write_text("def get_config():\n    return 1 / 0\n")
    assert main([command, "digit_vmoe.py", "--workdir", "run"]) == 2
    assert main([command, "digits_vmoe.py", "--workdir", "run", "--set", "seed=3", "--set", "steps=4"]) == 2
    assert capsys.readouterr() == (
        "",
        "jmoe: There is no experiment 'digit_vmoe.py'. Did you mean 'digits_vmoe.py'?\n"
        "jmoe: get_config() of digits_vmoe.py, line 2, failed: ZeroDivisionError: division by zero.\n",
    )
    assert not (tmp_path / "run").exists()
