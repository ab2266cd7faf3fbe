import json
import multiprocessing
import os
import pickle
import random
import tarfile
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import pytest
import torch

from vaura.data.clips import EpochOrder
from vaura.data.manifest import Clip, write_manifest
from vaura.data.packed import PackedData, PackedOrder
from vaura.data.packing import pack
from vaura.data.prepared import MANIFEST, clip_path, part_path, write_part
from vaura.data.storage import Storage
from vaura.data.stored import StoredClip, StoredDataset
from vaura.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:left out of the shards", "ignore:left out. .* train clips", "ignore:This DataLoader will create"
)

CODE_RATE, FEATURE_RATE, SEGMENT = 11025 / 128, 12.5, 0.64
SETTINGS = {"batch_size": 4, "workers": 0, "duration": 1.28, "random_start": True, "open_shards": 2, "seed": 3}
SPLIT_OF = {0: "val", 1: "test"}  # of every tenth clip; the others are trained on


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VAURA_CACHE", str(tmp_path / "house"))


def arrays_of(number: int) -> dict[str, torch.Tensor]:
    """Codes and features that say whose they are, and which."""
    segments = 2 + number % 4
    frames, shown = -int(-segments * SEGMENT * CODE_RATE // 1), segments * 8
    codes = torch.stack([torch.full((frames,), number), torch.arange(frames)])
    features = torch.stack([torch.full((shown,), float(number)), torch.arange(float(shown)), torch.randn(shown)], 1)
    return {"codes": codes, "features": features}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Forty clips of 1.28 to 3.2 s in two classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("prepared")
    clips = []
    for number in range(40):
        name = f"{'dog bark' if number % 2 else 'séa'}/clip.{number}"
        duration, split = (2 + number % 4) * SEGMENT, SPLIT_OF.get(number % 10, "train")
        facts = {"label": name.split("/")[0], "source": f"video {number // 4}"}
        clips.append(Clip(name, clip_path(folder, name), duration, split=split, facts=facts))
        arrays = arrays_of(number)
        write_part(part_path(folder, "codes", name), {"codes": arrays["codes"]}, {"frame_rate": CODE_RATE, "fingerprint": "t"})
        made_by = {"frame_rate": FEATURE_RATE, "clip": number}
        write_part(part_path(folder, "avclip", name), {"features": arrays["features"]}, made_by)
    write_manifest(folder / MANIFEST, clips)
    return folder


@pytest.fixture(scope="module")
def shards(prepared) -> Path:
    pack(prepared, ["codes", "avclip"], clips=5)
    return prepared / "shards"


def number_of(clip_id: str) -> int:
    return int(clip_id.rpartition(".")[2])


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- the format ---


def test_webdataset_reads_what_was_packed(shards, prepared):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, shards.glob("*.tar")))
    seen = set()
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        number = number_of(sample["json"]["id"])
        assert sample["codes.npy"].dtype == np.int16
        truth = packed_truth(prepared, sample["json"]["id"])
        np.testing.assert_array_equal(sample["codes.npy"], truth["codes"])
        np.testing.assert_array_equal(sample["avclip.npy"], truth["avclip"])
        assert sample["json"]["made_by"]["avclip"] == {"frame_rate": FEATURE_RATE, "clip": number}
        assert sample["json"]["source"] == f"video {number // 4}"
        assert Path(sample["__url__"]).name.startswith(sample["json"]["split"])
        seen.add(number)
    assert seen == set(range(40))


def packed_truth(prepared: Path, clip_id: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {kind: next(iter(load_file(part_path(prepared, kind, clip_id)).values())) for kind in ("codes", "avclip")}


def test_shards_that_webdataset_wrote_are_read_without_an_index(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for split, numbers in (("train", range(6)), ("val", range(6, 8))):
        with webdataset.TarWriter(str(tmp_path / f"{split}-0.tar")) as tar:
            for number in numbers:
                arrays = arrays_of(number)
                sample = {
                    "codes.npy": arrays["codes"].numpy(),
                    "avclip.npy": arrays["features"].numpy(),
                    "json": {"label": "x"},
                }
                tar.write({"__key__": f"some/clip{number}", **sample, "json": {"label": "x"}, "txt": "words"})
    data = PackedData(data_dir=str(tmp_path), **SETTINGS, frame_rate=CODE_RATE, feature_rate=FEATURE_RATE)
    assert {split: len(clips) for split, clips in data.clips.items()} == {"train": 6, "val": 2, "test": 0, "predict": 0}
    assert data.classes == ["x"]
    for item in data.items("val"):
        number = int(item["id"].removeprefix("some/clip"))
        assert torch.equal(item["codes"], arrays_of(number)["codes"][:, :111])
    with pytest.raises(InputError, match="do not say how many codes a second"):
        PackedData(data_dir=str(tmp_path), **SETTINGS)


def test_the_index_says_where_everything_lies(shards):
    index = json.loads((shards / "index.json").read_text())
    assert index["kinds"]["codes"] == {"frame_rate": CODE_RATE, "fingerprint": "t"}
    assert index["kinds"]["avclip"] == {"frame_rate": FEATURE_RATE}  # what is not shared by all is left to the records
    for shard in index["shards"]:
        path = shards / shard["name"]
        assert shard["size"] == path.stat().st_size
        assert shard["clips"] == len(shard["records"]) <= 5
        with tarfile.open(path) as tar:
            places = {info.offset_data: info.size for info in tar}
            assert {(info.uid, info.gid, info.mtime, info.mode) for info in tar} == {(0, 0, 0, 0o644)}
        for record in shard["records"]:
            for offset, size, _, _ in record["members"].values():
                assert places[offset] == size


def test_looking_into_shards_finds_what_the_index_says(shards, tmp_path):
    for path in shards.glob("*.tar"):
        os.link(path, tmp_path / path.name)
    with_index, without = (PackedData(data_dir=str(folder), **SETTINGS) for folder in (shards, tmp_path))
    assert with_index.index.kinds == without.index.kinds
    for one, other in zip(
        *(sorted(data.index.shards, key=lambda shard: shard.name) for data in (with_index, without)), strict=True
    ):
        assert (one.name, one.split, one.size) == (other.name, other.split, other.size)
        for a, b in zip(one.records, other.records, strict=True):
            assert (a.id, a.duration, a.label) == (b.id, b.duration, b.label)
            assert {kind: member[:2] for kind, member in a.members.items()} == {k: m[:2] for k, m in b.members.items()}


def test_megabytes_close_a_shard_too(prepared, tmp_path):
    done = pack(prepared, ["codes", "avclip"], str(tmp_path), megabytes=0.015)
    assert len(done.index.shards) > 10
    assert all(shard.size <= 15_000 + 1024 for shard in done.index.shards)
    assert sum(len(shard.records) for shard in done.index.shards) == 40


# --- packing again ---


def test_the_same_content_is_the_same_bytes_and_is_not_written_again(prepared, shards, tmp_path):
    first = pack(prepared, ["codes", "avclip"], str(tmp_path), clips=5)
    assert tars(tmp_path) == tars(shards)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = pack(prepared, ["codes", "avclip"], str(tmp_path), clips=5)
    assert (again.written, again.right) == ([], first.written)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_fewer_shards_leave_no_old_ones_behind(prepared, tmp_path):
    (tmp_path / "somebody.tar").touch()
    pack(prepared, ["codes"], str(tmp_path), clips=3)
    done = pack(prepared, ["codes"], str(tmp_path), clips=20)
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", "somebody.tar", *done.written}


@pytest.mark.parametrize("address", ["folder", "memory"])
def test_an_interrupted_packing_goes_on_where_it_stopped(prepared, shards, tmp_path, monkeypatch, address):
    target = str(tmp_path) if address == "folder" else f"memory://{uuid4()}"
    write, calls, stops = Storage.write, Counter(), 0

    def until(last, self, name, pieces):
        calls["now"] += 1
        if calls["now"] == last:
            raise KeyboardInterrupt
        calls[name] += 1
        write(self, name, pieces)

    for last in (1, 2, 3, 4, 6, 9):
        calls["now"] = 0
        monkeypatch.setattr(Storage, "write", lambda *args, last=last: until(last, *args))
        with pytest.raises(KeyboardInterrupt):
            pack(prepared, ["codes", "avclip"], target, clips=5)
        assert "index.json" not in Storage(target).sizes()
        stops += 1
    calls["now"] = -(10**6)
    pack(prepared, ["codes", "avclip"], target, clips=5)
    there = Storage(target)
    assert {name: there.read(name) for name in sorted(there.sizes())} == tars(shards)
    written = {name: times for name, times in calls.items() if name.endswith(".tar")}
    assert len(written) == len(list(shards.glob("*.tar")))
    assert sum(written.values()) <= len(written) + stops  # of each stop at most the shard at work is written again


def test_a_packing_that_is_killed_leaves_nothing_broken(prepared, shards, tmp_path):
    fork = multiprocessing.get_context("fork")
    killed, done = 0, False
    while not done:
        child = fork.Process(target=pack, args=(prepared, ["codes", "avclip"], str(tmp_path)), kwargs={"clips": 5})
        child.start()
        time.sleep(0.004 * killed)
        child.kill()
        child.join()
        done = child.exitcode == 0
        killed += not done
        right = tars(shards)
        assert all(
            content == right[name] for name, content in tars(tmp_path).items() if not name.startswith((".", "index.part"))
        )
    assert killed > 5
    (tmp_path / ".train-000000.1-0123abcd.tar").touch()  # as one that is killed leaves, here or there
    pack(prepared, ["codes", "avclip"], str(tmp_path), clips=5)
    assert tars(tmp_path) == tars(shards)


def test_a_changed_part_changes_its_shard_alone(prepared, tmp_path):
    folder = tmp_path / "copy"
    for path in prepared.rglob("*"):
        if path.is_file() and "shards" not in path.parts:
            (folder / path.relative_to(prepared)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.relative_to(prepared))
    pack(folder, ["codes"], clips=5)
    part = part_path(folder, "codes", "dog bark/clip.5")
    write_part(part, {"codes": torch.zeros(2, 200, dtype=torch.int64)}, {"frame_rate": CODE_RATE, "fingerprint": "t"})
    again = pack(folder, ["codes"], clips=5)
    assert len(again.written) == 1
    (shard,) = [shard for shard in again.index.shards if shard.name == again.written[0]]
    assert "dog bark/clip.5" in [record.id for record in shard.records]


def test_a_clip_without_a_part_is_left_out_and_told(prepared, tmp_path):
    folder = tmp_path / "copy"
    (folder / "parts").mkdir(parents=True)
    os.link(prepared / MANIFEST, folder / MANIFEST)
    for number in (2, 3, 4):
        name = f"{'dog bark' if number % 2 else 'séa'}/clip.{number}"
        write_part(part_path(folder, "codes", name), {"codes": arrays_of(number)["codes"]}, {"frame_rate": 50})
    with pytest.warns(UserWarning, match=r"left out of the shards: .*is missing or broken"):
        done = pack(folder, ["codes"])
    assert [len(shard.records) for shard in done.index.shards] == [3]
    assert len(done.left_out) == 37
    with pytest.raises(InputError, match=r"no clip of .* has all of mel: .*mel.*is missing"):
        pack(folder, ["mel"])
    write_part(part_path(folder, "codes", "séa/clip.4"), {"codes": arrays_of(4)["codes"]}, {"frame_rate": 75})
    with pytest.raises(InputError, match="codes have 50 and 75 frames a second"):
        pack(folder, ["codes"])


# --- other places ---


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_shards_elsewhere_are_the_same(prepared, shards, tmp_path, protocol):
    address = f"memory://{uuid4()}" if protocol == "memory" else (tmp_path / "sh ards").as_uri()
    pack(prepared, ["codes", "avclip"], address, clips=5)
    there = Storage(address)
    assert {name: there.read(name) for name in sorted(there.sizes())} == tars(shards)
    here, elsewhere = PackedData(data_dir=str(shards), **SETTINGS), PackedData(data_dir=address, **SETTINGS)
    same(passes(here.loader("train"), 1), passes(elsewhere.loader("train"), 1))


def test_a_shard_elsewhere_is_fetched_once_whoever_needs_it(prepared, tmp_path, forked):
    address = f"memory://{uuid4()}"
    pack(prepared, ["codes", "avclip"], address, clips=5)
    log = tmp_path / "log"
    get = Storage.fetch

    def counted(self, name, to):
        with log.open("a") as file:
            file.write(f"{name}\n")
        get(self, name, to)

    Storage.fetch = counted
    try:
        everything = PackedData(data_dir=address, **SETTINGS, cache=str(tmp_path / "cache"))

        def work(rank):
            data = everything.loader("train", rank, 2)
            assert sum(len(batch["id"]) for batch in data) == 16

        assert forked(work, [(0,), (1,)]) == [0, 0]
        assert len(list(everything.loader("train"))) == 8  # workers of this machine find the copies
    finally:
        Storage.fetch = get
    fetched = Counter(log.read_text().split())
    assert set(fetched) == {shard.name for shard in everything.index.shards if shard.split == "train"}
    assert set(fetched.values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_are_removed_after_their_last_clip_when_asked(prepared, tmp_path, workers):
    address = f"memory://{uuid4()}"
    pack(prepared, ["codes", "avclip"], address, clips=4)
    cache = tmp_path / "cache"
    settings = SETTINGS | {"batch_size": 2, "workers": workers}
    kept = PackedData(data_dir=address, **settings, cache=str(tmp_path / "other"))
    data = PackedData(data_dir=address, **settings, cache=str(cache), remove_copies=True)
    loader, most = data.loader("train"), 0
    for _ in range(2):
        ids = []
        for batch in loader:
            ids += batch["id"]
            most = max(most, len(list(cache.rglob("*.tar"))))
        assert sorted(ids) == sorted(clip.id for clip in data.clips["train"])
        assert not [path for path in cache.rglob("*") if path.is_file()]
    if workers == 0:
        assert most <= SETTINGS["open_shards"] + 1
    same(passes(data.loader("train"), 2), passes(kept.loader("train"), 2))


def test_an_address_that_cannot_be_reached_is_told():
    with pytest.raises(InputError, match=r"cannot reach nonsense://x"):
        PackedData(data_dir="nonsense://x", **SETTINGS)
    with pytest.raises(InputError, match=r"there are no shards in memory://empty"):
        PackedData(data_dir="memory://empty", **SETTINGS)


# --- the order ---


def orders(shards: list[int], open_shards: int, world: int, **settings) -> list[PackedOrder]:
    return [PackedOrder(shards, open_shards, seed=5, rank=rank, world_size=world, **settings) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("open_shards", [1, 3, 100])
def test_every_clip_comes_once_an_epoch_over_all_processes(world, open_shards):
    sizes = [7, 1, 12, 3, 9, 9, 2, 30, 5]
    shards = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    total = len(shards)
    every = orders(shards, open_shards, world, shuffle=True)
    seen_orders, dropped = set(), Counter()
    for epoch in range(6):
        taken = []
        for rank, order in enumerate(every):
            order.epoch = epoch
            pairs = list(order)
            twin = EpochOrder(total, shuffle=True, rank=rank, world_size=world)
            assert len(pairs) == len(order) == len(twin)
            assert {pair[0] for pair in pairs} == {epoch}
            run = [index for _, index in pairs]
            at_work(run, shards, open_shards)
            taken += run
        assert len(set(taken)) == len(taken) == total - total % world
        dropped.update(set(range(total)) - set(taken))
        seen_orders.add(tuple(taken))
    assert len(seen_orders) == 6
    assert total % world == 0 or max(dropped.values()) < 6  # not always the same


def at_work(run: list[int], shards: list[int], most: int) -> None:
    """At no instant more than `most` shards are between their first clip and their last."""
    named = [shards[index] for index in run]
    first, last = {}, {}
    for place, shard in enumerate(named):
        first.setdefault(shard, place)
        last[shard] = place
    assert all(sum(first[s] <= place <= last[s] for s in first) <= most for place in range(len(named)))


def test_what_is_not_trained_on_comes_in_order_and_whole():
    shards = [0] * 5 + [1] * 6
    for world in (1, 2, 3, 4):
        every = orders(shards, 2, world, shuffle=False)
        runs = [[index for _, index in order] for order in every]
        assert [index for run in runs for index in run] == list(range(11))
        assert [len(run) for run in runs] == [len(order) for order in every]


def test_a_process_needs_but_its_share_of_the_shards():
    shards = [shard for shard in range(40) for _ in range(25)]
    for order in orders(shards, 4, 4, shuffle=True):
        assert len({shards[index] for _, index in order}) <= 11


def test_clips_of_open_shards_come_well_mixed():
    shards = [shard for shard in range(50) for _ in range(100)]
    (order,) = orders(shards, 10, 1, shuffle=True)
    named = torch.tensor([shards[index] for _, index in order])
    repeated = float((named[1:] == named[:-1]).float().mean())
    assert repeated < 0.2  # by chance one in ten
    places = torch.tensor([index for _, index in order]) % 100
    assert abs(float(torch.corrcoef(torch.stack([places.float(), torch.arange(5000.0)]))[0, 1])) < 0.05


# --- the stream ---


def passes(loader, number: int) -> list[list[dict]]:
    return [list(loader) for _ in range(number)]


def same(some: list[list[dict]], others: list[list[dict]]) -> None:
    assert [[batch["id"] for batch in one] for one in some] == [[batch["id"] for batch in one] for one in others]
    for one, other in zip(chain(*some), chain(*others), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items() if key != "id")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_goes_on_after_any_batch_as_if_it_had_never_stopped(shards, workers):
    for world in (1, 3):
        for rank in range(world):
            reference = passes(PackedData(data_dir=str(shards), **SETTINGS).loader("train", rank, world), 2)
            stops = range(len(reference[0]) + 1) if workers == 0 else (1,)
            for done in stops:
                first = PackedData(data_dir=str(shards), **SETTINGS).loader("train", rank, world)
                begun = iter(first)
                for _ in range(done):
                    next(begun)
                state = first.state_dict()
                if done == 0:
                    continue
                settings = SETTINGS | {"workers": workers}
                second = PackedData(data_dir=str(shards), **settings).loader("train", rank, world)
                second.load_state_dict(state)
                rest = [reference[0][done:]] if done < len(reference[0]) else []
                same(passes(second, len(rest) + 1), [*rest, reference[1]])


def test_items_show_codes_and_features_of_the_same_instant(shards):
    data = PackedData(data_dir=str(shards), **SETTINGS, num_codebooks=2, codebook_size=300, dim=3)
    starts = Counter()
    for epoch in range(30):
        for index, clip in enumerate(data.clips["train"]):
            item = data.dataset("train")[epoch, index]
            assert item["codes"].shape == (2, 111)  # 1.28 s at 86.13 Hz
            assert item["features"].shape == (16, 3)
            assert set(item["codes"][0].tolist()) == set(item["features"][:, 0].tolist()) == {number_of(clip.id)}
            first, shown = int(item["codes"][1, 0]), float(item["features"][0, 1])
            assert shown / FEATURE_RATE == pytest.approx(item["start"])
            assert abs(first / CODE_RATE - item["start"]) <= 1 / CODE_RATE
            assert round(item["start"] / SEGMENT, 6) == int(shown) // 8
            if clip.record.duration > 3:
                starts[int(shown) // 8] += 1
    assert set(starts) == {0, 1, 2, 3}
    assert max(starts.values()) < 1.5 * min(starts.values())
    assert {item["start"] for item in data.items("val")} == {0.0}


def test_training_moves_and_everything_else_does_not(shards):
    data = PackedData(data_dir=str(shards), **SETTINGS)
    one, other = passes(data.loader("train"), 2)
    assert [batch["id"] for batch in one] != [batch["id"] for batch in other]
    same(*[[batches] for batches in passes(data.loader("val"), 2)])
    still = PackedData(data_dir=str(shards), **SETTINGS | {"random_start": False})
    assert {float(start) for batch in still.loader("train") for start in batch["start"]} == {0.0}


def test_clips_too_short_are_left_out_at_once(shards):
    with pytest.warns(UserWarning, match=r"left out: 16 train clips and .* in .*, which are shorter than data.duration"):
        data = PackedData(data_dir=str(shards), **SETTINGS | {"duration": 2.56})
    assert all(clip.record.duration >= 2.56 for clip in data.clips["train"])
    assert len(data.left_out) == 1


# --- mels ---


def test_mels_are_cut_as_stored_ones_are(tmp_path):
    generator = np.random.default_rng(0)
    folder, clips, stored = tmp_path / "prepared", [], []
    kinds = {"feature_rgb": "bn_inception", "feature_flow": "bn_inception_flow"}
    for number in range(6):
        name, label = f"c{number}", "ab"[number % 2]
        mel = generator.random((80, 90 + number), dtype=np.float32)
        write_part(part_path(folder, "mel", f"{label}/{name}"), {"mel": torch.from_numpy(mel)}, {})
        place = tmp_path / "stored" / label
        (place / "melspec_10s_22050hz").mkdir(parents=True, exist_ok=True)
        np.save(place / "melspec_10s_22050hz" / f"{name}_mel.npy", mel)
        for short, (long, kind) in enumerate(kinds.items()):
            vectors = generator.random((22 - short, 5), dtype=np.float32)
            write_part(
                part_path(folder, kind, f"{label}/{name}"), {"features": torch.from_numpy(vectors)}, {"frame_rate": 21.5}
            )
            (place / long).mkdir(exist_ok=True)
            (place / long / f"{name}.pkl").write_bytes(pickle.dumps(vectors, 4))
        clips.append(Clip(f"{label}/{name}", Path("x.mp4"), 1.0, facts={"label": label}))
        stored.append(StoredClip(f"{label}/{name}", "train", place, name, number % 2))
    write_manifest(folder / MANIFEST, clips)
    pack(folder, ["mel", *kinds.values()], clips=4)
    shared = {"mel_frames": 80, "features": 7, "feature_frames": 22, "feature_crop": 20, "random_crop": True, "dim": 10}
    data = PackedData(
        data_dir=str(folder), batch_size=2, workers=0, signal="mel", kinds=list(kinds), called=kinds, seed=3, **shared
    )
    truth = StoredDataset(stored, kinds=list(kinds), seed=3, **shared)
    wanted = {clip.id: index for index, clip in enumerate(stored)}
    for epoch in range(3):
        for index, clip in enumerate(data.clips["train"]):
            ours, theirs = data.dataset("train")[epoch, index], truth[epoch, wanted[clip.id]]
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ("mel", "features", "label"))
    assert data.classes == ["a", "b"]
    alone = PackedData(data_dir=str(folder), batch_size=2, workers=0, signal="mel", mel_frames=80)
    assert {"mel", "label", "id", "start"} == set(next(iter(alone.loader("train"))))


# --- what is broken ---


def copied(shards: Path, to: Path) -> Path:
    for path in shards.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_broken_array_is_told_and_left_out(shards, tmp_path):
    folder = copied(shards, tmp_path)
    data = PackedData(data_dir=str(folder), **SETTINGS)
    clip = data.clips["train"][7]
    content = bytearray((folder / clip.shard.name).read_bytes())
    content[clip.record.members["avclip"].offset + 140] ^= 1
    (folder / clip.shard.name).write_bytes(content)
    with pytest.warns(UserWarning, match=r"avclip of .* is broken \(its checksum is wrong\)") as told:
        ids = [name for batch in data.loader("train") for name in batch["id"]]
    assert len(told) == 1
    assert clip.id not in ids
    assert len(ids) == 31


def test_a_shard_that_ends_early_gives_what_is_whole(shards, tmp_path):
    folder = copied(shards, tmp_path)
    name = "train-000002.tar"
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) * 2 // 5])
    with pytest.warns(UserWarning, match="the file ends before it does"):
        ids = [name for batch in PackedData(data_dir=str(folder), **SETTINGS).loader("train") for name in batch["id"]]
    assert 27 < len(ids) < 32
    (folder / "index.json").unlink()
    with pytest.warns(UserWarning, match=r"train-000002.tar is broken or ends too early; what is whole of it is read"):
        data = PackedData(data_dir=str(folder), **SETTINGS)
    assert sorted(clip.id for clip in data.clips["train"]) == sorted(ids)


def test_a_missing_shard_is_told_once_and_the_others_are_read(shards, tmp_path):
    folder = copied(shards, tmp_path)
    (folder / "train-000003.tar").unlink()
    data = PackedData(data_dir=str(folder), **SETTINGS)
    with pytest.warns(UserWarning, match=r"there is no .*train-000003.tar; none of its 5 clips is read") as told:
        ids = [name for batch in data.loader("train") for name in batch["id"]]
    assert len(told) == 1
    assert len(ids) == 27


def test_a_shard_elsewhere_of_another_size_is_told(prepared, tmp_path):
    address = f"memory://{uuid4()}"
    pack(prepared, ["codes", "avclip"], address, clips=5)
    files = fsspec.filesystem("memory")
    path = f"{address.removeprefix('memory:/')}/train-000001.tar"
    files.pipe_file(path, files.cat_file(path)[:-512])
    data = PackedData(data_dir=address, **SETTINGS)
    with pytest.warns(UserWarning, match=r"train-000001.tar has [\d,]+ bytes and not [\d,]+; .*none of its 5 clips is read"):
        assert sum(len(batch["id"]) for batch in data.loader("train")) == 27


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("what", ["index.json", "train-0.tar"])
def test_whatever_is_broken_is_told_or_left_out(tmp_path, what):
    pieces = []
    for number in range(4):
        name = f"clip.{number}"
        write_part(part_path(tmp_path, "codes", name), {"codes": torch.full((2, 111), number)}, {"frame_rate": CODE_RATE})
        features = {"features": torch.full((16, 3), float(number))}
        write_part(part_path(tmp_path, "avclip", name), features, {"frame_rate": FEATURE_RATE})
        pieces.append(Clip(name, Path("x.mp4"), 1.28))
    write_manifest(tmp_path / MANIFEST, pieces)
    pack(tmp_path, ["codes", "avclip"])
    folder = tmp_path / "shards"
    (folder / "train-000000.tar").rename(folder / "train-0.tar")
    index = (folder / "index.json").read_bytes().replace(b"train-000000.tar", b"train-0.tar")
    (folder / "index.json").unlink()  # nothing vouches for the tar then
    whole = index if what == "index.json" else (folder / what).read_bytes()
    letters = b"0123456789-" if what == "index.json" else range(256)
    draw, seen = random.Random(0), Counter()
    for turn in range(150):
        broken = bytearray(whole)
        if turn % 3 == 0:
            broken = broken[: draw.randrange(len(whole))]
        else:
            place = draw.randrange(len(whole))
            length = draw.choice([1, 1, 1, 300])
            broken[place : place + length] = bytes(draw.choices(letters, k=length))
        (folder / what).write_bytes(broken)
        try:
            items = list(PackedData(data_dir=str(folder), **SETTINGS, codebook_size=9).items("train"))
        except InputError:
            seen["told"] += 1
            continue
        seen["read"] += 1
        assert len(items) <= 4
        assert all(item["codes"].shape == (2, 111) and item["features"].shape == (16, 3) for item in items)
    assert min(seen["told"], seen["read"]) > 5


REFUSED = [
    ({"signal": "mels"}, "data.signal is 'mels'; choose from codes, mel. Did you mean 'mel'?"),
    ({"signal": "mel"}, "hold no 'mel' but avclip, codes; set data.mel"),
    ({"kind": "resnet"}, "hold no 'resnet' but avclip, codes; set data.kind"),
    ({"open_shards": 0}, "data.open_shards is 0"),
    ({"duration": 1.0}, "data.duration=1 s are no whole segments of 0.64 s, .* set data.duration=1.28"),
    ({"frame_rate": 75.0}, "codes in .* has 86.1328 frames a second, and the tokenizer 75"),
    ({"num_codebooks": 9}, "the train clips cannot be used: codes of .* are no codes of 9 codebooks"),
    (
        {"codebook_size": 100},
        "the train clips cannot be used: codes of .* reach from 0 to .* has codes 0 to 99",
    ),
    ({"dim": 768}, "the train clips cannot be used: avclip of .* are 3 wide, and the encoder's 768"),
    ({"makers": {"encoder": "e", "tokenizer": "u"}}, "codes in .* were made by another tokenizer, or with other weights"),
    ({"duration": 64.0}, "no clip in .* can be used for the split train: .*shorter than data.duration"),
    ({"data_dir": "/no/such/folder"}, "the folder of shards /no/such/folder does not exist"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_what_will_not_do_is_told_in_a_sentence(shards, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        PackedData(**{"data_dir": str(shards), **SETTINGS, **settings})


def test_a_broken_index_is_told(shards, tmp_path):
    folder = copied(shards, tmp_path)
    for content, sentence in ((b"{", "is no index of shards"), (b'{"format": 2}', "is of format 2, and this version reads 1")):
        (folder / "index.json").write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            PackedData(data_dir=str(folder), **SETTINGS)


def test_the_config_fits(shards):
    from hydra import compose, initialize_config_dir

    from vaura.command import CONFIGS
    from vaura.components import instantiate

    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("data/packed", overrides=[f"+data.data_dir={shards}", "+seed=1"]).data
    data = instantiate(config, duration=1.28, data_dir=str(shards), needs=["val"])
    assert len(next(iter(data.loader("val")))["id"]) == 4
