"""Which Python run.py takes, and how it sees that an environment is not whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from run_module import ROOT, fake_comfyui, run
from styleloom_runner import common, environment, host

StepFailed = run.StepFailed


@pytest.fixture
def comfy(tmp_path):
    return fake_comfyui(tmp_path)


def test_stamps_are_whole_or_nothing(tmp_path):
    path = tmp_path / "deep" / "stamp.json"
    assert common.read_stamp(path) == {}
    common.write_whole(path, {"key": "ü"})
    assert common.read_stamp(path) == {"key": "ü"} and os.listdir(path.parent) == ["stamp.json"]
    for broken in ("", '{"key":', "[1]", "null"):
        path.write_text(broken)
        assert common.read_stamp(path) == {}


@pytest.fixture
def venv(tmp_path):
    """What a finished environment looks like from outside."""
    folder = tmp_path / ".venv"
    packages = folder / ("Lib/site-packages" if os.name == "nt" else "lib/python3.11/site-packages")
    (packages / "torch-2.dist-info").mkdir(parents=True)
    (packages / "numpy-2.dist-info").mkdir()
    environment.venv_python(folder).parent.mkdir()
    environment.venv_python(folder).write_text("")
    stamp = {"key": "k", "packages": ["numpy-2.dist-info", "torch-2.dist-info"]}
    common.write_whole(folder / "styleloom.json", stamp)
    return folder


def test_finished_environment_is_used(venv):
    assert environment.venv_fault(venv, "k") is None


def test_unfinished_environment_is_noticed(venv, tmp_path):
    assert environment.venv_fault(tmp_path / "no", "k") == "it is not there"
    assert environment.venv_fault(venv, "other") == "it was made for other versions"
    common.remove(next(venv.rglob("torch-2.dist-info")))
    assert "torch-2.dist-info" in environment.venv_fault(venv, "k")
    environment.venv_python(venv).unlink()
    assert environment.venv_fault(venv, "k") == "its Python is gone"
    (venv / "styleloom.json").unlink()
    assert environment.venv_fault(venv, "k") == "it was never finished"


@pytest.fixture
def places(tmp_path, monkeypatch, comfy):
    """run.py's folders moved to a temporary place, and a host that is run.py's own copy."""
    (comfy / "requirements.txt").write_text("torch\n")
    monkeypatch.setattr(environment, "VENV", tmp_path / "venv")
    monkeypatch.setattr(environment, "WORK", tmp_path / "work")
    (tmp_path / "work").mkdir()
    return host.Host(comfy, own=True)


def _probe_says(monkeypatch, **found):
    answer = {"missing": [], "unfit": [], "error": None, "accelerator": False, **found}
    monkeypatch.setattr(environment, "probe", lambda *_: answer)


def test_active_environment_is_used_if_it_works(places, monkeypatch):
    _probe_says(monkeypatch)
    assert environment.choose(places, tests=True) == environment.Environment(sys.executable)


@pytest.mark.parametrize("found", [{"missing": ["av"]}, {"error": "OSError: torchvision"}, {"unfit": ["av 15"]}])
def test_else_the_made_one(places, monkeypatch, found):
    _probe_says(monkeypatch, **found)
    monkeypatch.setattr(environment, "_make_venv", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(environment, "venv_fault", lambda *_: None)
    python = environment.choose(places, tests=False).python
    assert python == str(environment.venv_python(environment.VENV))


def test_users_own_versions_are_used_with_a_word_about_it(places, monkeypatch, capsys):
    _probe_says(monkeypatch, unfit=["comfyui-frontend-package 1.0 (asked for: ==1.47.12)"])
    users = host.Host(places.path, own=False)
    assert environment.choose(users, tests=False).python == sys.executable
    assert "comfyui-frontend-package 1.0" in capsys.readouterr().out


def test_missing_test_tools_go_into_a_folder_of_their_own(places, monkeypatch):
    _probe_says(monkeypatch)
    monkeypatch.setattr(environment, "_has_test_tools", lambda: False)
    monkeypatch.setattr(environment, "pip_python", lambda: "python")
    calls = []
    monkeypatch.setattr(environment, "_pip", lambda python, arguments, what: calls.append(arguments))
    found = environment.choose(places, tests=True)
    assert found.python == sys.executable and found.tools.parent == environment.WORK
    assert calls[0][:2] == ["--target", str(found.tools)]
    assert environment.choose(places, tests=True) == found and len(calls) == 1
    assert environment.choose(places, tests=False).tools is None


def test_path_setup_takes_the_working_directory_off_the_path(tmp_path):
    def path_of(found):
        code = f"{found.path_setup}\nimport json; print(json.dumps(sys.path))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
        return json.loads(done.stdout)

    tools = tmp_path / "to'ols"
    assert not {"", str(ROOT)} & set(path_of(environment.Environment(sys.executable)))
    assert path_of(environment.Environment(sys.executable, tools))[0] == str(tools)


def test_failed_install_leaves_no_stamp_and_is_made_anew(places, monkeypatch, capsys):
    _probe_says(monkeypatch, missing=["torch"])
    monkeypatch.setattr(environment, "_bare_venv", lambda folder: folder.mkdir())
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: failed)
    for _ in range(2):
        with pytest.raises(StepFailed, match="Run the same command again"):
            environment.choose(places, tests=False)
        assert environment.VENV.exists() and not (environment.VENV / "styleloom.json").exists()
    assert "it was never finished" in capsys.readouterr().out


def test_filled_but_broken_environment_gets_no_stamp(places, monkeypatch):
    monkeypatch.setattr(environment, "_bare_venv", lambda folder: folder.mkdir())
    monkeypatch.setattr(environment, "_pip", lambda *_: None)
    _probe_says(monkeypatch, error="OSError: libcudart.so")
    with pytest.raises(StepFailed, match="libcudart.so"):
        environment.choose(places, tests=False)
    assert not (environment.VENV / "styleloom.json").exists()


def test_key_follows_requirements_and_torch(places, monkeypatch):
    keys = {environment._key(places)}
    (places.path / "requirements.txt").write_text("torch\nav\n")
    keys.add(environment._key(places))
    monkeypatch.setattr(environment, "TORCH", ("torch==2.12.0",))
    keys.add(environment._key(places))
    assert len(keys) == 3


def test_probe_names_what_is_missing_and_unfit(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "WORK", tmp_path)
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("packaging>=1\n# words\nno-such-thing>=2 # x\npytest<0.1\nno-such ; python_version < '3'\n")
    found = environment.probe(sys.executable, (wanted,), "look")
    assert found["missing"] == ["no-such-thing"] and found["error"] is None
    assert len(found["unfit"]) == 1 and found["unfit"][0].startswith("pytest ")


def test_lock_keeps_others_out(tmp_path):
    path = tmp_path / "a.lock"
    with common.lock(path, "busy", wait=False):
        with pytest.raises(StepFailed, match="busy"), common.lock(path, "busy", wait=False):
            pass
    with common.lock(path, "busy", wait=False):
        pass
