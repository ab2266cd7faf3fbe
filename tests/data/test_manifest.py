import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from vaura.data.manifest import Clip, find_videos, in_split, read_manifest, scan_folder, usable, verify, write_manifest
from vaura.errors import InputError
from vaura.media.mux import write_video

RATE = 16000


def video(path: Path, seconds: float = 1.0, sound: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = torch.randint(0, 255, (round(seconds * 10), 3, 32, 32), dtype=torch.uint8)
    write_video(path, frames, 10, 0.1 * torch.randn(1, round(seconds * RATE)) if sound else None, RATE)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return video(tmp_path_factory.mktemp("whole") / "whole.mp4")


def test_a_manifest_gives_back_what_was_written(tmp_path):
    clips = [
        Clip(
            "a",
            tmp_path / "corpus" / "train" / "a b.mp4",
            10.0,
            0.1 + 0.2,
            "train",
            {"material": "wood", "impacts": [0.5, 1.5]},
        ),
        Clip("ünï/côde", Path("/elsewhere/x.mkv"), 2.56, split="test"),
        Clip("3", tmp_path / "corpus" / "c.mp4", 1 / 3, split="val", facts={"note": 'a "quoted"\nline'}),
    ]
    write_manifest(tmp_path / "corpus" / "clips.jsonl", clips)
    assert read_manifest(tmp_path / "corpus" / "clips.jsonl") == clips
    shutil.move(tmp_path / "corpus", tmp_path / "moved")
    assert read_manifest(tmp_path / "moved" / "clips.jsonl")[0].video == tmp_path / "moved" / "train" / "a b.mp4"


def test_what_a_line_leaves_out_has_defaults_and_empty_lines_are_nothing(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_text('\n{"id": 7, "video": "v.mp4", "duration": 3}\n   \n')
    assert read_manifest(path) == [Clip("7", tmp_path / "v.mp4", 3.0, 0.0, "train", {})]


@pytest.mark.parametrize(
    ("line", "about"),
    [
        ('{"id": "b", "video": "b.mp4"}', "duration"),
        ('{"id": "b", "duration": 1}', "video"),
        ('{"video": "b.mp4", "duration": 1}', "id"),
        ('{"id": "b", "video": "b.mp4", "duration": "long"}', "long"),
        ('{"id": "b", "video": null, "duration": 1}', "line 3"),
        ('{"id": "b", "video": "b.mp4", "duration": 1, "split": "dev"}', "'dev'.*train, val, test"),
        ('{"id": "b", ', "line 3"),
        ("[1, 2]", "line 3"),
        ("7", "line 3"),
    ],
)
def test_a_line_that_does_not_fit_is_told_with_its_number(tmp_path, line, about):
    path = tmp_path / "clips.jsonl"
    path.write_text('{"id": "a", "video": "a.mp4", "duration": 1}\n\n' + line + "\n")
    with pytest.raises(InputError, match=f"{path}, line 3") as told:
        read_manifest(path)
    with pytest.raises(InputError, match=about):
        raise told.value


def test_a_manifest_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl"):
        read_manifest(tmp_path / "none.jsonl")


def test_a_manifest_of_another_program_is_read(tmp_path):
    line = json.dumps({"id": "a\u2028b\x85", "video": "ä.mp4", "duration": 1}, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert read_manifest(tmp_path / "m.jsonl") == [Clip("a\u2028b\x85", tmp_path / "ä.mp4", 1.0)] * 2


def test_a_manifest_that_is_no_text_is_told(tmp_path):
    (tmp_path / "m.jsonl").write_bytes('{"id": "ä", "video": "a.mp4", "duration": 1}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"m\.jsonl cannot be read as text .*save it as UTF-8"):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_utf_8_comes_back(tmp_path, whole):
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(whole, tmp_path / name)
    clips, left_out = scan_folder(tmp_path, 0.5, 0.0)
    assert left_out == []
    write_manifest(tmp_path / "m.jsonl", clips)
    assert read_manifest(tmp_path / "m.jsonl") == clips
    assert usable(read_manifest(tmp_path / "m.jsonl")) == (clips, [])
    assert clips[0].video.name == name


def test_a_failed_write_keeps_the_old_manifest(tmp_path):
    path = tmp_path / "clips.jsonl"
    write_manifest(path, [Clip("a", tmp_path / "a.mp4", 1.0)])
    with pytest.raises(TypeError):
        write_manifest(path, [Clip("b", tmp_path / "b.mp4", 1.0), Clip("c", tmp_path / "c.mp4", 1.0, facts={"x": object()})])
    assert [clip.id for clip in read_manifest(path)] == ["a"]
    assert [json.loads(line)["video"] for line in path.read_text().splitlines()] == ["a.mp4"]


def test_videos_are_found_by_their_suffix_in_every_folder(tmp_path):
    for name in ("b.MP4", "deep/er/a.webm", "notes.txt", "c.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in (".b.12-0a1b2c3d.mp4", "._b.mp4", ".mp4"):
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    assert find_videos(tmp_path) == [tmp_path / "b.MP4", tmp_path / "deep/er/a.webm"]
    with pytest.raises(InputError, match=r"folder\.mp4"):
        find_videos(tmp_path / "folder.mp4")
    with pytest.raises(InputError, match="does not exist"):
        find_videos(tmp_path / "nowhere")


def test_what_cannot_be_used_is_left_out_with_one_sentence_each(tmp_path, whole):
    good = [shutil.copy(whole, tmp_path / f"good {n}.mp4") for n in range(3)]
    corrupt = tmp_path / "corrupt.mp4"
    corrupt.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    silent = video(tmp_path / "silent.mp4", sound=False)
    brief = video(tmp_path / "brief.mp4", seconds=0.4)
    clips, left_out = scan_folder(tmp_path, shortest=0.8, val_share=0.0)
    assert [clip.video for clip in clips] == good
    assert all(clip.duration == pytest.approx(1.0, abs=0.06) and clip.start == 0.0 for clip in clips)
    bad = [brief, corrupt, empty, silent, text]
    assert len(left_out) == len(bad)
    for path, sentence in zip(bad, left_out, strict=True):
        assert str(path) in sentence
        assert "\n" not in sentence
    reasons = dict(zip(bad, left_out, strict=True))
    assert "no sound" in reasons[silent]
    assert "0.40 s, shorter than the 0.8 s" in reasons[brief]
    usable, _ = scan_folder(tmp_path, shortest=0.8, val_share=0.0, needs_sound=False)
    assert {clip.video for clip in usable} == {*good, silent}


def test_a_video_keeps_its_side_when_others_come_and_go(tmp_path, whole):
    def splits(names: list[str]) -> dict[str, str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(whole)
        return {clip.id: clip.split for clip in scan_folder(folder, 0.5, val_share=0.4)[0]}

    names = [f"{n % 3}/clip {n}.mp4" for n in range(16)]
    everything = splits(names)
    assert set(everything) == {name.removesuffix(".mp4") for name in names}
    assert set(everything.values()) == {"train", "val"}
    some = splits(names[::2])
    assert some == {key: everything[key] for key in some}
    assert splits(names) == everything


def test_videos_of_one_name_are_told_apart_and_stay_on_their_side(tmp_path, whole):
    def splits() -> dict[str, str]:
        return {clip.id: clip.split for clip in scan_folder(tmp_path, 0.5, val_share=0.5)[0]}

    for n in range(8):
        (tmp_path / f"{n}.mp4").symlink_to(whole)
    alone = splits()
    for name in ("3.mov", "4.mkv", "4.avi", "4.mp4.mkv"):
        (tmp_path / name).symlink_to(whole)
    together = splits()
    assert set(together) == {*"012567", "3.mp4", "3.mov", "4.mp4", "4.mkv", "4.avi", "4.mp4.mkv"}
    assert all(together[name.removesuffix(".mp4")] == side for name, side in alone.items() if name not in "34")
    assert {together["3.mp4"], together["3.mov"]} == {alone["3"]}
    assert {together[f"4.{suffix}"] for suffix in ("mp4", "mkv", "avi")} == {alone["4"]}


def test_folders_named_after_splits_are_the_splits(tmp_path, whole):
    for name in ("train/a.mp4", "val/deep/b.mp4", "test/c.mp4", "train/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(whole)
    clips, _ = scan_folder(tmp_path, 0.5, val_share=0.9)
    assert {clip.id: clip.split for clip in clips} == {
        "train/a": "train",
        "val/deep/b": "val",
        "test/c": "test",
        "train/d": "train",
    }


@pytest.mark.parametrize("val_share", [0.001, 0.999])
def test_either_side_has_a_clip(tmp_path, whole, val_share):
    for n in range(2):
        (tmp_path / f"{n}.mp4").symlink_to(whole)
    assert {clip.split for clip in scan_folder(tmp_path, 0.5, val_share)[0]} == {"train", "val"}
    (tmp_path / "1.mp4").unlink()
    with pytest.raises(InputError, match=r"0\.mp4.*only usable"):
        scan_folder(tmp_path, 0.5, val_share)
    assert [clip.split for clip in scan_folder(tmp_path, 0.5, 0.0)[0]] == ["train"]


def test_a_link_to_a_video_is_written_under_its_own_name(tmp_path, whole):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "mine.mp4").symlink_to(whole)
    clips = [Clip("mine", tmp_path / "links" / "mine.mp4", 1.0)]
    write_manifest(tmp_path / "m.jsonl", clips)
    assert read_manifest(tmp_path / "m.jsonl") == clips


def test_a_fact_cannot_take_the_place_of_what_a_clip_is(tmp_path):
    clip = Clip("a", tmp_path / "a.mp4", 2.0, 0.5, "val", {"start": 7, "split": "dev", "note": "kept"})
    write_manifest(tmp_path / "m.jsonl", [clip])
    (read,) = read_manifest(tmp_path / "m.jsonl")
    assert (read.start, read.split, read.facts) == (0.5, "val", {"note": "kept"})


def test_clips_to_predict_are_their_own_split_or_marked_in_another(tmp_path):
    clips = [
        Clip("a", tmp_path / "a.mp4", 1.0, split="train", facts={"predict": True}),
        Clip("b", tmp_path / "b.mp4", 1.0, split="train"),
        Clip("c", tmp_path / "c.mp4", 1.0, split="predict"),
    ]
    write_manifest(tmp_path / "m.jsonl", clips)
    read = read_manifest(tmp_path / "m.jsonl")
    assert {split: "".join(clip.id for clip in in_split(read, split)) for split in ("train", "val", "test", "predict")} == {
        "train": "ab",
        "val": "",
        "test": "",
        "predict": "ac",
    }
    with pytest.raises(InputError, match=r"'trian' is no split.*Did you mean 'train'"):
        in_split(read, "trian")


def test_what_is_there_and_long_enough_is_usable_unopened(tmp_path):
    for name in ("one/a.mp4", "one/b.mp4", "two/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not opened")
    a, b, c = (Clip(name[-5], tmp_path / name, 2.0) for name in ("one/a.mp4", "one/b.mp4", "two/c.mp4"))
    gone, nowhere = Clip("d", tmp_path / "one" / "d.mp4", 2.0), Clip("e", tmp_path / "three" / "e.mp4", 2.0)
    late = Clip("f", tmp_path / "two" / "c.mp4", 0.5, start=1.5)
    held = Clip("g", tmp_path / "two" / "c.mp4", 0.99)
    assert usable([c, gone, a, nowhere, b], None) == (
        [c, a, b],
        [f"there is no video {gone.video}", f"there is no video {nowhere.video}"],
    )
    assert usable([late, a, held], 1.0) == (
        [a, held],
        [f"{late.video} lasts 0.50 s from 1.5 s on, shorter than the 1 s of a clip"],
    )


@pytest.mark.parametrize("duration", [None, 0.0, 0.01])
def test_a_clip_that_does_not_last_is_told(tmp_path, duration):
    (tmp_path / "a.mp4").touch()
    given = [
        Clip("a", tmp_path / "a.mp4", length, start) for length, start in ((-1.0, 4.0), (0.0, 3.0), (0.5, 2.5), (0.0, 0.0))
    ]
    clips, left_out = usable(given, duration)
    assert clips == [given[2]]
    assert [told.partition("lasts ")[2] for told in left_out] == [
        *("3.00 s, and the clip would begin at 4 s", "3.00 s, and the clip would begin at 3 s"),
        "0.00 s, and the clip would begin at 0 s",
    ]


def test_clips_of_unknown_length_are_opened(tmp_path, whole):
    (tmp_path / "text.mp4").write_text("no video")
    named = [Clip("a", whole, math.nan, 0.25), Clip("b", tmp_path / "text.mp4", math.nan), Clip("c", whole, 5.0)]
    clips, left_out = usable(named, 0.7)
    assert [(clip.id, clip.duration) for clip in clips] == [("a", pytest.approx(0.75, abs=0.01)), ("c", 5.0)]
    assert len(left_out) == 1
    assert "text.mp4" in left_out[0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_verifying_measures_and_tells_of_what_cannot_be_read(tmp_path, whole, workers):
    (tmp_path / "text.mp4").write_text("no video")
    silent = video(tmp_path / "silent.mp4", sound=False)
    clips = [
        Clip("said too much", whole, 10.0),
        Clip("said less", whole, 0.6, 0.1),
        Clip("late", whole, 5.0, start=0.75),
        Clip("later", whole, 5.0, start=3.0),
        Clip("text", tmp_path / "text.mp4", 10.0),
        Clip("silent", silent, 1.0),
    ]
    kept, left_out = verify(clips, 0.5, workers)
    assert [(clip.id, clip.duration) for clip in kept] == [
        ("said too much", pytest.approx(1.0, abs=0.01)),
        ("said less", 0.6),
    ]
    assert len(left_out) == 4
    assert "lasts 0.25 s from 0.75 s on, shorter than the 0.5 s" in left_out[0]
    assert "would begin at 3 s" in left_out[1]
    assert "text.mp4" in left_out[2]
    assert "silent.mp4 has no sound" in left_out[3]
    assert [clip.id for clip in verify(clips[-1:], None, workers, needs_sound=False)[0]] == ["silent"]
