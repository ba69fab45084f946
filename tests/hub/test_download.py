"""A file arrives complete and checked, or not at all, and what has arrived is not fetched twice."""

import errno
import hashlib
import io
import multiprocessing
import os
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from brs_detr.exit_codes import ExitCode
from brs_detr.hub import download as module
from brs_detr.hub.download import DownloadError, cache_folder, download, is_reachable

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once(server, tmp_path):
    server.content = CONTENT
    target = tmp_path / "new" / "x.pth"
    assert download(server.url, target, DIGEST) == DIGEST and target.read_bytes() == CONTENT
    assert download(server.url, target, DIGEST) == "" and len(server.requests) == 1
    assert leftovers(target.parent) == ["x.pth"]


def test_a_broken_transfer_goes_on_where_it_ended(server, tmp_path):
    server.content, server.breaks = CONTENT, [100_000, 300_000]
    download(server.url, tmp_path / "x.pth", DIGEST[:8])
    assert [request.get("Range") for request in server.requests] == [None, "bytes=100000-", "bytes=400000-"]
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_what_has_arrived_stays_for_the_next_command(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    server.content, server.breaks = CONTENT, [100_000, *[0] * module.ATTEMPTS]
    with pytest.raises(
        DownloadError, match=r"stopped after 0\.1 MB .*Run the same command again: it goes on"
    ) as caught:
        download(server.url, tmp_path / "x.pth", DIGEST)
    assert "\n" not in str(caught.value) and not (tmp_path / "x.pth").exists()
    assert leftovers(tmp_path) == ["x.pth.part", "x.pth.part.etag"]
    download(server.url, tmp_path / "x.pth", DIGEST)
    assert server.requests[-1]["Range"] == "bytes=100000-" and leftovers(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("change", ["another version", "no ranges", "no version"])
def test_the_rest_of_another_file_is_not_appended(server, tmp_path, change):
    server.content = CONTENT
    (tmp_path / "x.pth.part").write_bytes(b"old" * 1000)
    (tmp_path / "x.pth.part.etag").write_text('"v0"' if change == "another version" else server.tag)
    if change == "no ranges":
        server.ranges = False
    if change == "no version":
        (tmp_path / "x.pth.part.etag").unlink()
    download(server.url, tmp_path / "x.pth", DIGEST)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_part_that_is_complete_already(server, tmp_path):
    """The process was killed between the last byte and the new name."""
    server.content = CONTENT
    (tmp_path / "x.pth.part").write_bytes(CONTENT)
    (tmp_path / "x.pth.part.etag").write_text(server.tag)
    download(server.url, tmp_path / "x.pth", DIGEST)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def a_zip(damaged=False, short=False):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("archive/data/0", bytes(10_000))
    content = bytearray(content.getvalue())
    if damaged:
        content[5000] = 1
    return bytes(content[:-100] if short else content)


@pytest.mark.parametrize(
    ("content", "digits", "said"),
    [
        (CONTENT, "0123abcd", f"its SHA-256 is {DIGEST}, not 0123abcd"),
        (b"<!DOCTYPE html><title>Quota exceeded</title>", "", "a web page or message came instead of the file"),
        (b'\n {"error": "quota"}', "", "a web page or message came instead of the file"),
        (a_zip(damaged=True), "", "its part archive/data/0 is damaged"),
        (a_zip(short=True), "", "it is cut short or damaged"),
    ],
)
def test_what_is_not_the_file_is_removed(server, tmp_path, content, digits, said):
    server.content = content
    with pytest.raises(DownloadError) as caught:
        download(server.url, tmp_path / "x.pth", digits, advice="Or take it by hand.")
    text = str(caught.value)
    assert said in text and text.endswith("It was removed. Or take it by hand.") and leftovers(tmp_path) == []


def test_a_sound_zip_without_a_published_checksum_is_taken(server, tmp_path):
    server.content = a_zip()
    assert download(server.url, tmp_path / "x.pth") == hashlib.sha256(server.content).hexdigest()


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_is_named(server, tmp_path, status):
    server.status = status
    with pytest.raises(DownloadError, match=rf"127\.0\.0\.1 refuses \({status} "):
        download(server.url, tmp_path / "x.pth")
    assert leftovers(tmp_path) == []


def test_no_network_is_said_within_five_seconds(tmp_path, monkeypatch):
    """A machine without a network can take minutes to look up a name."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30) or [])
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"nowhere\.example cannot be reached \(no answer within 4 s\)\. Connect"):
        download("https://nowhere.example/x.pth", tmp_path / "x.pth")
    assert time.monotonic() - start < 5 and leftovers(tmp_path) == []


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALL", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.pth"
        with pytest.raises(DownloadError, match=r"cannot be reached \((no answer within 0\.5 s|timed out)\)"):
            download(url, tmp_path / "x.pth")
    assert leftovers(tmp_path) == []


def test_a_closed_port_does_not_answer_and_a_refusal_does(server):
    server.status = 401
    assert is_reachable(server.url)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert not is_reachable(f"http://127.0.0.1:{unused.getsockname()[1]}/")


def test_a_cache_that_cannot_be_written_names_the_variable(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot be written to .*set BRS_DETR_CACHE to another folder") as caught:
        download(server.url, tmp_path / "file" / "weights" / "x.pth")
    assert caught.value.code == ExitCode.STORAGE and server.requests == []


def fetch(url, target, digest):
    module.download(url, target, digest)


def test_processes_that_want_the_same_file_fetch_it_once(server, tmp_path):
    server.content = CONTENT
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fetch, args=(server.url, tmp_path / "x.pth", DIGEST)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0] and len(server.requests) == 1


def test_the_lock_of_a_killed_process_is_passed_over(server, tmp_path):
    server.content = CONTENT
    lock = tmp_path / ".x.pth.lock"
    lock.touch()
    os.utime(lock, (1, 1))
    download(server.url, tmp_path / "x.pth", DIGEST)
    assert leftovers(tmp_path) == ["x.pth"]


def test_a_lock_that_may_not_be_removed_is_no_endless_wait(server, tmp_path, monkeypatch):
    """Of a killed process, in a cache of another user or on a disk that has become read-only."""
    lock = tmp_path / ".x.pth.lock"
    lock.touch()
    os.utime(lock, (1, 1))

    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def waits(_):
        raise AssertionError("it waits for a lock that nobody renews")

    monkeypatch.setattr(Path, "unlink", denied)
    monkeypatch.setattr(module.time, "sleep", waits)
    with pytest.raises(DownloadError, match=r"cannot be written to \(Permission denied\).*set BRS_DETR_CACHE") as error:
        download(server.url, tmp_path / "x.pth")
    assert error.value.code == ExitCode.STORAGE and server.requests == []


def test_a_file_that_takes_long_to_check_is_not_taken_over(server, tmp_path, monkeypatch):
    """As one of gigabytes on a slow disk: another process would ask for the rest of it, and remove what is checked."""
    server.content = CONTENT
    monkeypatch.setattr(module, "_LOCK_AGE", 0.6)
    begun = threading.Event()

    def slowly(*arguments):
        begun.set()
        time.sleep(2.0)
        return check(*arguments)

    check = module._checked
    monkeypatch.setattr(module, "_checked", slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(download(server.url, tmp_path / "x.pth"))) for _ in "ab"]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert found == [DIGEST, ""] and len(server.requests) == 1 and leftovers(tmp_path) == ["x.pth"]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"BRS_DETR_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ("darwin", {"XDG_CACHE_HOME": "/b"}, "/b/brs_detr"),
        ("linux", {}, "/home/me/.cache/brs_detr"),
        ("darwin", {}, "/home/me/Library/Caches/brs_detr"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/brs_detr/Cache"),
    ],
)
def test_where_the_cache_is(monkeypatch, platform, variables, expected):
    for name in ("BRS_DETR_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert cache_folder() == Path(expected)
