"""The commands of run.py: what pytest is given, which browser, what the demo shows."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from run_module import ROOT, run
from styleloom_runner import browser, demo, environment, host

StepFailed = run.StepFailed
links = pytest.mark.skipif(os.name == "nt", reason="symlinks need a special right on Windows")


def test_chromium_comes_before_the_others():
    there = {"google-chrome": "/usr/bin/google-chrome", "chromium-browser": "/usr/bin/chromium-browser",
             "chromium": "/usr/bin/chromium", "msedge": "/usr/bin/msedge"}
    found = browser.on_system({}, "linux", there.get)
    assert found == ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome", "/usr/bin/msedge"]


@pytest.mark.parametrize("platform, variable, tail", [
    ("darwin", "HOME", "Applications/Google Chrome.app/Contents/MacOS/Google Chrome"),
    ("win32", "LOCALAPPDATA", "Google/Chrome/Application/chrome.exe"),
    ("win32", "PROGRAMFILES(X86)", "Microsoft/Edge/Application/msedge.exe"),
])
def test_where_installers_put_browsers(tmp_path, platform, variable, tail):
    (tmp_path / tail).parent.mkdir(parents=True)
    (tmp_path / tail).write_text("")
    assert str(tmp_path / tail) in browser.on_system({variable: str(tmp_path)}, platform, lambda name: None)


ANY = environment.Environment("python")


def test_order_of_ways_to_a_browser(monkeypatch):
    monkeypatch.delenv("STYLELOOM_BROWSER", raising=False)
    tried = []

    def way(name):
        def ask(*_):
            tried.append(name)
            return [f"/{name}"]
        return ask

    for function, name in (("on_system", "system"), ("_playwrights", "playwright"), ("_from_debian", "debian"),
                           ("_download", "download")):
        monkeypatch.setattr(browser, function, way(name))
    for works, expected in (({"/system"}, 1), ({"/playwright"}, 2), ({"/debian"}, 3), ({"/download"}, 4)):
        tried.clear()
        monkeypatch.setattr(browser, "works", works.__contains__)
        assert browser.obtain(ANY) in works and len(tried) == expected
    monkeypatch.setattr(browser, "works", lambda path: False)
    with pytest.raises(StepFailed, match="--no-browser"):
        browser.obtain(ANY)
    assert tried[-4:] == ["system", "playwright", "debian", "download"]


def test_named_browser_must_start(monkeypatch):
    monkeypatch.setenv("STYLELOOM_BROWSER", "/no/such/browser")
    with pytest.raises(StepFailed, match="--no-browser"):
        browser.obtain(ANY)


@links
def test_a_browser_that_does_not_start_does_not_count(tmp_path):
    stub = tmp_path / "chromium-browser"
    stub.write_text("#!/bin/sh\necho 'requires the chromium snap' >&2\nexit 1\n")
    stub.chmod(0o755)
    assert not browser.works(str(stub)) and not browser.works(str(tmp_path / "none"))


@pytest.mark.parametrize("given_, passed", [
    ([], ["tests"]),
    (["-k", "tests_of_this", "-x"], ["tests", "-k", "tests_of_this", "-x"]),
    (["tests/unit", "-q"], ["tests/unit", "-q"]),
    (["tests/unit/test_run.py::test_command_line"], ["tests/unit/test_run.py::test_command_line"]),
])
@pytest.mark.parametrize("no_browser", [True, False])
def test_what_pytest_is_given(monkeypatch, given_, passed, no_browser):
    started = {}

    class Process:
        def __init__(self, command, **options):
            started.update(command=command, **options)

        def wait(self):
            return 7

    monkeypatch.setenv("STYLELOOM_ACCELERATOR", "0")
    monkeypatch.setattr(run, "prepare", lambda tests: (host.Host(Path("/comfy"), own=False), ANY))
    monkeypatch.setattr(run.browser, "obtain", lambda _: "/usr/bin/chromium")
    monkeypatch.setattr(run.subprocess, "Popen", Process)
    environment.has_accelerator.cache_clear()
    assert run.test(given_ + ["--no-browser"] * no_browser) == 7
    environment.has_accelerator.cache_clear()
    assert started["command"][3:] == passed and started["cwd"] == ROOT
    assert started["env"]["STYLELOOM_HOST"] == str(Path("/comfy"))
    assert started["env"]["STYLELOOM_BROWSER"] == ("none" if no_browser else "/usr/bin/chromium")


def test_failures_are_one_message_and_a_status(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main(["demo", "--workflow", str(tmp_path / "none.json")]) == 1
    assert "expected a workflow in API format" in capsys.readouterr().err
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert run.main(["test", "tests/unit"]) == 1
    assert "COMFYUI_PATH is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["no-such-command"])


PROMPT = {"1": {"class_type": "LoadImage", "_meta": {"title": "A reference"}}, "2": {"class_type": "SaveImage"}}


class Screen(io.StringIO):
    def __init__(self, tty: bool):
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.mark.parametrize("tty", [True, False])
def test_progress(tty):
    screen = Screen(tty)
    progress = demo.Progress(PROMPT, screen)
    progress.event({"type": "progress", "data": {"value": 1, "max": 2}})  # before any node: nothing to say
    progress.event({"type": "execution_cached", "data": {"nodes": ["1"]}})
    progress.event({"type": "executing", "data": {"node": "2"}})
    progress.event({"type": "progress", "data": {"value": 4, "max": 4}})
    progress.event({"type": "executing", "data": {"node": None}})
    progress.close()
    text = screen.getvalue()
    if tty:
        assert text == "\r  [2/2] SaveImage\r  [2/2] SaveImage 100 %\n"
    else:
        assert text == "  [2/2] SaveImage\n"


def test_titles():
    assert demo.title(PROMPT, "1") == "A reference" and demo.title(PROMPT, "2") == "SaveImage"
    assert demo.title(PROMPT, "2.0.1") == "SaveImage" and demo.title(PROMPT, "9") == "node 9"


def test_summary_says_everything(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"0" * 2_500_000)
    record = {"outputs": {"1": {"text": ["rank 4\n720 targets"]}, "3": {"text": ["rank 4\n720 targets"]},
                          "2": {"images": [{"filename": "a.safetensors", "subfolder": "", "type": "output"},
                                           {"filename": "b.png", "subfolder": "", "type": "temp"}]}}}
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    text = demo.summary(PROMPT, record, [tmp_path / "a.safetensors"], 3.21, is_demo=True)
    assert "Done in 3.2 s" in text and "A reference:\n    rank 4\n    720 targets" in text
    assert "a.safetensors  (2.5 MB)  SaveImage" in text and "untrained" in text and text.count("rank 4") == 1
    assert "No file was written" in demo.summary(PROMPT, {}, [], 1, is_demo=False)


def test_failed_node_is_named_with_its_error():
    data = {"node_id": "1", "exception_type": "ValueError", "exception_message": "no style", "traceback": ["line\n"]}
    event = {"type": "execution_error", "data": data}
    assert demo.describe(event, PROMPT) == "A reference failed: ValueError: no style\nline\n"


def test_only_new_and_changed_files_are_listed(tmp_path):
    (tmp_path / "old").write_text("1")
    before = demo.files_below(tmp_path)
    (tmp_path / "new").write_text("1")
    assert [path.name for path, state in demo.files_below(tmp_path).items() if before.get(path) != state] == ["new"]
