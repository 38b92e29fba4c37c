"""The archive of CIFAR is downloaded once and whole, and failures are explained."""

import gzip
import hashlib
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import rich
from filelock import FileLock

from parity_tests.test_training_cifar import ARCHIVE, assert_holds, small_archive, visible
from parity_tests.test_training_data import message
from training import cifar
from training.cifar import CIFAR10


class Answers:
    """Some of what a server may do when it is asked for a file."""

    def __init__(self, content):
        self.content = content

    def all(self, to):
        self.begin(to)
        to.wfile.write(self.content)

    def begin(self, to):
        to.send_response(200)
        to.send_header("Content-Length", str(len(self.content)))
        to.end_headers()

    def half(self, to):
        self.begin(to)
        to.wfile.write(self.content[: len(self.content) // 2])

    def half_then_silence(self, to):
        self.half(to)
        to.wfile.flush()
        to.server.released.wait()

    def silence(self, to):
        to.server.released.wait()

    def another_file(self, to):
        to.send_response(200)
        to.end_headers()
        to.wfile.write(b"<html>Please log in</html>")

    def not_found(self, to):
        to.send_error(404)

    def broken(self, to):
        to.send_error(500)

    def nonsense(self, to):
        to.send_response(200)
        to.send_header("Content-Length", "many")
        to.end_headers()


class Server(ThreadingHTTPServer):
    block_on_close = True
    daemon_threads = False


@contextmanager
def serving(answer: Callable):
    """A server on this machine that gives one answer; its address, and the paths asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer(self)

        def log_message(self, *args):
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def remote(tmp_path):
    """A small CIFAR-10 to be downloaded: the answers of its server, the source, and the rest.

    Half of it is more than is written at a time.
    """
    source, images, labels = small_archive(CIFAR10, tmp_path / "server" / ARCHIVE, records=20)
    assert source.size // 2 > cifar._CHUNK
    answers = Answers((tmp_path / "server" / ARCHIVE).read_bytes())
    return answers, source, images, labels


def until(condition):
    """Wait for it, but not for ever."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def failed(path, source, reason):
    return (
        f"{path} does not exist, and downloading {source.url} failed: {reason}. Either\n"
        "  1. try again later\n"
        f"  2. get {ARCHIVE} ({source.size:,} bytes,\n"
        f"     sha256 {source.sha256}) in another way and put it into {path.parent}\n"
        "  3. pass the archive, or a folder that contains it or its files: --data-dir PATH\n"
        "  4. train on a data set that needs no download: --dataset digits"
    )


def test_a_missing_archive_is_downloaded_once(tmp_path, remote, capsys):
    answers, source, images, labels = remote
    path = tmp_path / "new" / "data" / ARCHIVE
    with serving(answers.all) as (address, asked):
        source = source._replace(url=f"{address}/{ARCHIVE}")
        for _ in range(2):
            assert_holds(cifar.load(source, path.parent), images, labels)
    assert asked == [f"/{ARCHIVE}"]
    assert visible(path.parent) == [ARCHIVE]
    assert path.read_bytes() == answers.content
    assert capsys.readouterr().out == (
        f"downloading {source.url} ({source.size:,} bytes) to {path}\n"
    )


@contextmanager
def terminal():
    """Let rich take what is captured for a terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        rich.reconfigure()
        yield
    rich.reconfigure()


def test_a_terminal_is_shown_a_bar(tmp_path, remote, capsys):
    answers, source, _, _ = remote
    size = f"{source.size / 1000:.1f}"
    with terminal(), serving(answers.all) as (address, _):
        cifar.load(source._replace(url=f"{address}/{ARCHIVE}"), tmp_path)
    assert f"{size}/{size} kB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("not_found", "404 Client Error: Not Found for url: {url}"),
        ("broken", "500 Server Error: Internal Server Error for url: {url}"),
        ("half", "IncompleteRead({half} bytes read, {rest} more expected)"),
        ("silence", "timed out"),
        ("half_then_silence", "timed out"),
        ("nonsense", "invalid literal for int() with base 10: 'many'"),
    ],
)
def test_a_server_that_fails(tmp_path, remote, monkeypatch, answer, reason):
    answers, source, _, _ = remote
    if "silence" in answer:
        monkeypatch.setattr(cifar, "_TIMEOUT", 0.3)
    path = tmp_path / "data" / ARCHIVE
    half = source.size // 2
    with serving(getattr(answers, answer)) as (address, _):
        source = source._replace(url=f"{address}/{ARCHIVE}")
        reason = reason.format(url=source.url, half=half, rest=source.size - half)
        assert message(cifar.load, source, path.parent) == failed(path, source, reason)
    assert visible(path.parent) == []


@pytest.mark.parametrize(
    ("host", "reason"),
    [("127.0.0.1", "Connection refused"), ("there.invalid", "Name or service not known")],
)
def test_without_a_network(tmp_path, monkeypatch, host, reason):
    def resolve(name, *args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host != "127.0.0.1":
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        source = CIFAR10._replace(url=f"http://{host}:{closed.getsockname()[1]}/{ARCHIVE}")
        text = message(cifar.load, source, tmp_path)
    assert text == failed(tmp_path / ARCHIVE, source, reason)
    assert visible(tmp_path) == []


def test_another_file_than_was_published(tmp_path, remote):
    answers, source, _, _ = remote
    path = tmp_path / "data" / ARCHIVE
    with serving(answers.another_file) as (address, _):
        source = source._replace(url=f"{address}/{ARCHIVE}")
        text = message(cifar.load, source, path.parent)
    found = hashlib.sha256(b"<html>Please log in</html>").hexdigest()
    assert f"expected sha256:{source.sha256} but got {found}. Deleted download" in text
    before, after = failed(path, source, "SEEN").split("SEEN")
    assert text.startswith(before)
    assert text.endswith(after)
    assert visible(path.parent) == []


def test_the_archive_is_not_unpacked_on_the_way(tmp_path, remote):
    """A server that packs whatever it sends is asked not to."""
    answers, source, images, labels = remote

    def answer(to):
        packs = "gzip" in to.headers.get("Accept-Encoding", "")
        content = gzip.compress(answers.content) if packs else answers.content
        to.send_response(200)
        to.send_header("Content-Length", str(len(content)))
        to.end_headers()
        to.wfile.write(content)

    with serving(answer) as (address, _):
        source = source._replace(url=f"{address}/{ARCHIVE}")
        assert_holds(cifar.load(source, tmp_path), images, labels)


def test_a_full_disk(tmp_path, remote):
    answers, source, _, _ = remote
    path = tmp_path / "data" / ARCHIVE
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(answers.all) as (address, _):
        source = source._replace(url=f"{address}/{ARCHIVE}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (source.size // 2, limits[1]))
        try:
            text = message(cifar.load, source, path.parent)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert text == (
        f"Cannot write to {path.parent}: File too large. It needs space for {ARCHIVE}, "
        f"{source.size:,} bytes. Free some, or choose another --data-dir."
    )
    assert visible(path.parent) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "data"
    assert message(cifar.load, CIFAR10, folder) == (
        f"Cannot write to {folder}: Not a directory. It needs space for {ARCHIVE}, 170,052,171 "
        "bytes. Free some, or choose another --data-dir."
    )


def test_interrupting_a_download_leaves_nothing_behind(tmp_path, remote):
    answers, source, _, _ = remote

    class Interrupted(BaseException):
        pass

    def interrupt(*args):
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, serving(answers.all) as (address, _):
        source = source._replace(url=f"{address}/{ARCHIVE}")
        patch.setattr(cifar._Bar, "update", interrupt)
        with pytest.raises(Interrupted):
            cifar.load(source, tmp_path / "data")
    assert visible(tmp_path / "data") == []


def test_two_at_once_download_once(tmp_path, remote, capsys):
    answers, source, images, labels = remote
    datasets, printed = [], []
    with serving(answers.all) as (address, asked):
        source = source._replace(url=f"{address}/{ARCHIVE}")

        def load():
            datasets.append(cifar.load(source, tmp_path))

        threads = [threading.Thread(target=load) for _ in range(2)]
        with FileLock(tmp_path / f".{ARCHIVE}.lock"):  # so that both find it locked
            for thread in threads:
                thread.start()

            def both_wait():
                printed.append(capsys.readouterr().out)
                return "".join(printed).count("\n") == 2

            until(both_wait)
        for thread in threads:
            thread.join()
    assert len(asked) == 1
    for dataset in datasets:
        assert_holds(dataset, images, labels)
    path = tmp_path / ARCHIVE
    waiting = f"waiting for another process, which is downloading {path}\n"
    assert "".join(printed) == 2 * waiting


def test_a_killed_download_is_started_again(tmp_path, remote):
    """What it leaves is neither taken for the archive, nor does its lock shut others out."""
    answers, source, images, labels = remote
    folder = tmp_path / "data"
    program = (
        "import sys; from pathlib import Path; from training import cifar; "
        "cifar.load(cifar.CIFAR10._replace(url=sys.argv[1]), Path(sys.argv[2]))"
    )
    part = folder / f".{ARCHIVE}.part"
    with serving(answers.half_then_silence) as (address, _):
        command = [sys.executable, "-c", program, f"{address}/{ARCHIVE}", str(folder)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1]
        ) as child:
            try:
                until(lambda: any(path.stat().st_size for path in part.glob("*")))
            finally:
                child.kill()
    assert visible(folder) == [part.name]
    with serving(answers.all) as (address, _):
        source = source._replace(url=f"{address}/{ARCHIVE}")
        assert_holds(cifar.load(source, folder), images, labels)
    assert visible(folder) == [ARCHIVE]
