import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from vaura.data.clips import ClipDataset, ClipLoader, EpochOrder, collate
from vaura.data.manifest import Clip
from vaura.media.mux import write_video

RATE, FPS, EVENT = 16000, 25, 1.4


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    """Three seconds in which picture and sound switch on together at `EVENT`."""
    path = tmp_path_factory.mktemp("event") / "event.mp4"
    frames = torch.full((3 * FPS, 3, 32, 32), 20, dtype=torch.uint8)
    frames[round(EVENT * FPS) :] = 220
    time = torch.arange(3 * RATE) / RATE
    wav = 0.5 * torch.sin(2 * torch.pi * 1000 * time) * (time >= EVENT)
    write_video(path, frames, FPS, wav.unsqueeze(0), RATE)
    return Clip("event", path, 3.0)


def reader(clips: list[Clip], duration: float = 2.0, **settings) -> ClipDataset:
    settings = {"fps": FPS, "size": 16, "sample_rate": RATE, "channels": 1, **settings}
    return ClipDataset(clips, duration, **settings)


def onsets(item: dict) -> tuple[float, float]:
    """Seconds into the item at which the picture and the sound switch on."""
    bright = item["video"].float().mean((1, 2, 3)) > 120
    loud = item["audio"].abs().amax(0) > 0.15
    return float(bright.int().argmax()) / FPS, float(loud.int().argmax()) / RATE


@pytest.mark.parametrize("start", [0.0, 0.4, 0.52, 0.713, 0.999])
def test_picture_and_sound_are_cut_at_the_same_instant(clip, start):
    item = reader([Clip("event", clip.video, 2.0, start)])[0, 0]
    assert item["video"].shape == (2 * FPS, 3, 16, 16)
    assert item["audio"].shape == (1, 2 * RATE)
    seen, heard = onsets(item)
    assert 0 <= seen - (EVENT - start) < 1 / FPS + 1e-6  # the first frame at or after it
    assert heard == pytest.approx(EVENT - start, abs=0.003)


def test_random_cuts_keep_picture_and_sound_together_too(clip):
    dataset = reader([clip], random_start=True)
    starts = set()
    for epoch in range(6):
        item = dataset[epoch, 0]
        seen, heard = onsets(item)
        assert -0.003 < seen - heard < 1 / FPS + 0.003
        assert heard == pytest.approx(EVENT - item["start"], abs=0.003)
        starts.add(item["start"])
    assert len(starts) == 6


def test_random_cuts_lie_inside_the_clip_and_cover_it():
    clip = Clip("a", Path("a.mp4"), 5.0, start=7.0)
    dataset = reader([clip], random_start=True)
    starts = torch.tensor([dataset.start_of(epoch, 0) for epoch in range(500)])
    assert starts.min() >= 7.0
    assert starts.max() <= 10.0
    spread = (starts.sort().values - 7.0) / 3.0 - torch.arange(500) / 500
    assert spread.abs().max() < 1.63 / 500**0.5  # Kolmogorov-Smirnov at 1 %


def test_a_random_cut_belongs_to_seed_epoch_and_clip():
    a, b = Clip("a", Path("a.mp4"), 5.0), Clip("b", Path("b.mp4"), 5.0)
    one, other = reader([a, b], random_start=True, seed=1), reader([b, a], random_start=True, seed=1)
    assert [one.start_of(epoch, 0) for epoch in range(5)] == [other.start_of(epoch, 1) for epoch in range(5)]
    assert len({one.start_of(epoch, index) for epoch in range(5) for index in range(2)}) == 10
    assert reader([a], random_start=True, seed=2).start_of(0, 0) != one.start_of(0, 0)


def test_a_random_view_belongs_to_seed_epoch_and_clip():
    a, b = Clip("a", Path("a.mp4"), 5.0), Clip("b", Path("b.mp4"), 5.0)
    random = {"random_crop": True, "flip": 0.5}
    one, other = reader([a, b], **random, seed=1), reader([b, a], **random, seed=1)
    assert [one.view_of(epoch, 0) for epoch in range(5)] == [other.view_of(epoch, 1) for epoch in range(5)]
    views = [one.view_of(epoch, index) for epoch in range(100) for index in range(2)]
    across, down = torch.tensor([place for place, _ in views]).T
    assert len({place for place, _ in views}) == 200
    assert 0 <= min(across.min(), down.min()) < 0.05
    assert 0.95 < max(across.max(), down.max()) < 1
    assert abs(torch.corrcoef(torch.stack([across, down]))[0, 1]) < 0.2
    assert 75 < sum(flip for _, flip in views) < 125
    assert reader([a], **random, seed=2).view_of(0, 0) != one.view_of(0, 0)


def test_views_are_fixed_unless_asked_otherwise():
    clips = [Clip(name, Path("x.mp4"), 5.0) for name in "abcd"]
    plain = reader(clips, seed=3)
    assert {plain.view_of(epoch, index) for epoch in range(20) for index in range(4)} == {((0.5, 0.5), False)}
    mirrored = reader(clips, flip=1.0)
    assert {mirrored.view_of(epoch, index) for epoch in range(20) for index in range(4)} == {((0.5, 0.5), True)}


@pytest.fixture(scope="module")
def ramps(tmp_path_factory) -> list[Clip]:
    """Wide pictures whose red says how far to the right a pixel lies and whose brightness grows with time."""
    red = torch.linspace(40, 200, 64).expand(32, 64)
    frames = torch.stack([torch.stack([red, *[torch.full((32, 64), 40.0 + 3 * n)] * 2]) for n in range(2 * FPS)]).byte()
    path = tmp_path_factory.mktemp("ramps") / "ramp.mp4"
    write_video(path, frames, FPS, torch.zeros(1, 2 * RATE), RATE)
    return [Clip(name, path, 2.0, split=split) for name, split in zip("abcdef", ["train"] * 4 + ["val"] * 2, strict=True)]


def seen_by(clips: list[Clip], *, seed: int, epochs: int, workers: int = 0, world_size: int = 1, shuffle: bool = True):
    """(epoch, clip) -> its start and what its pixels show of place and flip, by all the processes of a run."""
    random = {"random_start": shuffle, "random_crop": shuffle, "flip": 0.5 * shuffle}
    found = {}
    for rank in range(world_size):
        order = EpochOrder(len(clips), shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        dataset = reader(clips, 0.4, size=16, resize=32, seed=seed, **random)
        loader = ClipLoader(dataset, order, 1, workers)
        for epoch in range(epochs):
            for batch in loader:
                red = batch["video"][0, 0, 0].float().mean(0)
                shown = round(float(red.min()), 2), bool(red[0] > red[-1])
                found[epoch, batch["id"][0]] = (float(batch["start"]), *shown)
    return found


def test_training_is_cut_anew_by_epoch_and_seed_and_by_nothing_else(ramps):
    train = [clip for clip in ramps if clip.split == "train"]
    first = seen_by(train, seed=1, epochs=3)
    assert len(first) == 12
    for what in (0, 1):  # starts, then places
        assert len({view[what] for view in first.values()}) == 12
    assert len({view[2] for view in first.values()}) == 2
    assert seen_by(train, seed=1, epochs=3) == first
    assert seen_by(train, seed=1, epochs=3, workers=2) == first
    assert seen_by(train, seed=1, epochs=3, world_size=2) == first
    other = seen_by(train, seed=2, epochs=3)
    assert not {view[0] for view in other.values()} & {view[0] for view in first.values()}


def test_validation_is_the_same_every_time(ramps):
    val = [clip for clip in ramps if clip.split == "val"]
    first = seen_by(val, seed=1, epochs=2, shuffle=False)
    assert {view[0] for view in first.values()} == {0.0}
    assert len(set(first.values())) == 1
    assert seen_by(val, seed=2, epochs=2, shuffle=False) == first
    assert seen_by(val, seed=1, epochs=2, shuffle=False, workers=1) == first
    middle = reader(val, 0.4, size=16, resize=32)[0, 0]["video"]
    assert not (middle[0, 0, :, 0] > middle[0, 0, :, -1]).any()
    assert middle[:, 0].float().mean() == pytest.approx(120, abs=6)


def test_clips_without_room_begin_where_they_begin():
    clips = [Clip("a", Path("a.mp4"), 2.0, 3.0), Clip("b", Path("b.mp4"), 1.9, 4.0)]
    dataset = reader(clips, random_start=True)
    assert [dataset.start_of(epoch, index) for epoch in range(2) for index in range(2)] == [3.0, 4.0, 3.0, 4.0]


def test_workers_change_nothing(clip):
    clips = [Clip(name, clip.video, 3.0) for name in "abcd"]

    def seen(workers: int) -> list[tuple]:
        order = EpochOrder(4, shuffle=True, seed=5)
        loader = ClipLoader(reader(clips, 0.4, random_start=True, seed=5), order, 2, workers)
        batches = [batch for _ in range(2) for batch in loader]
        return [(b["id"], b["start"], b["video"], b["audio"]) for b in batches]

    alone, together = seen(0), seen(2)
    assert len(alone) == len(together) == 4
    for mine, theirs in zip(alone, together, strict=True):
        assert mine[0] == theirs[0]
        assert all(torch.equal(x, y) for x, y in zip(mine[1:], theirs[1:], strict=True))
    assert len({float(start) for batch in alone for start in batch[1]}) == 8


def test_an_unreadable_clip_is_left_out_with_a_warning_that_names_it(clip, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.video.read_bytes()[:3000])
    short = Clip("short", clip.video, 2.0, start=2.5)
    dataset = reader([clip, Clip("broken", broken, 3.0), short])
    with pytest.warns(UserWarning, match=str(broken)):
        assert dataset[0, 1] is None
    with pytest.warns(UserWarning, match=str(clip.video)):
        assert dataset[0, 2] is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (batch,) = ClipLoader(dataset, EpochOrder(3, shuffle=False), 3, 0)
        assert batch["id"] == ["event"]
        (nothing,) = ClipLoader(reader([Clip("broken", broken, 3.0)]), EpochOrder(1, shuffle=False), 1, 0)
        assert nothing is None


def test_kept_clips_are_read_once(clip, tmp_path):
    path = tmp_path / "copy.mp4"
    path.write_bytes(clip.video.read_bytes())
    dataset = reader([Clip("a", path, 2.0), Clip("b", path, 2.0, 1.0)])
    before = [dataset[0, index] for index in range(2)]
    dataset.keep_all(workers=0)
    path.unlink()
    for index in range(2):
        kept = dataset[9, index]
        assert kept["id"] == before[index]["id"]
        assert torch.equal(kept["video"], before[index]["video"])
        assert torch.equal(kept["audio"], before[index]["audio"])


def test_collate_stacks_what_was_read():
    items = [{"id": "a", "start": 1.5, "codes": torch.ones(2, 3)}, None, {"id": "b", "start": 0.0, "codes": torch.zeros(2, 3)}]
    batch = collate(items)
    assert batch["id"] == ["a", "b"]
    assert batch["start"].tolist() == [1.5, 0.0]
    assert torch.equal(batch["codes"], torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]))
    assert collate([None, None]) is None


@pytest.mark.parametrize("length", [1, 7, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_without_overlap(length, world_size):
    def taken(shuffle: bool, epoch: int) -> list[list[tuple[int, int]]]:
        orders = [EpochOrder(length, shuffle=shuffle, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
        for order in orders:
            order.epoch = epoch
        shares = [list(order) for order in orders]
        assert [len(share) for share in shares] == [len(order) for order in orders]
        return shares

    shares = taken(shuffle=False, epoch=0)
    assert sorted(index for share in shares for _, index in share) == list(range(length))
    shares = taken(shuffle=True, epoch=3)
    assert {len(share) for share in shares} == {length // world_size}  # none waits for another
    indices = [index for share in shares for epoch, index in share if epoch == 3]
    assert len(set(indices)) == len(indices) == length // world_size * world_size


def test_the_order_belongs_to_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        made = EpochOrder(50, shuffle=True, seed=seed)
        made.epoch = epoch
        return [index for _, index in made]

    assert order(1, 0) == order(1, 0)
    assert sorted(order(1, 0)) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


class Numbers(Dataset):
    """Items that say which they are."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"id": str(key[1]), "start": key[1] / 2, "codes": torch.full((1, 1), key[1])}


def number_loader(shuffle: bool = True, workers: int = 0, length: int = 11, rank: int = 0, world_size: int = 1) -> ClipLoader:
    order = EpochOrder(length, shuffle=shuffle, seed=2, rank=rank, world_size=world_size)
    return ClipLoader(Numbers(length), order, 2, workers)


def ids(batches: list[dict]) -> list[list[str]]:
    return [batch["id"] for batch in batches]


def test_every_shuffled_pass_is_another_epoch_and_every_plain_one_the_same():
    shuffled, plain = number_loader(), number_loader(shuffle=False)
    epochs = [ids(shuffled) for _ in range(3)]
    assert all(len(epoch) == len(shuffled) == 5 for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3
    passes = [ids(plain) for _ in range(2)]
    assert passes[0] == passes[1]
    assert [name for batch in passes[0] for name in batch] == [str(n) for n in range(11)]
    assert len(plain) == 6


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_goes_on_where_another_stopped(workers, world_size):
    settings = {"rank": world_size - 1, "world_size": world_size}
    whole = number_loader(**settings)
    epochs = [ids(whole) for _ in range(3)]
    per_epoch = len(epochs[0])
    for stop_epoch, stop_batch in [(0, 1), (1, per_epoch - 1), (1, per_epoch)]:
        first = number_loader(**settings)
        seen = []
        for epoch in range(stop_epoch + 1):
            for number, batch in enumerate(first, 1):
                seen.append(batch["id"])
                if (epoch, number) == (stop_epoch, stop_batch):
                    state = first.state_dict()
                    break
        second = number_loader(workers=workers, **settings)
        second.load_state_dict(state)
        rest = []
        while len(seen) + len(rest) < 3 * per_epoch:
            passed = ids(second)
            assert passed  # an epoch that was over is not passed again, empty
            rest += passed
        assert seen + rest == [batch for epoch in epochs for batch in epoch]


def test_a_pass_that_was_broken_off_is_not_taken_up_again():
    """Without a state to go on from, the next pass is the next epoch, as when Lightning limits the batches of an epoch."""
    loader = number_loader()
    next(iter(loader))
    whole = number_loader()
    epochs = [ids(whole) for _ in range(2)]
    assert ids(loader) == epochs[1]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_kept_clips_hold_no_open_files(clip):
    dataset = reader([clip] * 40, duration=0.2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    dataset.keep_all(workers=2)
    assert len(list(Path("/proc/self/fd").iterdir())) < before + 40


class Unreadable(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, key):
        return None


@pytest.mark.parametrize(("processes", "shuffle", "want"), [(2, True, {}), (1, True, None), (2, False, None)])
def test_processes_that_train_together_are_told_of_nothing_by_an_empty_batch(processes, shuffle, want):
    order = EpochOrder(4, shuffle=shuffle, world_size=processes)
    given = list(ClipLoader(Unreadable(), order, 1, 0))
    assert given == [want] * (4 // processes)  # Lightning passes over None, and the other processes would wait
