"""The commands of run.py: what pytest is given, which browser, what the demo shows."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from run_module import ROOT, load_runner, run

browser, common, demo, environment, host, parts = map(
    load_runner, ("browser", "common", "demo", "environment", "host", "parts"))

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


@pytest.mark.parametrize(("given", "extra"), [
    ([], []), (["tests"], []), (["tests/", "-q"], ["-q"]), (["-k", "weights"], ["-k", "weights"]),
    (["-k", "weights or x", "-vv"], ["-k", "weights or x", "-vv"]), (["--lf"], ["--lf"]),
    (["-k", "tests", "--durations=5"], ["-k", "tests", "--durations=5"])])
def test_all_tests_are_shared_by_two_parts(given, extra):
    """A folder is a path only where it is not the value of -k."""
    one, two = parts.parts_of(given)
    assert one.arguments == two.arguments == ["tests", *extra]
    assert one.share["never"] == two.share["first"] == list(parts.LIVE)
    assert (one.share["backwards"], two.share["backwards"]) == (False, True)


@pytest.mark.parametrize(("given", "passed"), [
    (["tests/unit", "-q"], ["tests/unit", "-q"]),
    (["tests/unit/test_run.py::test_titles", "tests/server"], ["tests/unit/test_run.py::test_titles", "tests/server"]),
    (["-x"], ["tests", "-x"]), (["tests", "--pdb"], ["tests", "--pdb"]),
    (["--junitxml=a.xml"], ["tests", "--junitxml=a.xml"])])
def test_named_paths_and_what_cannot_be_divided_run_in_one(given, passed):
    (part,) = parts.parts_of(given)
    assert part.arguments == passed and part.share is None


def test_the_live_folders_are_there():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(parts.LIVE) < folders and {"tests/unit", "tests/host"} <= folders - set(parts.LIVE)


@pytest.mark.parametrize("no_browser", [True, False])
def test_what_the_tests_are_told(monkeypatch, no_browser):
    started = []
    monkeypatch.setenv("STYLELOOM_ACCELERATOR", "0")
    monkeypatch.delenv(common.YES, raising=False)
    monkeypatch.setattr(run, "prepare", lambda tests: (host.Host(Path("/comfy"), own=False), ANY))
    monkeypatch.setattr(run.browser, "obtain", lambda _: "/usr/bin/chromium")
    monkeypatch.setattr(run.parts, "run", lambda *given: started.append(given) or 7)
    environment.has_accelerator.cache_clear()
    assert run.test(["-q", "--yes"] + ["--no-browser"] * no_browser) == 7
    environment.has_accelerator.cache_clear()
    ((found, env, divided),) = started
    assert found == ANY and [part.arguments[-1] for part in divided] == ["-q", "-q"]
    assert env["STYLELOOM_HOST"] == str(Path("/comfy"))
    assert env["STYLELOOM_BROWSER"] == ("none" if no_browser else "/usr/bin/chromium")


@pytest.mark.parametrize(("ends", "status", "said"), [
    ([("a", 0, {"passed": 3, "skipped": 1}), ("b", 0, {"passed": 2})], 0, "5 passed, 0 failed"),
    ([("a", 0, {"passed": 3}), ("b", 1, {"passed": 2, "failed": 1, "error": 2})], 1, "5 passed, 3 failed"),
    ([("a", 1, {"failed": 1}), ("b", 0, {"passed": 2})], 1, "2 passed, 1 failed"),
    ([("a", 5, {}), ("b", 0, {"passed": 2})], 0, "2 passed, 0 failed"),  # -k found something in one part only
    ([("a", 5, {}), ("b", 5, {})], 5, "0 passed, 2 failed"),
    ([("a", 2, {"passed": 9}), ("b", 0, {"passed": 2})], 2, "11 passed, 1 failed"),  # stopped by ctrl-C
    ([("a", -9, {}), ("b", 0, {"passed": 2})], 9, "2 passed, 1 failed")])  # killed
def test_the_last_line_is_the_sum(capsys, ends, status, said):
    assert parts.sum_up(ends) == status
    assert capsys.readouterr().out.splitlines()[-1] == said


WAITS = """
import os, sys, time
try:
    os.write(1, b"ready\\n"); time.sleep(600)
except KeyboardInterrupt:
    os.write(1, b"taken down\\n"); sys.exit(2)
"""


@links
def test_told_to_end_it_takes_both_down():
    """SIGTERM to run.py alone, as from a CI's time limit: each process gets the interrupt that lets it clean up."""
    code = ("import subprocess, sys\nsys.path.insert(0, sys.argv[1])\nfrom runner import common\n"
            "two = [subprocess.Popen([sys.executable, '-c', sys.argv[2]], start_new_session=True) for _ in range(2)]\n"
            "sys.exit(common.as_command(lambda: common.await_all(two) or 0))")
    command = [sys.executable, "-c", code, str(ROOT / "tests"), WAITS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(2):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].split("\n")[:2] == ["taken down"] * 2
    assert process.returncode == 128 + signal.SIGTERM


@pytest.fixture
def nobody_said_yes(monkeypatch):
    for name in (common.YES, "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def test_without_a_terminal_nothing_is_installed_on_the_system(nobody_said_yes, monkeypatch):
    monkeypatch.setattr(common.subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    monkeypatch.setattr(browser, "can_apt", lambda: True)
    for way in (lambda: common.apt_install("x", "By hand."), browser._from_debian, lambda: browser._download(ANY)):
        with pytest.raises(StepFailed, match="--yes"):
            way()
    monkeypatch.setattr(sys, "stdin", None)  # as under Windows' pythonw
    with pytest.raises(StepFailed, match="the Debian package x.*--yes.*By hand"):
        common.apt_install("x", "By hand.")


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("CI", "1"), (common.YES, "1")])
def test_a_ci_and_yes_are_a_yes(nobody_said_yes, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    ran = []
    monkeypatch.setattr(common.subprocess, "run", lambda command, **_: ran.append(command)
                        or subprocess.CompletedProcess(command, 0))
    assert common.apt_install("chromium", "")
    assert [command[:2] for command in ran] == [["apt-get", "update"], ["apt-get", "install"]]
    assert ran[1][-1] == "chromium"


@pytest.mark.parametrize("answer", ["y", " Yes ", "", "n", "no"])
def test_at_a_terminal_it_asks_once(nobody_said_yes, monkeypatch, answer):
    asked = []
    monkeypatch.setattr(sys, "stdin", Screen(True))
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    if answer.strip().lower().startswith("y"):
        monkeypatch.setenv(common.YES, "")
        common.ask_to_install("a", "b")
        common.ask_to_install("a", "b")
        assert len(asked) == 1 and "as root" in asked[0]
    else:
        with pytest.raises(StepFailed, match="a was not installed, as you said. By hand."):
            common.ask_to_install("a", "By hand.")


def test_yes_on_the_command_line(nobody_said_yes, monkeypatch):
    monkeypatch.setenv(common.YES, "")
    monkeypatch.setattr(run, "test", lambda arguments: 0)
    assert run._command(["test", "-q"]) == 0 and os.environ[common.YES] == ""
    assert run._command(["test", "--yes"]) == 0 and os.environ[common.YES] == "1"


def test_run_itself_needs_the_standard_library_only():
    """It may run in a bare Python: -S leaves out site-packages."""
    done = subprocess.run([sys.executable, "-S", str(ROOT / "run.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("options", "passed"), [([], []), (["--serve", "--port", "7"], ["--serve", "--port", "7"])])
def test_the_demo_runs_in_the_prepared_python(monkeypatch, options, passed):
    """The second program gets the host and the workflow, finds its package without the pack's root, and its status is
    ours."""
    monkeypatch.setattr(run, "prepare", lambda tests: (host.Host(Path("/comfy"), own=False),
                                                       environment.Environment(sys.executable)))
    real, started = subprocess.Popen, []

    def popen(command, **rest):
        started.append(command)
        code = command[2].replace("sys.exit(demo.main(sys.argv[1:]))",
                                  f"assert {str(ROOT)!r} not in sys.path and demo.main; sys.exit(3)")
        return real([*command[:2], code, *command[3:]], **rest)

    monkeypatch.setattr(run.subprocess, "Popen", popen)
    assert run._command(["demo", *options]) == 3
    assert started[0][3:] == [str(Path("/comfy")), str(common.DEMO), *passed]


def test_failures_are_one_message_and_a_status(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
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
