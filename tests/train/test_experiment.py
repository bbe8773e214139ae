import dataclasses
import sys

import pytest

from jmoe.errors import UserError
from jmoe.train.config_json import differences, from_json, to_json
from jmoe.train.experiment import load_config, load_experiment


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    router: object = None


GOOD = f"from {__name__} import Config\n\ndef get_config():\n    return Config(seed=3)\n"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("jmoe_experiment."):
            del sys.modules[name]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def sentence(path, *sets):
    with pytest.raises(UserError) as error:
        load_config(path, Config, sets)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.py", "with space/übung 1.2.py", "class.py", "json.py"])
def test_an_experiment_is_loaded_from_its_path(tmp_path, name):
    json = sys.modules.get("json")
    for path in (write(tmp_path, name, GOOD), tmp_path / name):
        assert load_config(path, Config) == Config(seed=3)
        assert load_config(path, Config, ["seed=4"]) == Config(seed=4)
    assert not list(tmp_path.rglob("__pycache__"))
    assert sys.modules.get("json") is json


def test_a_file_that_changed_is_read_again(tmp_path):
    path = write(tmp_path, "a.py", GOOD)
    assert load_config(path, Config).seed == 3
    write(tmp_path, "a.py", GOOD.replace("3", "5"))
    assert load_config(path, Config).seed == 5


def test_an_experiment_may_have_a_router_of_its_own(tmp_path):
    own = (
        "from __future__ import annotations\n"  # with it, dataclasses look up the module of the class by name
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine:\n    k: int = 1\n"
    )
    path = write(tmp_path, "a.py", own + GOOD.replace("seed=3", "router=Mine()"))
    config = load_config(path, Config, ["router.k=2", "seed=1"])
    assert config.router.k == 2
    assert load_config(path, Config, ["router=Mine(k=3)"]).router.k == 3
    config = load_config(path, Config)
    assert from_json(to_json(config), modules=[__name__]) == config


def test_an_experiment_may_build_on_another(tmp_path):
    write(tmp_path, "base.py", GOOD)
    dense = (
        "import dataclasses, pathlib\n"
        f"from {__name__} import Config\nfrom jmoe.train.experiment import load_config\n\n"
        "def get_config():\n"
        "    base = load_config(pathlib.Path(__file__).with_name('base.py'), Config)\n"
        "    return dataclasses.replace(base, router='dense')\n"
    )
    assert load_config(write(tmp_path, "dense.py", dense), Config) == Config(seed=3, router="dense")


def test_a_missing_experiment_names_the_nearest(tmp_path):
    assert sentence("digits.py") == (
        "There is no experiment 'digits.py'. It is the path of a .py file with a function get_config()."
    )
    for name in ("experiments/digits_vmoe.py", "experiments/cifar10.py", "experiments/_private.py", "own/mine.py"):
        write(tmp_path, name, GOOD)
    assert sentence("experiments/digit_vmoe.py") == (
        "There is no experiment 'experiments/digit_vmoe.py'. Did you mean 'experiments/digits_vmoe.py'?"
    )
    assert sentence("digits_vmoe") == (
        "There is no experiment 'digits_vmoe'. Did you mean 'experiments/digits_vmoe.py'?"
    )
    assert sentence("own/digits_vmoe.py") == (
        "There is no experiment 'own/digits_vmoe.py'. Did you mean 'experiments/digits_vmoe.py'?"
    )
    assert sentence("own/zzzzz.py") == (
        "There is no experiment 'own/zzzzz.py'. There are: own/mine.py, experiments/cifar10.py, "
        "experiments/digits_vmoe.py."
    )
    assert sentence("no/such/folder/cifar.py") == (
        "There is no experiment 'no/such/folder/cifar.py'. Did you mean 'experiments/cifar10.py'?"
    )


def test_a_folder_is_not_an_experiment(tmp_path):
    write(tmp_path, "experiments/b.py", GOOD)
    write(tmp_path, "experiments/a.py", GOOD)
    assert sentence("experiments") == (
        "'experiments' is a folder; name one of the experiments in it: experiments/a.py, experiments/b.py."
    )


def test_a_long_list_is_cut(tmp_path):
    for i in range(23):
        write(tmp_path, f"experiments/e{i:02}.py", GOOD)
    assert sentence("zzz.py").endswith("experiments/e19.py, and 3 more.")


def test_another_kind_of_file_is_not_an_experiment(tmp_path):
    assert sentence(write(tmp_path, "a.json", "{}")) == (
        "'a.json' is not a Python file; an experiment is a .py file with a function get_config()."
    )
    assert sentence("a.json/b.py") == "The experiment 'a.json/b.py' cannot be read: Not a directory."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "import os\n\nTopKK(k=2)\n",
            "a.py, line 3, cannot be imported: NameError: name 'TopKK' is not defined.",
        ),
        ("x = 1\ndef get_config(:\n", "a.py, line 2, cannot be imported: SyntaxError: invalid syntax."),
        (
            "def get_config():\nreturn 1\n",
            "a.py, line 2, cannot be imported: IndentationError: expected an indented block after function definition "
            "on line 1.",
        ),
        (
            "\nimport optaxx\n",
            "a.py, line 2, cannot be imported: ModuleNotFoundError: No module named 'optaxx'. "
            "If it is a part of training, this installs it: pip install 'jmoe[train]'",
        ),
        ("raise RuntimeError\n", "a.py, line 1, cannot be imported: RuntimeError."),
        ("raise RuntimeError('two\\n  lines')\n", "a.py, line 1, cannot be imported: RuntimeError: two lines."),
        ("import sys\nsys.exit(3)\n", "a.py, line 2, cannot be imported: SystemExit: 3."),
        (
            "import json\n\njson.loads('{')\n",
            "a.py, line 3, cannot be imported: JSONDecodeError: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        ("x = 1\n", "a.py has no function get_config(); an experiment defines one that returns a TrainConfig."),
        (
            "get_config = 3\n",
            "a.py has no function get_config(); an experiment defines one that returns a TrainConfig.",
        ),
        (
            "def get_config():\n    pass\n",
            "get_config() of a.py must return a Config, not None. Did you forget the return?",
        ),
        ("def get_config():\n    return {}\n", "get_config() of a.py must return a Config, not a dict."),
        (
            "def get_config():\n    return 1 / 0\n",
            "get_config() of a.py, line 2, failed: ZeroDivisionError: division by zero.",
        ),
        (
            "def get_config(size):\n    return size\n",
            "get_config() of a.py failed: TypeError: get_config() missing 1 required positional argument: 'size'.",
        ),
        (
            "from jmoe.errors import UserError\ndef get_config():\n    raise UserError('K=9 is more than E=8.')\n",
            "get_config() of a.py, line 3, failed: K=9 is more than E=8.",
        ),
    ],
)
def test_an_experiment_that_does_not_work_is_explained(tmp_path, text, expected):
    assert sentence(write(tmp_path, "a.py", text)) == expected


def test_an_error_further_down_names_the_line_of_the_experiment(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write(tmp_path, "helper_of_a.py", "def half(x):\n    return x / 'two'\n")
    path = write(tmp_path, "a.py", "import helper_of_a\n\nhelper_of_a.half(3)\n")
    assert sentence(path).startswith("a.py, line 3, cannot be imported: TypeError: unsupported operand")
    write(tmp_path, "broken_of_a.py", "def :\n")
    assert sentence(write(tmp_path, "a.py", "\nimport broken_of_a\n")) == (
        "a.py, line 2, cannot be imported: SyntaxError: invalid syntax (broken_of_a.py, line 1)"
    )


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"x = '\xff'\n", b"# coding: nonsense\n"])
def test_a_file_that_is_not_text_is_explained(tmp_path, content):
    (tmp_path / "a.py").write_bytes(content)
    assert "a.py" in sentence("a.py")
    assert "cannot be imported: " in sentence("a.py")


def test_a_failed_experiment_leaves_no_module_behind(tmp_path):
    path = write(tmp_path, "a.py", GOOD)
    load_config(path, Config)
    loaded = sys.modules["jmoe_experiment.a"]
    write(tmp_path, "a.py", "1 / 0")
    sentence(path)
    assert sys.modules["jmoe_experiment.a"] is loaded
    sentence(write(tmp_path, "b.py", "1 / 0"))
    assert "jmoe_experiment.b" not in sys.modules


def test_ctrl_c_while_importing_is_not_a_mistake_of_the_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_config(write(tmp_path, "a.py", "raise KeyboardInterrupt"), Config)


def test_a_wrong_override_says_where_it_came_from(tmp_path):
    assert sentence(write(tmp_path, "a.py", GOOD), "sed=1") == (
        "Config has no option 'sed' (from --set sed=1). Did you mean 'seed'? Its options are: seed, router."
    )


TRAIN = """
from jmoe.data import DataConfig, Digits
from jmoe.models.vit import ViTConfig
from jmoe.nn import MoEConfig
from jmoe.train.config import TrainConfig
from jmoe.train.optimizer import AdamW


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ViTConfig(
            patch_size=2, width=8, depth=2, hidden_dim=16, num_heads=2, image_size=(8, 8), moe=MoEConfig()
        ),
        data=DataConfig(source=Digits(), batch_size=16),
        optimizer=AdamW(peak_lr=1e-3),
        epochs=2.0,
    )
"""


def test_the_experiment_of_a_training_run_is_loaded_saved_and_edited(tmp_path):
    path = write(tmp_path, "a.py", TRAIN)
    config = load_experiment(path)
    assert config.epochs == 2.0
    assert from_json(to_json(config)) == config
    edited = load_experiment(path, ["epochs=none", "steps=3", "evaluate.router=TopK(k=2, capacity_factor=4)"])
    assert (edited.steps, edited.evaluate.router.capacity_factor) == (3, 4.0)
    assert differences(to_json(config), to_json(edited))[:2] == ["epochs: 2.0 -> None", "steps: None -> 3"]


def test_the_experiment_of_a_training_run_gives_a_train_config(tmp_path):
    with pytest.raises(UserError) as error:
        load_experiment(write(tmp_path, "a.py", GOOD))
    assert str(error.value) == "get_config() of a.py must return a TrainConfig, not a Config."
