import hashlib
import io
import os
import tarfile
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vaura import weights
from vaura.errors import InputError
from vaura.files import cache_folder
from vaura.weights import fetch, fetch_archive

CONTENT = bytes(range(256)) * 9000  # 2.3 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` on the loopback; `break_after` bytes it hangs up, once."""

    daemon_threads = True
    ranges = True
    content = CONTENT
    etag: str | None = None
    break_after: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v0/model-1.th"

    @property
    def archive(self) -> str:
        return self.url.replace("model-1.th", "24-08-01.tar.gz")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        content, etag = self.server.content, self.server.etag
        if not self.path.endswith(("model-1.th", "24-08-01.tar.gz")):
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if self.headers.get("If-Range", etag) != etag:
            start = 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if etag:
            self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop, self.server.break_after = self.server.break_after, None
        self.wfile.write(content[start:] if stop is None else content[start : start + stop])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def seen(folder: Path) -> list[str]:
    """What a person sees there."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("digest", [SHA256[:8], SHA256, SHA256.upper(), f"sha256:{SHA256}", f"md5:{MD5[:7]}", f"md5:{MD5}"])
def test_a_file_is_fetched_once(server, tmp_path, digest):
    path = fetch(server.url, digest, tmp_path / "new")
    assert path == tmp_path / "new" / "model-1.th"
    assert path.read_bytes() == CONTENT
    assert fetch(server.url, digest, tmp_path / "new") == path
    assert server.asked == [None]
    assert seen(path.parent) == ["model-1.th"]
    assert [left.name for left in path.parent.glob(".*")] == [".model-1.th.checked"]


def test_a_file_is_read_again_only_when_it_changes(server, tmp_path, monkeypatch):
    """And whenever another kind of hash is asked for."""
    read = []
    real = weights._hash
    monkeypatch.setattr(weights, "_hash", lambda file, kind: read.append(kind) or real(file, kind))
    path = fetch(server.url, SHA256, tmp_path)
    fetch(server.url, SHA256[:8], tmp_path)
    assert read == ["sha256"]
    fetch(server.url, f"md5:{MD5}", tmp_path)
    assert read == ["sha256", "md5"]
    with pytest.raises(InputError, match=f"its md5 is {MD5}, not 12345678"):
        fetch(server.url, "md5:12345678", tmp_path)
    assert read == ["sha256", "md5"]
    os.utime(path, ns=(0, 0))
    fetch(server.url, f"md5:{MD5}", tmp_path)
    assert read == ["sha256", "md5", "md5"]
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(InputError, match="delete it and run again"):
        fetch(server.url, f"md5:{MD5}", tmp_path)


def test_a_cache_that_cannot_be_written_serves_what_it_has(server, tmp_path, monkeypatch):
    fetch(server.url, SHA256, tmp_path)
    (tmp_path / ".model-1.th.checked").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write into anything
    assert fetch(server.url, SHA256, tmp_path) == tmp_path / "model-1.th"
    assert list(tmp_path.iterdir()) == [tmp_path / "model-1.th"]


@pytest.mark.parametrize("digest", ["", "md5:", "md5:abc", "crc:12345678"])
def test_a_digest_that_tells_nothing_is_a_mistake_of_ours(server, tmp_path, digest):
    with pytest.raises(ValueError, match=r"few digits|hash type"):
        fetch(server.url, digest, tmp_path)


# --- a file without a published hash ---


def test_without_a_published_hash_the_first_download_is_the_measure(server, tmp_path):
    with pytest.warns(UserWarning, match=r"without a published hash; what came now is remembered in .*model-1.th.sha256"):
        path = fetch(server.url, None, tmp_path)
    assert (tmp_path / "model-1.th.sha256").read_text() == f"{SHA256}  model-1.th\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fetch(server.url, None, tmp_path) == path
        path.write_bytes(b"damaged")
        with pytest.raises(InputError, match=f"not {SHA256}; delete it and run again"):
            fetch(server.url, None, tmp_path)
        path.unlink()
        assert fetch(server.url, None, tmp_path).read_bytes() == CONTENT
        path.unlink()
        server.content = b"another file"
        with pytest.raises(InputError, match=r"or delete .*model-1.th.sha256 if there is a new one"):
            fetch(server.url, None, tmp_path)


def test_a_file_that_a_person_put_there_is_the_measure_as_well(tmp_path):
    (tmp_path / "model-1.th").write_bytes(CONTENT)
    with pytest.warns(UserWarning, match="without a published hash"):
        fetch("http://localhost:1/model-1.th", None, tmp_path)
    assert SHA256 in (tmp_path / "model-1.th.sha256").read_text()


def test_a_download_is_never_continued_with_another_file(server, tmp_path):
    server.etag, server.break_after = '"one"', 1_000_000
    with pytest.raises(InputError, match="broke after"):
        fetch(server.url, None, tmp_path)
    server.etag, server.content = '"two"', CONTENT[::-1]
    with pytest.warns(UserWarning, match="without"):
        assert fetch(server.url, None, tmp_path).read_bytes() == CONTENT[::-1]
    assert server.asked == [None, "bytes=1000000-"]


def test_a_download_is_continued_with_the_same_file(server, tmp_path):
    server.etag, server.break_after = '"one"', 1_000_000
    with pytest.raises(InputError, match="broke after"):
        fetch(server.url, SHA256, tmp_path)
    assert fetch(server.url, SHA256, tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-1.th.checked", "model-1.th"]


# --- where, and what goes wrong on the way ---


def test_the_cache_follows_the_environment(monkeypatch, server, tmp_path):
    monkeypatch.setenv("VAURA_CACHE", str(tmp_path / "cache"))
    assert fetch(server.url, SHA256).parent == tmp_path / "cache" / "weights"
    monkeypatch.delenv("VAURA_CACHE")
    assert cache_folder("weights") == Path.home() / ".cache" / "vaura" / "weights"


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
    assert seen(tmp_path) == ["model-1.th"]


# --- archives ---


def packed(*members: tuple[str, bytes | None] | tarfile.TarInfo) -> bytes:
    """A tar.gz of files (name, content), folders (name, None), and whatever else is given as it is."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.type, info.mode = (tarfile.DIRTYPE, 0o777) if content is None else (tarfile.REGTYPE, 0o4777)
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def odd(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def serve(server: Server, content: bytes) -> str:
    """The sha256 of the archive that the server now holds."""
    server.content = content
    return hashlib.sha256(content).hexdigest()


GOOD = packed(("24-08-01", None), ("24-08-01/checkpoints/last.ckpt", CONTENT), ("24-08-01/hparams.yaml", b"a: 1\n"))


def test_an_archive_is_fetched_and_unpacked_once(server, tmp_path):
    digest = serve(server, GOOD)
    folder = fetch_archive(server.archive, digest, tmp_path)
    assert folder == tmp_path / "24-08-01" / "24-08-01"
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == CONTENT
    assert (folder / "hparams.yaml").read_text() == "a: 1\n"
    assert not (folder / "hparams.yaml").stat().st_mode & 0o7111  # neither run nor set-uid
    assert fetch_archive(server.archive, digest, tmp_path) == folder
    assert server.asked == [None]
    assert seen(tmp_path) == ["24-08-01"]


def test_an_archive_without_a_folder_of_its_own(server, tmp_path):
    digest = serve(server, packed(("a.txt", b"a"), ("./b/c.txt", b"c")))
    folder = fetch_archive(server.archive, digest, tmp_path)
    assert folder == tmp_path / "24-08-01"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == ["a.txt", "b", "b/c.txt"]


def test_links_to_files_of_the_archive_are_those_files(server, tmp_path):
    links = odd("x/checkpoints/last.ckpt", tarfile.SYMTYPE, "../best.ckpt"), odd("x/again", tarfile.LNKTYPE, "x/best.ckpt")
    digest = serve(server, packed(links[0], ("x/best.ckpt", CONTENT), links[1]))
    folder = fetch_archive(server.archive, digest, tmp_path)
    for name in ("checkpoints/last.ckpt", "again", "best.ckpt"):
        assert (folder / name).read_bytes() == CONTENT
        assert not (folder / name).is_symlink()


EVIL = {
    "above": [("../evil", b"x")],
    "above in the middle": [("x/../../evil", b"x")],
    "absolute": [("{outside}/evil", b"x")],
    "symlink out": [odd("x/link", tarfile.SYMTYPE, "../../secret")],
    "absolute symlink": [odd("x/link", tarfile.SYMTYPE, "{outside}/secret")],
    "hard link out": [odd("link", tarfile.LNKTYPE, "../secret")],
    "through a symlink": [odd("x", tarfile.SYMTYPE, "{outside}"), ("x/evil", b"x")],
    "through an inner symlink": [
        ("y/z/file", b"x"),
        odd("x", tarfile.SYMTYPE, "y"),
        odd("out", tarfile.SYMTYPE, "x/../../secret"),
    ],
    "device": [odd("null", tarfile.CHRTYPE)],
    "pipe": [odd("pipe", tarfile.FIFOTYPE)],
    "twice": [("x", b"1"), ("x", b"2")],
    "file and folder": [("x", b"1"), ("x/y", b"2")],
    "link to a folder": [("y/file", b"1"), odd("x", tarfile.SYMTYPE, "y")],
    "link to nothing": [odd("x", tarfile.SYMTYPE, "y")],
}


@pytest.mark.parametrize("name", EVIL)
def test_an_archive_that_reaches_out_leaves_nothing(server, tmp_path, name):
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    outside.mkdir()
    for folder in (tmp_path, outside):
        (folder / "secret").write_text("mine")
    members = []
    for member in [("fine.txt", b"fine"), *EVIL[name]]:
        if isinstance(member, tarfile.TarInfo):
            member = odd(member.name, member.type, member.linkname.format(outside=outside))
        else:
            member = (member[0].format(outside=outside), member[1])
        members.append(member)
    with pytest.raises(InputError, match=r"do not trust it|cannot be unpacked"):
        fetch_archive(server.archive, serve(server, packed(*members)), cache)
    assert seen(cache) == ["24-08-01.tar.gz"]
    assert not list(cache.glob(".*.part"))
    assert seen(outside) == ["secret"]
    assert seen(tmp_path) == ["cache", "outside", "secret"]
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_an_archive_that_is_cut_off_can_be_had_again(server, tmp_path):
    """Without a published hash the cut one is no measure for the whole one."""
    serve(server, GOOD[: len(GOOD) // 2])
    with pytest.warns(UserWarning, match="without"), pytest.raises(InputError, match="cannot be unpacked"):
        fetch_archive(server.archive, None, tmp_path)
    assert seen(tmp_path) == ["24-08-01.tar.gz"]
    (tmp_path / "24-08-01.tar.gz").unlink()
    serve(server, GOOD)
    with pytest.warns(UserWarning, match="without"):
        assert (fetch_archive(server.archive, None, tmp_path) / "hparams.yaml").is_file()


def test_unpacking_that_is_killed_begins_anew(server, tmp_path, monkeypatch):
    digest = serve(server, GOOD)
    (tmp_path / ".24-08-01.part").mkdir()
    (tmp_path / ".24-08-01.part" / "half.ckpt").write_text("half")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights.shutil, "copyfileobj", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch_archive(server.archive, digest, tmp_path)
    assert seen(tmp_path) == ["24-08-01.tar.gz"]
    folder = fetch_archive(server.archive, digest, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "hparams.yaml"]
    assert server.asked == [None]
    assert not (tmp_path / "24-08-01" / "half.ckpt").exists()


def test_offline_an_archive_can_be_put_there(server, tmp_path):
    digest, url = serve(server, GOOD), server.archive
    server.server_close()
    with pytest.raises(InputError, match="download it elsewhere and put it at") as told:
        fetch_archive(url, digest, tmp_path)
    assert str(tmp_path / "24-08-01.tar.gz") in str(told.value)
    (tmp_path / "24-08-01.tar.gz").write_bytes(GOOD)
    assert (fetch_archive(url, digest, tmp_path) / "hparams.yaml").is_file()


def test_many_that_want_an_archive_share_one(server, tmp_path):
    digest, found = serve(server, GOOD), []
    threads = [threading.Thread(target=lambda: found.append(fetch_archive(server.archive, digest, tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [tmp_path / "24-08-01" / "24-08-01"] * 6
    assert server.asked == [None]
