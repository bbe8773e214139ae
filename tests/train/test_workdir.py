import errno
import json
import os
import pathlib
import socket

import pytest

from jmoe.errors import UserError
from jmoe.train import workdir as folders
from jmoe.train.evaluation import evaluate_checkpoint
from jmoe.train.imported import for_folder, save_model
from jmoe.train.initialize import read_folder
from jmoe.train.loop import train
from jmoe.train.overrides import apply_overrides
from tests.train.tiny import tiny_config


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was saved by a jmoe without the options "initialize" and "renormalize"."""
    folders.prepare(tmp_path, tiny_config())
    (tmp_path / "summary.json").write_text("{}")
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["initialize"]
    del saved["model"]["moe"]["router"]["renormalize"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    return tmp_path


def test_options_that_are_newer_than_a_run_are_no_difference_at_their_defaults(begun):
    assert folders.differences_from_run(begun, tiny_config(), []) == []
    folders.prepare(begun, tiny_config())


def test_options_that_are_newer_than_a_run_are_one_otherwise(begun):
    changed = apply_overrides(tiny_config(), ["model.moe.router.renormalize=true", "initialize.path=elsewhere"])
    assert folders.differences_from_run(begun, changed, []) == ["model.moe.router.renormalize: False -> True"]
    with pytest.raises(UserError, match=r"another experiment: .*renormalize: False -> True; initialize: None -> Init"):
        folders.prepare(begun, changed)


def test_a_config_that_cannot_be_built_here_is_compared_as_it_is(begun):
    saved = json.loads((begun / "config.json").read_text())
    saved["model"]["moe"]["router"] = {"$type": "somewhere.else:Router"}
    (begun / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"model\.moe\.router: Router\(\) -> TopK\(k=1, "):
        folders.prepare(begun, tiny_config())


def test_the_config_of_a_folder_can_be_read(begun, tmp_path):
    assert folders.read_config(begun) == tiny_config()
    with pytest.raises(UserError, match=r"config\.json cannot be read: No such file or directory\.$"):
        folders.read_config(tmp_path / "nothing")
    (begun / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not a configuration of this jmoe: Expecting property"):
        folders.read_config(begun)


@pytest.mark.parametrize(
    "use",
    [
        lambda path: train(tiny_config(), path),
        lambda path: evaluate_checkpoint(tiny_config(), path),
        lambda path: for_folder(tiny_config(), path, []),
        lambda path: read_folder(path),
        lambda path: folders.read_config(path),
        lambda path: save_model(path, tiny_config().model, {}),
    ],
)
def test_an_address_is_not_taken_for_a_folder(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match="gs://bucket/runs/s32 is not in a file system: jmoe reads and writes folders. Mount the bucket on every "
        "host, such as by gcsfuse for gs://, and give the folder: /mnt/bucket/runs/s32.",
    ):
        use("gs://bucket/runs/s32")
    assert not list(tmp_path.iterdir())


def test_storage_that_does_not_rename_folders_is_refused_before_a_step_is_taken(tmp_path, monkeypatch):
    rename = pathlib.Path.rename

    def as_gcsfuse(path, target):
        if path.is_dir():
            raise OSError(errno.EMFILE, "Too many open files")
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", as_gcsfuse)
    with pytest.raises(
        UserError, match=r"No checkpoint could be completed in .* does not rename folders \(Too many open"
    ):
        folders.prepare(tmp_path / "run", tiny_config())
    assert not list((tmp_path / "run").iterdir())


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with folders.Claim() as first:
        folders.prepare(tmp_path, tiny_config(), first)
        before = sorted(os.listdir(tmp_path))
        with (
            pytest.raises(
                UserError,
                match=f"{tmp_path} is being written by process {os.getpid()} on {socket.gethostname()}: wait for its "
                "end, stop it, or choose another --workdir",
            ),
            folders.Claim(seconds=0.0) as second,
        ):
            folders.prepare(tmp_path, tiny_config(steps=7), second)
        assert sorted(os.listdir(tmp_path)) == before
    with folders.Claim(seconds=0.0) as third:
        folders.prepare(tmp_path, tiny_config(), third)


def test_a_folder_on_storage_without_locks_is_taken_without(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    with folders.Claim() as claim:
        folders.prepare(tmp_path, tiny_config(), claim)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("", "--workdir wants the name of a folder, and got an empty one. Write . for the current folder."),
        ("file:///data/runs", "file:///data/runs is an address; give the folder itself: /data/runs."),
    ],
)
def test_what_is_no_name_of_a_folder_is_refused(path, sentence):
    with pytest.raises(UserError, match=sentence):
        folders.local(path)


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    assert folders.local(tmp_path / "at 10:30") == tmp_path / "at 10:30"
    assert folders.local("a:b") == pathlib.Path("a:b")
