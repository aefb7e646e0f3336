"""The base directory, and the host as a process: its command line, its death, and the certain end of it."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest
from run_module import fake_comfyui, load_runner, run

client, environment, server = map(load_runner, ("client", "environment", "server"))

StepFailed = run.StepFailed


@pytest.fixture
def comfy(tmp_path):
    return fake_comfyui(tmp_path)


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "repo"
    (folder / "tests" / "kit").mkdir(parents=True)
    (folder / "__init__.py").write_text("pack = 1")
    (folder / "tests" / "kit" / "__init__.py").write_text("kit = 1")
    return folder


def test_make_base_links_both_packs(tmp_path, repo):
    base = server.make_base(tmp_path / "base", repo)
    assert sorted(os.listdir(base)) == ["custom_nodes", "input", "models", "output", "temp", "user"]
    packs = base / "custom_nodes"
    assert (packs / "StyleLoom" / "__init__.py").read_text() == "pack = 1"
    assert (packs / "styleloom_kit" / "__init__.py").read_text() == "kit = 1"
    (base / "models" / "a").write_text("kept")
    other = tmp_path / "moved"
    other.mkdir()
    server.make_base(base, other)  # the pack has moved, and this archive of it has no tests
    assert os.path.samefile(packs / "StyleLoom", other) and not (packs / "styleloom_kit").exists()
    assert (base / "models" / "a").read_text() == "kept"
    assert (repo / "__init__.py").exists() and (repo / "tests" / "kit" / "__init__.py").exists()


def test_where_links_cannot_be_made_a_copy_is(tmp_path, repo, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    if os.name == "nt":
        import _winapi

        monkeypatch.setattr(_winapi, "CreateJunction", refuse)
    (repo / ".venv").mkdir()
    for _ in range(2):  # the copy of before is replaced
        base = server.make_base(tmp_path / "base", repo)
        copy = base / "custom_nodes" / "StyleLoom"
        assert (copy / "__init__.py").exists() and not server.is_link(copy) and not (copy / ".venv").exists()


FLAGS = ("--base-directory", "--listen", "--port", "--disable-auto-launch", "--disable-api-nodes", "--cpu",
         "--database-url", "--disable-all-custom-nodes", "--whitelist-custom-nodes")


@pytest.fixture
def fake_host(comfy, tmp_path, repo, monkeypatch):
    """A host folder whose main.py the tests write, and a base directory for it."""
    monkeypatch.setenv("STYLELOOM_ACCELERATOR", "0")
    environment.has_accelerator.cache_clear()

    def make(main: str = "", flags=FLAGS):
        (comfy / "comfy").mkdir(exist_ok=True)
        (comfy / "comfy" / "cli_args.py").write_text("\n".join(f'parser.add_argument("{flag}")' for flag in flags))
        (comfy / "main.py").write_text(main)
        return server.Server(comfy, server.make_base(tmp_path / "base", repo), sys.executable)

    yield make
    environment.has_accelerator.cache_clear()


def test_command_line(fake_host):
    command = fake_host().command()
    assert command[command.index("--listen") + 1] == "127.0.0.1" and "--cpu" in command
    at = command.index("--whitelist-custom-nodes")
    assert command[at + 1 : at + 3] == ["StyleLoom", "styleloom_kit"]
    assert command[command.index("--database-url") + 1] == "sqlite:///:memory:"


def test_accelerator_is_used(fake_host, monkeypatch):
    monkeypatch.setenv("STYLELOOM_ACCELERATOR", "1")
    assert "--cpu" not in fake_host().command()


def test_flags_that_an_older_host_does_not_know_are_left_out(fake_host):
    command = fake_host(flags=("--base-directory", "--listen", "--port", "--disable-all-custom-nodes")).command()
    assert [word for word in command if word.startswith("--")] == ["--base-directory", "--listen", "--port"]
    with pytest.raises(StepFailed, match="too old"):
        fake_host(flags=("--port",)).command()


def test_host_that_dies_is_reported_with_its_log(fake_host):
    dead = fake_host("import sys; print('\\x1b[31mno module named comfy\\x1b[0m'); sys.exit(3)")
    with pytest.raises(StepFailed, match=r"code 3(.|\n)*no module named comfy"):
        with dead:
            pass
    assert "\x1b" not in dead.log_text()


SERVES = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, "in", __import__("os").getcwd(), flush=True)
print("   0.1 seconds (IMPORT FAILED): /somewhere/StyleLoom", flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.end_headers()
        self.wfile.write(b"{}")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def test_server_and_its_children_are_gone_at_the_end(fake_host):
    with fake_host(SERVES) as running:
        with client.Client(running.url) as talk:
            assert talk.get("/system_stats") == {}
        assert running.failed_imports() == ["0.1 seconds (IMPORT FAILED): /somewhere/StyleLoom"]
        line = running.log_text().split()
        child = int(line[1])
        assert Path(line[3]).resolve() == running.base.resolve()  # whatever it writes beside itself stays in there
    assert running.process.poll() is not None
    if os.name != "nt":
        end = time.monotonic() + 5
        while _lives(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not _lives(child)


def test_another_program_on_the_port_is_not_taken_for_the_host(fake_host):
    mine = fake_host(SERVES)
    with socket.create_server(("127.0.0.1", 0)) as other:
        mine.port = other.getsockname()[1]
        with pytest.raises(StepFailed, match="already listens"), mine:
            pass
    assert mine.process is None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a child that nobody waits for is dead all the same
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")
