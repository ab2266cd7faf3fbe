import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vaura.errors import InputError
from vaura.weights import cache_folder, fetch

CONTENT = bytes(range(256)) * 9000  # 2.3 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT on the loopback; `break_after` bytes it hangs up, once."""

    daemon_threads = True
    ranges = True
    break_after: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v0/model-1.th"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if not self.path.endswith("model-1.th"):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        stop, self.server.break_after = self.server.break_after, None
        self.wfile.write(CONTENT[start:] if stop is None else CONTENT[start : start + stop])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("digits", [8, 64])
def test_a_file_is_fetched_once(server, tmp_path, digits):
    path = fetch(server.url, SHA256[:digits], tmp_path / "new")
    assert path == tmp_path / "new" / "model-1.th"
    assert path.read_bytes() == CONTENT
    assert fetch(server.url, SHA256[:digits], tmp_path / "new") == path
    assert server.asked == [None]
    assert list(path.parent.iterdir()) == [path]


def test_the_cache_follows_the_environment(monkeypatch, server, tmp_path):
    monkeypatch.setenv("VAURA_CACHE", str(tmp_path / "cache"))
    assert fetch(server.url, SHA256).parent == tmp_path / "cache" / "weights"
    monkeypatch.delenv("VAURA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "vaura" / "weights"


def test_an_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.break_after = 1_000_003
    with pytest.raises(InputError, match=f"1000003 of {len(CONTENT)} bytes; run again"):
        fetch(server.url, SHA256, tmp_path)
    assert not (tmp_path / "model-1.th").exists()
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000003-"]


def test_a_server_that_cannot_go_on_starts_over(server, tmp_path):
    server.break_after = 500_000
    server.ranges = False
    with pytest.raises(InputError, match="broke after"):
        fetch(server.url, SHA256, tmp_path)
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long_starts_over(server, tmp_path):
    (tmp_path / ".model-1.th.part").write_bytes(CONTENT + b"more")
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_is_told_and_the_download_thrown_away(server, tmp_path):
    (tmp_path / ".model-1.th.part").write_bytes(b"of another file")
    with pytest.raises(InputError, match=f"not {SHA256}; run again"):
        fetch(server.url, SHA256, tmp_path)
    assert not (tmp_path / "model-1.th").exists()
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_told_and_kept(server, tmp_path):
    (tmp_path / "model-1.th").write_bytes(CONTENT[:-1])
    with pytest.raises(InputError, match="delete it and run again"):
        fetch(server.url, SHA256, tmp_path)
    assert (tmp_path / "model-1.th").exists()
    assert server.asked == []


def test_offline_says_what_to_put_where(server, tmp_path):
    url = server.url
    server.server_close()
    with pytest.raises(InputError) as told:
        fetch(url, SHA256, tmp_path)
    assert url in str(told.value)
    assert str(tmp_path / "model-1.th") in str(told.value)


def test_an_unknown_address_says_so(server, tmp_path):
    with pytest.raises(InputError, match="the server answered 404"):
        fetch(server.url.replace("model-1", "model-2"), SHA256, tmp_path)


def test_many_at_once_share_one_download(server, tmp_path):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(server.url, SHA256, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "model-1.th"] * 6
    assert server.asked == [None]
    assert list(tmp_path.iterdir()) == found[:1]
