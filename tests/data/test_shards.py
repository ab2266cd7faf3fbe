"""Codes and features kept on disk: the same as made anew, made once, by several, and mended where they break."""

import multiprocessing
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vaura.data import clips as reading
from vaura.data import module
from vaura.data import shards as stored
from vaura.data.manifest import Clip, write_manifest
from vaura.data.module import VideoData
from vaura.data.shards import Shards
from vaura.errors import InputError
from vaura.media.mux import write_video

RATE = 8000
MOVING = {"random_start": True, "random_crop": True, "flip": 0.5}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Six different videos of a second."""
    folder = tmp_path_factory.mktemp("videos")
    for n in range(6):
        draw = torch.Generator().manual_seed(n)
        frames = torch.randint(0, 255, (10, 3, 32, 48), dtype=torch.uint8, generator=draw)
        write_video(folder / f"{n}.mp4", frames, 10, 0.1 * torch.randn(1, RATE, generator=draw), RATE)
    return folder


@pytest.fixture
def manifest(videos, tmp_path) -> Path:
    """Four clips to train on and two to validate."""
    clips = [Clip(str(n), videos / f"{n}.mp4", 1.0, split="train" if n < 4 else "val") for n in range(6)]
    write_manifest(tmp_path / "clips.jsonl", clips)
    return tmp_path / "clips.jsonl"


def tokenise(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (B, 2, 5) and features (B, 5, 3) that tell every span and view apart, a clip at a time."""
    sound = batch["audio"].unflatten(2, (5, -1)).abs().mean((1, 3))
    picture = batch["video"].float().mean((3, 4))
    return torch.stack([(sound * 1e6).long() % 40000, torch.arange(5).expand(len(sound), 5)], 1), picture


class Counted:
    """`tokenise`, which counts the clips it was given and is interrupted at call number `stop`."""

    def __init__(self, stop: int = 0) -> None:
        self.clips, self.calls, self.stop = 0, 0, stop

    def __call__(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.clips += len(batch["id"])
        return tokenise(batch)


def data(manifest: Path, cache: Path | None, makers: dict | None = None, **settings) -> VideoData:
    plain = {"duration": 0.5, "batch_size": 2, "workers": 0, "random_start": False, "keep_in_memory": False, "val_share": 0.4}
    size = {"fps": 10, "size": 16, "resize": 24, "sample_rate": RATE, "channels": 1}
    made = VideoData(manifest=str(manifest), cache=cache and str(cache), seed=3, **{**plain, **size, **settings})
    if made.cache is not None:
        made.keep_tokens(made.cache, makers or {"tokenizer": "a", "encoder": "b"})
    return made


def kept(manifest: Path, cache: Path, by=tokenise, **settings) -> VideoData:
    made = data(manifest, cache, **settings)
    made.make_tokens(by, CPU)
    return made


def shards(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def test_a_kept_epoch_is_the_epoch(manifest, tmp_path):
    """Batches, their order, spans and views: epoch after epoch as read from the files, as long as there are takes."""
    plain = data(manifest, None, **MOVING)
    cached = kept(manifest, tmp_path / "cache", takes=3, **MOVING)
    starts = set()
    for split in ("train", "val"):
        ours, theirs = cached.loader(split), plain.loader(split)
        for _ in range(3):
            for mine, read in zip(ours, theirs, strict=True):
                codes, features = tokenise(read)
                assert mine["id"] == read["id"]
                assert torch.equal(mine["start"], read["start"])
                assert torch.equal(mine["codes"], codes)
                assert mine["codes"].dtype == codes.dtype
                assert torch.equal(mine["features"], features)
                assert "video" not in mine
                starts |= set(mine["start"].tolist())
    assert len(starts) == 3 * 4 + 1


def test_takes_come_round_again(manifest, tmp_path):
    cached = kept(manifest, tmp_path, takes=3, **MOVING).tokens["train"]
    for epoch in (3, 5, 300):
        for index in range(4):
            mine, first = cached[epoch, index], cached[epoch % 3, index]
            assert mine is not None
            assert first is not None
            assert mine["start"] == first["start"]
            assert torch.equal(mine["features"], first["features"])


def test_what_never_moves_is_kept_once(manifest, tmp_path):
    made = Counted()
    cached = kept(manifest, tmp_path, made, takes=3)
    assert made.clips == 6
    assert cached.tokens["train"].takes == cached.tokens["val"].takes == 1
    made = Counted()
    kept(manifest, tmp_path / "moving", made, takes=3, **MOVING)
    assert made.clips == 3 * 4 + 2


def test_another_run_opens_no_video(manifest, tmp_path, monkeypatch):
    kept(manifest, tmp_path, takes=2, **MOVING)
    for name in ("read_video", "read_audio"):
        monkeypatch.setattr(reading, name, lambda *_, **__: pytest.fail("a file is read"))
    again = kept(manifest, tmp_path, pytest.fail, takes=2, **MOVING)
    assert len(list(again.loader("train"))) == 2
    with pytest.warns(UserWarning, match="one span"):
        fewer = kept(manifest, tmp_path, pytest.fail, takes=1, **MOVING)
    assert len(list(fewer.loader("val"))) == 1


def test_more_takes_are_added_to_those_there(manifest, tmp_path):
    kept(manifest, tmp_path, takes=2, **MOVING)
    made = Counted()
    kept(manifest, tmp_path, made, takes=3, **MOVING)
    assert made.clips == 4


def test_a_clip_is_known_by_what_its_file_holds(manifest, videos, tmp_path):
    kept(manifest, tmp_path / "cache")
    moved = [Clip(f"renamed {n}", tmp_path / f"{5 - n}.mp4", 1.0, split="train") for n in range(6)]
    for clip, n in zip(moved, range(6), strict=True):
        shutil.copy(videos / f"{n}.mp4", clip.video)
    write_manifest(tmp_path / "moved.jsonl", moved)
    cached = kept(tmp_path / "moved.jsonl", tmp_path / "cache", pytest.fail).tokens["train"]
    item = cached[0, 2]
    assert item is not None
    assert item["id"] == "renamed 2"
    shutil.copy(videos / "0.mp4", moved[2].video)
    os.utime(moved[2].video, (1, 1))
    other = kept(tmp_path / "moved.jsonl", tmp_path / "cache", pytest.fail).tokens["train"][0, 2]
    assert other is not None
    assert not torch.equal(other["features"], item["features"])


OTHERS = {
    "tokenizer": {"makers": {"tokenizer": "c", "encoder": "b"}},
    "encoder": {"makers": {"tokenizer": "a", "encoder": "c"}},
    "format": {"cache_format": "bfloat16"},
    "picture": {"size": 8},
    "rate": {"sample_rate": 4000},
    "duration": {"duration": 1.0},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_another_made_is_not_taken(manifest, tmp_path, other):
    kept(manifest, tmp_path)
    before, made = shards(tmp_path), Counted()
    kept(manifest, tmp_path, made, **OTHERS[other])
    assert made.clips == 6
    assert set(before) < set(shards(tmp_path))
    kept(manifest, tmp_path, pytest.fail)  # and the first ones are still there


def test_a_number_is_the_same_however_it_is_written(manifest, tmp_path):
    kept(manifest, tmp_path, duration=1)
    kept(manifest, tmp_path, pytest.fail, duration=1.0, fps=10.0)


def test_a_whole_cache_may_be_closed_to_who_reads_it(manifest, tmp_path, monkeypatch):
    kept(manifest, tmp_path, takes=2, **MOVING)
    monkeypatch.setattr(os, "access", lambda *_: False)
    again = kept(manifest, tmp_path, pytest.fail, takes=2, **MOVING)
    assert len(list(again.loader("train"))) == 2
    with pytest.raises(InputError, match="cannot write into"):
        kept(manifest, tmp_path, takes=3, **MOVING)
    with pytest.raises(InputError, match="cannot write into"):
        data(manifest, tmp_path / "new")


def test_a_cache_may_lie_at_home(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data(manifest, Path("~/kept")).cache == str(tmp_path / "home" / "kept")


def test_a_reader_that_is_not_there_is_told_before_anything_is_read(manifest, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(InputError, match=r"torchcodec cannot be used here .*reader=pyav$"):
        data(manifest, None, reader="torchcodec")


def test_interrupted_it_goes_on_where_it_stopped(manifest, tmp_path):
    stopped = Counted(stop=4)
    with pytest.raises(KeyboardInterrupt):
        kept(manifest, tmp_path, stopped, takes=3, **MOVING)
    assert stopped.clips == 6
    rest = Counted()
    whole = kept(manifest, tmp_path, rest, takes=3, **MOVING)
    assert rest.clips == 3 * 4 + 2 - 6
    assert whole.tokens["train"].lost() == []
    assert [path for path in tmp_path.rglob(".*") if path.is_file()] == []


def test_shares_are_disjoint_and_whole_whenever_they_are_taken(manifest, tmp_path):
    """The second process looks when the first has finished, or before it began."""
    first, second, third = Counted(), Counted(), Counted()
    late = data(manifest, tmp_path, takes=8, **MOVING)
    data(manifest, tmp_path, takes=8, **MOVING).make_tokens(first, CPU, 0, 3)
    data(manifest, tmp_path, takes=8, **MOVING).make_tokens(second, CPU, 1, 3)
    late.make_tokens(third, CPU, 2, 3)
    assert first.clips + second.clips + third.clips == 8 * 4 + 2
    assert min(first.clips, second.clips, third.clips) > 3
    kept(manifest, tmp_path, pytest.fail, takes=8, **MOVING)


def _work(manifest: Path, cache: Path, barrier, told, rank: int) -> None:
    def agree(number: int) -> bool:
        barrier.wait()
        told[rank] = number
        barrier.wait()
        return len(set(told)) == 1

    made = data(manifest, cache, takes=8, **MOVING)
    made.make_tokens(tokenise, CPU, rank, 3, agree)
    assert all(not tokens.lost() for tokens in made.tokens.values())


def work(forked, manifest: Path, caches: list[Path]) -> list[int | None]:
    """Exit status of three processes that share the work."""
    fork = multiprocessing.get_context("fork")
    barrier, told = fork.Barrier(3), fork.Array("q", 3)
    return forked(_work, [(manifest, cache, barrier, told, rank) for rank, cache in enumerate(caches)])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_share_the_work_at_once(forked, manifest, tmp_path):
    assert work(forked, manifest, [tmp_path] * 3) == [0, 0, 0]
    kept(manifest, tmp_path, pytest.fail, takes=8, **MOVING)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_share_no_folder_are_refused(forked, manifest, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "PATIENCE", 2)
    assert work(forked, manifest, [tmp_path / "a", tmp_path / "a", tmp_path / "b"]) == [1, 1, 1]
    assert "is not the same to all processes; name a folder that they share" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_clip_is_told_once_and_left_out(manifest, videos, tmp_path, workers):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((videos / "1.mp4").read_bytes()[:3000])
    clips = [Clip("good", videos / "0.mp4", 1.0), Clip("broken", broken, 1.0), Clip("other", videos / "2.mp4", 1.0)]
    write_manifest(tmp_path / "some.jsonl", clips)
    with pytest.warns(UserWarning, match=rf"left out: .*{broken.name}") as told:
        cached = kept(tmp_path / "some.jsonl", tmp_path / "cache", takes=4, workers=workers, **MOVING)
    assert len(told) == 1
    assert cached.tokens["train"].lost() == ["broken"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = cached.loader("train", batch_size=3)
    assert sorted(batch["id"]) == ["good", "other"]


BROKEN = {
    "empty": lambda data: b"",
    "cut in its header": lambda data: data[:20],
    "cut in its tensors": lambda data: data[:-8],
    "another file": lambda data: b"no tensors" * 50,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_shard_is_told_and_made_again(manifest, tmp_path, how):
    kept(manifest, tmp_path)
    train, val = sorted(shards(tmp_path), key=lambda path: path.stat().st_size, reverse=True)
    good = train.read_bytes()
    train.write_bytes(BROKEN[how](good))
    made = Counted()
    with pytest.warns(UserWarning, match=rf"{train.name} are broken .* made again") as told:
        kept(manifest, tmp_path, made)
    assert len(told) == 1
    assert made.clips == 4
    assert train.read_bytes() == good
    assert val.is_file()


def test_a_flipped_bit_is_found_where_it_is_read(manifest, tmp_path):
    kept(manifest, tmp_path)
    train = max(shards(tmp_path), key=lambda path: path.stat().st_size)
    content = bytearray(train.read_bytes())
    content[-200] ^= 4
    train.write_bytes(content)
    cached = kept(manifest, tmp_path, pytest.fail)
    with pytest.raises(InputError, match=rf"{train.name} were broken .*the same command makes them again"):
        list(cached.loader("train"))
    made = Counted()
    kept(manifest, tmp_path, made)
    assert made.clips == 4


def test_bfloat16_halves_and_rounds(manifest, tmp_path):
    exact, rounded = (kept(manifest, tmp_path / name, cache_format=name) for name in ("float32", "bfloat16"))
    for index in range(4):
        mine, true = (made.tokens["train"][0, index] for made in (rounded, exact))
        assert mine is not None
        assert true is not None
        assert mine["features"].dtype == torch.float32
        assert torch.equal(mine["features"], true["features"].bfloat16().float())
        assert torch.equal(mine["codes"], true["codes"])


def test_many_clips_lie_in_few_shards(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "ITEMS", 4)
    cached = kept(manifest, tmp_path, batch_size=3, takes=3, **MOVING)
    sizes = [len(load_file(path)["keys"]) for path in shards(tmp_path)]
    assert sorted(sizes) == [2, 6, 6]  # two of validation
    assert cached.tokens["train"].lost() == []


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read in /proc")
def test_only_what_is_looked_at_is_read(tmp_path):
    def resident() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    features = torch.ones(64, 1000, 500)
    keys = [number.to_bytes(16, "big") for number in range(1, 65)]
    Shards(tmp_path).write(keys, torch.ones(64, 1, 2).short(), features)
    size = features.nbytes
    del features
    found = Shards(tmp_path)
    before = resident()
    codes, row = found.read(*found.look()[keys[40]])
    assert row.sum() == 500_000
    assert codes.tolist() == [[1, 1]]
    assert resident() - before < size / 4


def test_a_full_disk_is_told(manifest, tmp_path, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    made = data(manifest, tmp_path / "cache")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*\.safetensors: No space left.*make room"):
        made.make_tokens(tokenise, CPU)


def test_the_settings_of_a_cache_are_checked(manifest, tmp_path):
    with pytest.raises(InputError, match=r"data\.takes=2 .* data\.cache=FOLDER"):
        data(manifest, None, takes=2)
    with pytest.raises(InputError, match=r"data\.takes is 0"):
        data(manifest, tmp_path, takes=0)
    with pytest.raises(InputError, match=r"data\.cache_format is 'int3'; choose from float32, bfloat16"):
        data(manifest, tmp_path, cache_format="int3")
    with pytest.raises(InputError, match="cannot make the folder"):
        data(manifest, manifest)
    with pytest.warns(UserWarning, match=r"data\.takes=1 keeps one span"):
        data(manifest, tmp_path, **MOVING)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_media_come_to_the_gpu(manifest, tmp_path):
    def on_gpu(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch["video"].is_cuda
        assert batch["audio"].is_cuda
        codes, features = tokenise({key: value.cpu() if torch.is_tensor(value) else value for key, value in batch.items()})
        return codes.cuda(), features.cuda()

    made = data(manifest, tmp_path / "gpu", workers=2)
    made.make_tokens(on_gpu, torch.device("cuda"))
    there, here = (made.tokens["train"][0, 1], kept(manifest, tmp_path / "cpu").tokens["train"][0, 1])
    assert there is not None
    assert here is not None
    assert torch.equal(there["features"], here["features"])
