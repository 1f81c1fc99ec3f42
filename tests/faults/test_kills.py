"""Saves, conversions, caches and downloads that are killed at a random moment.

    pytest tests/faults/test_kills.py --kills 250

A kill comes before a random touch of a file, or after a random time. Then a reader finds the old or
the new checkpoint, as a whole; foreign files are as they were; and the next save works and leaves
nothing that a save without a kill would not leave.
"""

import contextlib
import hashlib
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import writing
from children import Child, ChildDiedError, call, kill_while
from mutate import make_generator
from targets import FORMATS, check_foreign, count_kills, list_files, prepare


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Returns a function: what two saves without a kill leave, and their touches and time."""
    known = {}

    def find(format):
        if format not in known:
            folder = tmp_path_factory.mktemp(f"clean-{format}") / "in"
            target = prepare(format, folder)
            old = call(writing.identify, str(target))
            start = time.monotonic()
            touches = call(writing.save, format, str(target), 1)
            seconds = time.monotonic() - start
            new = call(writing.identify, str(target))
            assert old != new
            names = {name for name in list_files(folder) if not name.startswith("source")}
            known[format] = old, new, names, touches, seconds
        return known[format]

    return find


@pytest.mark.parametrize("format", FORMATS)
def test_a_killed_save(format, clean, tmp_path, request):
    old, new, names, touches, seconds = clean(format)
    target = prepare(format, tmp_path / "in")
    states = Counter()
    for number in range(count_kills(request, 0.15)):
        rng = make_generator(f"kill {format}", number)
        what = kill_while(writing.save, (format, str(target), 1), rng, touches, seconds)
        where = f"{format} {number}: {what}"
        files = list_files(tmp_path / "in")
        check_foreign(files)
        state = call(writing.identify, str(target))
        assert state in (old, new), f"{where}: a mixture"
        assert list_files(tmp_path / "in") == files, f"{where}: reading wrote something"
        call(writing.save, format, str(target), 0)
        after = list_files(tmp_path / "in")
        check_foreign(after)
        left = {name for name in after if not name.startswith("source")} ^ names
        assert not left, f"{where}: {left}"
        assert call(writing.identify, str(target)) == old, f"{where}: the next save"
        states[what if what == "finished" else "new" if state == new else "old"] += 1
    print(f"{format}: {dict(states)}")


def test_a_killed_first_save(tmp_path, request, clean):
    """Where nothing was before, there is nothing, or the whole checkpoint."""
    format = FORMATS[0]
    _, new, _, touches, seconds = clean(format)
    for number in range(count_kills(request, 0.1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        target, rng = folder / "model", make_generator("first kill", number)
        what = kill_while(writing.save, (format, str(target), 1), rng, touches, seconds)
        complete = target.is_dir() and call(writing.find_state, str(target))
        assert complete in (False, new), what
        call(writing.save, format, str(target), 1)
        assert call(writing.identify, str(target)) == new


def test_a_killed_cache(tmp_path, request):
    folder = tmp_path / "in"
    folder.mkdir()
    target = folder / "cache"
    start = time.monotonic()
    touches = call(writing.save, "cache", str(target), 0)
    seconds = time.monotonic() - start
    right, files = call(writing.check_cache, str(target)), list_files(target)
    for number in range(count_kills(request, 0.1)):
        target, rng = folder / str(number), make_generator("kill cache", number)
        what = kill_while(writing.save, ("cache", str(target), 0), rng, touches, seconds)
        call(writing.save, "cache", str(target), 0)
        assert call(writing.check_cache, str(target)) == right, what
        assert list_files(target) == files, what


# --- Downloads -----------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4000  # 1 MB
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "model.safetensors"


class SlowHub(BaseHTTPRequestHandler):
    """A repository with one file, which is sent in pieces."""

    def do_HEAD(self):
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        content, kind = CONTENT[start:], "application/octet-stream"
        if self.path.startswith("/api/"):
            content = b'{"id": "a/b", "sha": "%s", "siblings": [{"rfilename": "%s"}]}'
            content, kind = content % (COMMIT.encode(), NAME.encode()), "application/json"
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", kind)
        self.send_header("ETag", f'"{hashlib.sha1(CONTENT).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        if start:
            last = len(CONTENT) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(CONTENT)}")
        self.end_headers()
        for n in range(0, len(content) if self.command == "GET" else 0, 50_000):
            try:
                self.wfile.write(content[n : n + 50_000])
            except OSError:  # the child was killed
                return
            time.sleep(self.server.pause)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


def test_a_killed_download(tmp_path, request):
    pytest.importorskip("huggingface_hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowHub) as server:
        server.daemon_threads, server.pause = True, 0.01
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        arguments = [f"http://127.0.0.1:{server.server_port}", None, f"hf://a/b/{NAME}"]
        for number in range(count_kills(request, 0.15)):
            cache, rng = tmp_path / str(number), make_generator("kill download", number)
            arguments[1] = str(cache)
            child = Child(writing.download)
            child.send(*arguments)
            with contextlib.suppress(ChildDiedError):  # or it was faster
                child.receive(rng.uniform(0.05, 1.0))
            child.kill()
            right = hashlib.sha256(CONTENT).hexdigest()
            assert call(writing.download, *arguments) == right, number
        server.shutdown()
