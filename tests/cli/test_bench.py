import json
import re

import pytest

import kernels_pallas
from jmoe.analysis import speed
from jmoe.cli import bench
from jmoe.cli.main import main
from kernels_pallas import cases, timing


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """All sizes are tiny."""
    case = cases.Case(name="tiny", width=8, hidden_dim=16, tokens=5, images=4, num_experts=2)
    for module, default in ((speed, "LAYER_CASES"), (cases, "KERNEL_CASES")):
        monkeypatch.setattr(module, "CASES", {"tiny": case})
        monkeypatch.setattr(bench, default, ("tiny",))
    monkeypatch.setattr(timing, "STARTING", 0.0)  # or what is told of short times would depend on the machine


def test_what_is_timed_by_default_exists(monkeypatch):
    monkeypatch.undo()
    assert {*bench.LAYER_CASES} < {*speed.CASES}
    assert {*bench.KERNEL_CASES} < {*cases.CASES}
    assert {*speed.CASES} == {*cases.CASES} == {"S/32", "B/16", "B/16-384", "H/14"}


def test_layers_are_a_table_of_ratios(capsys):
    assert main(["bench", "layer", "--runs", "1"]) == 0
    heading, columns, line = capsys.readouterr().out.splitlines()
    assert heading.startswith("medians of 1 paired runs, forward and backward, as ratios to a dense MLP")
    assert heading.endswith("; float32 on cpu")
    names = "case images E K C rows dense ms gather einsum batched einsum/gather gather/batched"
    assert columns.split() == names.split()
    assert re.fullmatch(r"tiny +4 +2 +2 +1\.05 +48( +\d+\.\d\d){6}", line)
    assert len(line) >= len(columns)  # as wide, but for a number that is wider than its column


def test_layers_as_json_are_what_was_measured_and_where(capsys):
    command = "bench layer --runs 1 --json --num-experts 4 --capacity-factor 1.5 --images 8 --dtype bfloat16"
    assert main([*command.split(), "--method", "published"]) == 0
    report = json.loads(capsys.readouterr().out)
    (result,) = report["results"]
    assert result["rows"] == 128  # 4 experts for 8 * 5 * 2 * 1.5 choices: 30 each, rounded up to 32
    assert (result["case"]["images"], result["case"]["k"]) == (8, 2)
    assert (result["dtype"], result["runs"]) == ("bfloat16", 1)
    assert result["seconds"].keys() == {"dense", "published", "batched"}
    assert result["ratios"].keys() == {"published", "batched"}
    machine = report["machine"]
    assert (machine["platform"], machine["device_kind"]) == ("cpu", "cpu")
    assert {"jmoe", "jax", "jaxlib", "python"} <= machine["versions"].keys()


def test_options_are_timed_in_every_combination(capsys):
    command = "bench kernels --op gather_rows --runs 1 --json --num-experts 2 --num-experts 4 --k 1 --k 2 --images 8"
    assert main(command.split()) == 0
    timed = [result["case"] for result in json.loads(capsys.readouterr().out)["results"]]
    assert [(case["num_experts"], case["k"]) for case in timed] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert {case["images"] for case in timed} == {8}


def test_memory_is_a_table_in_mib(capsys):
    assert main(["bench", "layer", "--memory", "--method", "gather", "--implementation", "xla"]) == 0
    heading, columns, line = capsys.readouterr().out.splitlines()
    assert heading == "temporary memory in MiB, forward and backward, and its ratio to einsum's; float32 on cpu"
    assert re.split(" {2,}", columns)[6:] == [
        "dense MiB",
        "gather-xla MiB",
        "einsum MiB",
        "batched MiB",
        "dense/einsum",
        "gather-xla/einsum",
        "batched/einsum",
    ]
    assert re.fullmatch(r"tiny +4 +2 +2 +1\.05 +48( +\d+\.\d){4}( +\d+\.\d\d){3}", line)


def test_kernels_are_a_line_for_each_op_and_case(capsys):
    assert main(["bench", "kernels", "--runs", "1", "--case", "tiny", "--case", "tiny"]) == 0
    heading, columns, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("medians of 1 paired runs, forward and ('+') with gradients, as ratios to the bound")
    assert columns.split() == ["op", "bound", "case", "images", "E", "K", "C", "ms", "xla", "ms+", "xla+", "default"]
    assert [line.split()[0] for line in lines] == [op for op in kernels_pallas.OPS for _ in range(2)]
    for line in lines:
        assert re.fullmatch(r"\w+ +(copy|dense) +tiny +4 +2 +2 +1\.05( +\d+\.\d\d){4} +xla", line)


def test_times_that_are_too_short_to_mean_anything_are_told(capsys, monkeypatch):
    monkeypatch.setattr(timing, "STARTING", 60.0)
    assert main(["bench", "layer", "--runs", "1"]) == 0
    assert main(["bench", "kernels", "--runs", "1", "--op", "gather_rows"]) == 0
    note = "Times below 60000.00 ms are those of starting a program; more --images take longer."
    assert capsys.readouterr().out.splitlines().count(note) == 2


def test_kernels_as_json_are_what_was_measured(capsys):
    command = (
        "bench kernels --runs 2 --json --op gather_rows --case tiny --implementation xla --implementation reference"
    )
    assert main(command.split()) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["op"], result["bound"], result["default"], result["runs"]) == ("gather_rows", "copy", "xla", 2)
    for part in ("forward", "both"):
        assert result["seconds"][part].keys() == {"copy", "xla", "reference"}
        assert result["ratios"][part].keys() == {"xla", "reference"}


def test_what_was_left_out_is_told_below_the_table(capsys, monkeypatch):
    here = dict.fromkeys(kernels_pallas.OPS, ("pallas", "xla", "reference"))
    monkeypatch.setattr(kernels_pallas, "implementations", lambda: here)
    assert main(["bench", "kernels", "--runs", "1", "--op", "gather_rows"]) == 0
    _, columns, line, note = capsys.readouterr().out.splitlines()
    assert columns.split()[7:] == ["ms", "pallas", "xla", "ms+", "pallas+", "xla+", "default"]
    assert (line.split()[8], line.split()[11], line.split()[13]) == ("-", "-", "xla")
    assert note.startswith("without pallas: ")
    assert "Pallas kernels are for TPU and CUDA devices." in note


def test_numbers_that_are_wider_than_their_column_stay_apart():
    assert bench._line({"case": "tiny", "ms": "123456.78", "xla": "1234.56"}).split() == [
        "tiny",
        "123456.78",
        "1234.56",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("layer --case S/16", "There is no case 'S/16' to time; use one of tiny."),
        (
            "layer --method gathr",
            "There is no method 'gathr' to time; use one of auto, einsum, gather, ragged, published.",
        ),
        ("layer --implementation cuda", "There is no implementation 'cuda' to time; use one of pallas, xla."),
        (
            "layer --implementation xla --method einsum",
            "--implementation is for gather and ragged; einsum has no other than xla.",
        ),
        ("layer --dtype f32", "There is no dtype 'f32' to time; use one of float32, bfloat16."),
        ("layer --runs 0", "--runs must be at least 1; it is 0."),
        ("layer --memory --runs 3", "--memory runs nothing, so that it takes no --runs."),
        ("layer --k 3", "A token cannot choose k=3 of num_experts=2 experts."),
        (
            "kernels --op gather",
            "There is no op 'gather' to time; use one of gather_rows, combine_rows, grouped_matmul, expert_mlp.",
        ),
        (
            "kernels --implementation interpret-tpu",
            "There is no implementation 'interpret-tpu' to time; use one of pallas, xla, reference.",
        ),
        (
            "kernels --implementation pallas --op combine_rows",
            "combine_rows cannot run as 'pallas' here: Pallas kernels are for TPU and CUDA devices. "
            "Here it has xla and reference.",
        ),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    assert main(["bench", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"jmoe: {sentence}\n"


def test_a_layer_that_cannot_run_says_why(capsys):
    assert main(["bench", "layer", "--implementation", "pallas"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("jmoe: ")
    assert "cannot run as 'pallas' here: Pallas kernels are for TPU and CUDA devices." in error


@pytest.mark.parametrize("arguments", [[], ["layers"]])
def test_what_can_be_timed_is_told_by_the_parser(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert "layer|kernels" in capsys.readouterr().err
