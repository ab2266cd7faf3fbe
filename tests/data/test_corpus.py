"""V-AURA's own files against counts made by hand, and small files of the same kinds against what they say."""

import csv
import functools
import gzip
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from vaura.data import corpus, manifest
from vaura.data.manifest import Clip, in_split, read_manifest, write_manifest
from vaura.errors import InputError
from vaura.media.mux import write_video

SHARED = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[3] / "shared"))
REAL = SHARED / "media" / "vaura" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no files of V-AURA: the folder `shared` is not beside the repository")
WORDS = {"train": "train", "val": "validation", "test": "test", "predict": "predict"}


class Everything:
    """A folder that holds whatever is asked for, and counts how often it is looked into."""

    def __init__(self) -> None:
        self.looked = 0

    def __contains__(self, name: str) -> bool:
        return True


@pytest.fixture
def everything(monkeypatch) -> Everything:
    folder = Everything()

    def listing(_: str | Path) -> Everything:
        folder.looked += 1
        return folder

    monkeypatch.setattr(manifest, "names_in", listing)
    return folder


def lines(path: str) -> list[str]:
    return (REAL / path).read_text().split()


def rows(path: str) -> list[dict[str, str]]:
    with (REAL / path).open(newline="") as file:
        return list(csv.DictReader(file))


def folder_of(path: Path, *names: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return str(path)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def counted(clips: list[Clip]) -> dict[str, int]:
    return dict(Counter(clip.split for clip in clips))


# --- the real lists ---


@real
@pytest.mark.parametrize(
    ("name", "meta", "expected"),
    [
        ("vggsound", None, (156_487, 19_055, 14_511, 4)),
        ("vggsound", "meta/visualsound/visualsound.csv", (77_265, 8_357, 5_425, 2)),
        ("visualsound", "meta/visualsound/visualsound.csv", (77_265, 8_357, 5_425, 2)),
    ],
)
def test_every_clip_of_the_lists_is_read_into_its_split(tmp_path, everything, name, meta, expected):
    clips, _, unwanted = corpus.vggsound(
        data_dir=str(tmp_path),
        split_dir=str(REAL / "splits" / name),
        meta_file=meta and str(REAL / meta),
        duration=2.56,
    )
    assert everything.looked == 1
    assert counted(clips) == dict(zip(("train", "val", "test"), expected, strict=False))
    assert len(in_split(clips, "predict")) == expected[3]
    described = {}
    for row in rows(meta) if meta else ():
        start = int(row["start"])
        described[f"{row['filename']}_{start * 1000}_{(start + 10) * 1000}"] = row["desc"]
    dropped = 0
    for split, word in WORDS.items():
        listed = set(lines(f"splits/{name}/{name}_{word}.txt"))
        wanted = sorted(listed & set(described) if meta else listed)
        dropped += len(listed) - len(wanted)
        assert [clip.id for clip in sorted(in_split(clips, split), key=lambda clip: clip.id)] == wanted
        if split != "predict":
            assert [clip.id for clip in in_split(clips, split)] == wanted
    assert {(clip.start, clip.duration) for clip in clips} == {(0.0, 10.0)}
    assert all(clip.video == tmp_path / f"{clip.id}.mp4" for clip in itertools.islice(clips, 0, None, 1000))
    if meta:
        assert all(clip.facts["desc"] == described[clip.id] for clip in clips)
    assert sum(int(sentence.split()[0]) for sentence in unwanted) == dropped


@real
@pytest.mark.parametrize(("name", "number"), [("vggsound_sparse", 444), ("visualsound", 5_425), ("vggsound_test", 14_511)])
def test_test_sets_begin_where_their_tables_say(tmp_path, everything, name, number):
    table = REAL / "test_sets" / f"{name}.csv"
    starts = {row["file"]: float(row["start_sec"]) for row in rows(f"test_sets/{name}.csv")}
    clips, left_out, _ = corpus.fixed_starts(data_dir=str(tmp_path), fixed_start_pts_file=str(table), duration=2.56)
    assert len(clips) == number
    assert left_out == []
    assert {clip.id: clip.start for clip in clips} == starts
    assert [clip.id for clip in clips] == sorted(starts)
    assert all(clip.start + clip.duration == pytest.approx(10) and clip.split == "test" for clip in clips)
    # the way V-AURA's configs give it: the split list, of which the table includes and starts some
    folder = "visualsound" if name == "visualsound" else "vggsound"
    given = {"included_files": str(table), "fixed_start_pts_file": str(table), "splits": ("test",), "duration": 2.56}
    same, *_ = corpus.vggsound(data_dir=str(tmp_path), split_dir=str(REAL / "splits" / folder), **given)
    assert same == clips


@real
def test_a_clip_that_would_end_behind_its_file_is_left_out_and_no_other_takes_its_place(tmp_path, everything):
    table = str(REAL / "test_sets" / "vggsound_test.csv")
    starts = {row["file"]: float(row["start_sec"]) for row in rows("test_sets/vggsound_test.csv")}
    clips, left_out, _ = corpus.fixed_starts(data_dir=str(tmp_path), fixed_start_pts_file=table, duration=5.12)
    late = {name for name, start in starts.items() if start > 4.9}  # 20 ms are held
    assert {clip.id for clip in clips} == set(starts) - late
    assert len(left_out) == len(late) > 1000
    name = min(late)
    assert any(f"{name}.mp4" in told and f"from {starts[name]:g} s on" in told and "5.12 s" in told for told in left_out)
    longer, left_out, _ = corpus.fixed_starts(data_dir=str(tmp_path), fixed_start_pts_file=table, duration=8.0)
    assert ({clip.start for clip in longer}, len(longer), left_out) == ({0.0}, 14_511, [])


@real
@pytest.mark.parametrize("cut", [True, False])
def test_greatest_hits_come_as_files_of_their_own_or_as_spans_of_recordings(tmp_path, monkeypatch, cut):
    table = {row["filename"].removesuffix(".mp4"): row for row in rows("meta/greatesthit/greatesthit.csv")}
    names = list(table) if cut else sorted({name.partition("_denoised")[0] + "_denoised" for name in table})
    listing = frozenset(f"{name}.mp4" for name in names)
    monkeypatch.setattr(corpus, "names_in", lambda _: listing)
    monkeypatch.setattr(manifest, "names_in", lambda _: listing)
    clips, left_out, _ = corpus.greatesthit(
        data_dir=str(tmp_path),
        split_dir=str(REAL / "splits" / "greatesthit"),
        meta_file=str(REAL / "meta" / "greatesthit" / "greatesthit.csv"),
        duration=1.92,
    )
    assert counted(clips) == {"train": 19_217, "val": 2_326, "test": 7_048}
    assert len(left_out) == 1 + 6  # one recording has no hits, and the six clips to predict were cut otherwise
    for clip in itertools.islice(clips, 0, None, 97):
        row = table[clip.id]
        assert clip.duration == pytest.approx(2.0, abs=1e-5)
        assert clip.facts["hit"] == pytest.approx(1.0, abs=1e-5)
        assert clip.facts.get("material", "None") == row["material"]
        assert (clip.facts["action_type"], clip.facts.get("effect", "None")) == (row["action_type"], row["effect"])
        whole = clip.id.partition("_denoised")[0] + "_denoised.mp4"
        assert clip.video.name == (f"{clip.id}.mp4" if cut else whole)
        assert clip.start == (0.0 if cut else float(row["start_time"]))


# --- lists of the same kind ---


def small(tmp_path: Path, **lists: str) -> dict[str, str]:
    """Ten clips a_0_10000 ... j_0_10000 in splits of one letter each, all of whose files are there."""
    lists = lists or {"train": "b a c", "validation": "e d", "test": "h g f", "predict": "a j"}
    for word, letters in lists.items():
        write(tmp_path / "lists" / f"x_{word}.txt", "".join(f"{letter}_0_10000\n" for letter in letters.split()))
    data_dir = folder_of(tmp_path / "videos", *(f"{letter}_0_10000.mp4" for letter in "abcdefghij"))
    return {"data_dir": data_dir, "split_dir": str(tmp_path / "lists")}


def letters(clips: list[Clip], split: str) -> str:
    return "".join(clip.id[0] for clip in in_split(clips, split))


def test_splits_stay_what_they_were_in_the_order_of_their_ids(tmp_path):
    clips, left_out, _ = corpus.vggsound(**small(tmp_path))
    assert [letters(clips, split) for split in WORDS] == ["abc", "de", "fgh", "aj"]
    assert {clip.id[0]: clip.split for clip in clips}["j"] == "predict"
    assert left_out == []
    write_manifest(tmp_path / "m.jsonl", clips)
    assert read_manifest(tmp_path / "m.jsonl") == clips


def test_only_the_splits_that_are_asked_for_are_looked_for(tmp_path):
    given = small(tmp_path, train="a", test="b")
    clips, *_ = corpus.vggsound(**given, splits=("test",))
    assert counted(clips) == {"test": 1}
    assert counted(corpus.vggsound(**given)[0]) == {"train": 1, "test": 1}
    with pytest.raises(InputError, match=r"lists has no list of the split val.*lists_validation\.txt"):
        corpus.vggsound(**given, splits=("val",))


def test_what_is_missing_is_told_by_name_and_left_out(tmp_path):
    given = small(tmp_path)
    (tmp_path / "videos" / "b_0_10000.mp4").unlink()
    clips, left_out, _ = corpus.vggsound(**given, splits=("train",))
    assert letters(clips, "train") == "ac"
    assert left_out == [f"there is no video {tmp_path / 'videos' / 'b_0_10000.mp4'}"]


@pytest.mark.parametrize("kind", ["txt", "csv", "folder"])
def test_ids_are_excluded_and_included_by_any_kind_of_list(tmp_path, kind):
    if kind == "txt":
        path = write(tmp_path / "ids.txt", "a_0_10000\nd_0_10000.mp4\n\n")
    elif kind == "csv":
        path = write(tmp_path / "ids.csv", "file,start_sec\na_0_10000,1.5\nd_0_10000,2\n")
    else:
        write(tmp_path / "ids" / "one.txt", "a_0_10000")
        write(tmp_path / "ids" / "two.txt", "d_0_10000\n")
        path = str(tmp_path / "ids")
    given = small(tmp_path)
    clips, _, unwanted = corpus.vggsound(**given, excluded_files=path)
    assert [letters(clips, split) for split in ("train", "val", "test")] == ["bc", "e", "fgh"]
    assert f"1 of 3 clips of the split train, which {path} excludes" in unwanted
    clips, _, unwanted = corpus.vggsound(**given, included_files=path)
    assert [letters(clips, split) for split in ("train", "val", "test")] == ["a", "d", ""]
    assert f"3 of 3 clips of the split test, which {path} does not include" in unwanted


def test_scores_below_the_threshold_are_left_out_except_to_predict_and_without_a_score_a_clip_stays(tmp_path):
    scores = {"/far/away/a_0_10000.mp4": 0.1, "b_0_10000": 0.2, "x/c_0_10000.mp4": 0.3, "x/j_0_10000.mp4": 0.0}
    path = write(tmp_path / "scores.json", json.dumps(scores))
    clips, _, unwanted = corpus.vggsound(**small(tmp_path), scores_file=path, score_threshold=0.2)
    assert [letters(clips, split) for split in WORDS] == ["bc", "de", "fgh", "aj"]
    assert {clip.id[0]: clip.split for clip in clips}["a"] == "predict"
    assert unwanted == [f"1 of 3 clips of the split train, whose score in {path} is below 0.2"]


def test_clips_out_of_sync_are_left_out_by_how_often_the_test_was_passed(tmp_path):
    passed = {"a": (25, 30), "b": (24, 30), "d": (5, 5), "e": (4, 30), "j": (0, 0)}
    table = [
        f"{name}_0_10000,0.0,{row},{int(row < exact)},{int(row < near)}\n"
        for name, (exact, near) in passed.items()
        for row in range(30)
    ]
    path = write(tmp_path / "insync.csv", "".join(table))
    given = {**small(tmp_path), "insync_file": path}
    clips, _, unwanted = corpus.vggsound(**given)
    assert [letters(clips, split) for split in WORDS] == ["ac", "d", "fgh", "aj"]
    assert f"1 of 3 clips of the split train, for which is_correct holds too rarely in {path}" in unwanted
    near, *_ = corpus.vggsound(**given, insync_key="is_correct_within_1cls_tol")
    assert [letters(near, split) for split in WORDS] == ["abc", "de", "fgh", "aj"]
    few, *_ = corpus.vggsound(**given, insync_threshold=4)
    assert [letters(few, split) for split in WORDS] == ["abc", "de", "fgh", "aj"]
    with pytest.raises(InputError, match=r"insync_key=correct .*is_correct_within_1cls_tol.*Did you mean 'is_correct'"):
        corpus.vggsound(**given, insync_key="correct")


def test_vggsounds_own_table_has_no_header_and_quotes(tmp_path):
    table = write(tmp_path / "vggsound.csv", 'a,0,"dog barking, far away",train\nb,0,rain,train\nd,0,wind,test\n')
    clips, _, unwanted = corpus.vggsound(**small(tmp_path), meta_file=table)
    assert [(clip.id[0], clip.split, clip.facts["desc"]) for clip in clips] == [
        *[("a", "train", "dog barking, far away"), ("b", "train", "rain")],
        ("d", "val", "wind"),
    ]
    assert f"1 of 3 clips of the split train, which {table} does not name" in unwanted


def test_training_begins_anywhere_and_the_rest_where_the_table_says(tmp_path):
    table = write(tmp_path / "starts.csv", "file,start_sec\na_0_10000,3\nf_0_10000,4.64\nd_0_10000,0.1\n")
    clips, *_ = corpus.vggsound(**small(tmp_path), fixed_start_pts_file=table, duration=2.56)
    assert {clip.id[0]: clip.start for clip in clips if clip.start} == {"f": 4.64, "d": 0.1}
    assert {clip.id[0]: clip.duration for clip in clips}["f"] == 5.36
    longer, *_ = corpus.vggsound(**small(tmp_path), fixed_start_pts_file=table, duration=5.13)
    assert {clip.start for clip in longer} == {0.0}


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """A video of a second with sound."""
    path = tmp_path_factory.mktemp("second") / "second.mp4"
    write_video(path, torch.randint(0, 255, (10, 3, 32, 32), dtype=torch.uint8), 10, 0.1 * torch.randn(1, 8000), 8000)
    return path


def test_names_that_state_no_length_are_measured(tmp_path, second):
    write(tmp_path / "lists" / "mine_train.txt", "one\ntwo_parts\nbroken\nshort_0_500\n")
    folder = Path(folder_of(tmp_path / "videos", "broken.mp4", "short_0_500.mp4"))
    for name in ("one", "two_parts"):
        (folder / f"{name}.mp4").symlink_to(second)
    clips, left_out, _ = corpus.vggsound(data_dir=str(folder), split_dir=str(tmp_path / "lists"), duration=0.8)
    assert {clip.id: clip.duration for clip in clips} == pytest.approx({"one": 1.0, "two_parts": 1.0}, abs=0.06)
    assert len(left_out) == 2
    assert "broken.mp4" in left_out[0]
    assert "short_0_500.mp4 lasts 0.50 s, shorter than the 0.8 s" in left_out[1]


def test_audioset_lines_name_subfolders(tmp_path):
    write(tmp_path / "lists" / "audioset_test.txt", "eval_segments/b_1000_11000\neval_segments/a_30000_40000\n")
    write(tmp_path / "lists" / "audioset_train.txt", "balanced_train_segments/c_0_10000\n")
    write(tmp_path / "lists" / "audioset_predict.txt", "balanced_train_segments/c_0_10000\n")
    folder = folder_of(
        *(tmp_path / "videos", "eval_segments/a_30000_40000.mp4", "eval_segments/b_1000_11000.mp4"),
        "balanced_train_segments/c_0_10000.mp4",
    )
    segments = write(
        tmp_path / "eval.csv",
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# YTID, start_seconds, end_seconds, positive_labels\n"
        'a, 30.000, 40.000, "/m/09x0r,/t/dd00088"\nb, 1.000, 11.000, "/m/09x0r"\n',
    )
    labels = write(tmp_path / "labels.csv", 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/t/dd00088,"Dog, far away"\n')
    given = {"data_dir": folder, "split_dir": str(tmp_path / "lists"), "duration": 2.56}
    clips, left_out, _ = corpus.audioset(**given, meta_file=segments, labels_file=labels)
    assert left_out == []
    assert [(clip.id, clip.split, clip.start, clip.duration) for clip in clips] == [
        ("c_0_10000", "train", 0.0, 10.0),
        ("a_30000_40000", "test", 6.66, 3.34),
        ("b_1000_11000", "test", 6.66, 3.34),
    ]
    assert clips[0].facts == {"predict": True}
    assert clips[1].facts == {"labels": ["Speech", "Dog, far away"]}
    assert clips[1].video == tmp_path / "videos" / "eval_segments" / "a_30000_40000.mp4"
    excluded = write(tmp_path / "bad.txt", "eval_segments/a_30000_40000\n")
    starts = write(tmp_path / "starts.csv", "file,start_sec\nb_1000_11000,0.5\n")
    clips, *_ = corpus.audioset(**given, excluded_files=excluded, fixed_start_pts_file=starts, splits=("test",))
    assert [(clip.id, clip.start) for clip in clips] == [("b_1000_11000", 0.5)]
    with pytest.raises(InputError, match=r"labels\.csv.*give meta_file"):
        corpus.audioset(**given, labels_file=labels)


def test_greatest_hits_files_that_the_table_does_not_know_are_taken_whole(tmp_path, second):
    for split, text in (("train", "r-1\nr-2\n"), ("validation", "r-11\n"), ("predict", "r-1_denoised_35\nr-9_denoised_1\n")):
        write(tmp_path / "lists" / f"greatesthit_{split}.txt", text)
    head = "filename,start_time,occurring_time,end_time,material,action_type,effect\n"
    table = write(
        tmp_path / "hits.csv",
        head + "r-1_denoised_35.mp4,0.4,1.4,2.4,wood,hit,static\nr-1_denoised_90.mp4,2.6,3.6,4.6,None,scratch,None\n",
    )
    folder = Path(folder_of(tmp_path / "videos", "r-1_denoised_35.mp4", "r-1_denoised.mp4", "r-3_denoised.mp4"))
    for name in ("r-2_denoised", "r-11_denoised_7"):
        (folder / f"{name}.mp4").symlink_to(second)
    clips, left_out, _ = corpus.greatesthit(data_dir=str(folder), split_dir=str(tmp_path / "lists"), meta_file=table)
    found = [(clip.id, clip.video.name, clip.split, clip.start, round(clip.duration, 1)) for clip in clips]
    assert found == [
        ("r-1_denoised_90", "r-1_denoised.mp4", "train", 2.6, 2.0),
        ("r-1_denoised_35", "r-1_denoised_35.mp4", "train", 0.0, 2.0),
        ("r-2_denoised", "r-2_denoised.mp4", "train", 0.0, 1.0),
        ("r-11_denoised_7", "r-11_denoised_7.mp4", "val", 0.0, 1.0),
    ]
    assert clips[0].facts == {"hit": pytest.approx(1.0), "action_type": "scratch"}
    assert clips[1].facts == {
        **{"hit": pytest.approx(1.0), "material": "wood", "action_type": "hit", "effect": "static", "predict": True}
    }
    assert left_out == [f"there is no video {folder / 'r-9_denoised_1'}.mp4"]


# --- VAS and the demo ---


def described(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"video_fps": 25.0, "audio_fps": 44100} | line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_lists_of_measured_files(tmp_path, name):
    there = folder_of(tmp_path / "videos", "a.mp4", "b.mp4", "c.mp4")
    described(
        tmp_path / "meta" / "test" / name,
        {"filepath": f"{there}/b.mp4", "duration": 7.5, "description": "a dog", "material": None},
        {"filepath": f"{there}/a.mp4", "duration": 10.01, "effect": "splash"},
        {"filepath": f"{there}/gone.mp4", "duration": 10},
        {"filepath": f"{there}/c.mp4", "duration": 2.0},
    )
    starts = write(tmp_path / "starts.csv", "filename,start\nb,1.25\n")
    clips, left_out, _ = corpus.jsonl(path_to_metadata=str(tmp_path / "meta"), gen_videos_filepath=starts, duration=2.56)
    assert [(clip.id, clip.split, clip.start, clip.duration) for clip in clips] == [
        ("a", "test", 0.0, 10.01),
        ("b", "test", 1.25, 6.25),
    ]
    assert [clip.facts for clip in clips] == [{"effect": "splash"}, {"description": "a dog"}]
    assert len(left_out) == 2
    assert "gone.mp4" in left_out[0]
    assert "c.mp4 lasts 2.00 s, shorter" in left_out[1]


def test_files_are_found_where_they_went(tmp_path, monkeypatch):
    meta = tmp_path / "meta"
    folder_of(meta, "demo.mp4", "test/beside.mp4")
    folder_of(tmp_path / "videos", "dog/one.mp4", "cat/one.mp4", "flat.mp4")
    folder_of(tmp_path / "here", "sub/working.mp4")
    listed = ["/nowhere/vas/dog/one.mp4", "/nowhere/vas/cat/one.mp4", "/nowhere/flat.mp4", "data/demo/demo.mp4", "beside.mp4"]
    described(meta / "test" / "data.jsonl", *({"filepath": path, "duration": 5} for path in [*listed, "sub/working.mp4"]))
    monkeypatch.chdir(tmp_path / "here")
    clips, left_out, _ = corpus.jsonl(path_to_metadata=str(meta), data_dir=str(tmp_path / "videos"))
    assert left_out == []
    assert {clip.id: clip.video for clip in clips} == {
        "dog/one": tmp_path / "videos" / "dog" / "one.mp4",
        "cat/one": tmp_path / "videos" / "cat" / "one.mp4",
        "flat": tmp_path / "videos" / "flat.mp4",
        "demo": meta / "demo.mp4",
        "beside": meta / "test" / "beside.mp4",
        "working": Path("sub/working.mp4"),
    }


def test_the_original_words_for_a_split_and_the_house_s_both_serve(tmp_path):
    there = folder_of(tmp_path / "videos", "a.mp4")
    described(tmp_path / "meta" / "validation" / "data.jsonl", {"filepath": f"{there}/a.mp4", "duration": 3})
    assert counted(corpus.jsonl(path_to_metadata=str(tmp_path / "meta"))[0]) == {"val": 1}
    with pytest.raises(InputError, match=r"no list of the split test.*test/data\.jsonl"):
        corpus.jsonl(path_to_metadata=str(tmp_path / "meta"), splits=("test",))


def asked(reader, **given) -> list[set[tuple[str, str, Path]]]:
    """What is found for all splits at once, and for one after the other."""
    together, *_ = reader(**given)
    apart = [clip for split in WORDS for clip in reader(**given, splits=(split,))[0]]
    return [{(clip.split, clip.id, clip.video) for clip in clips} for clips in (together, apart)]


def test_files_of_one_name_are_all_kept_whatever_list_they_stand_in(tmp_path):
    names = {"train": ["dog/v1.mp4", "a/x/v2.mp4", "b/x/v2.mp4", "w.mp4", "w.mov"], "test": ["cat/v1.mp4", "x/v2.mp4"]}
    videos = folder_of(tmp_path / "videos", *itertools.chain(*names.values()))
    for split, listed in names.items():
        described(tmp_path / "meta" / split / "data.jsonl", *({"filepath": name, "duration": 5} for name in listed))
    described(tmp_path / "meta" / "predict" / "data.jsonl", {"filepath": "cat/v1.mp4", "duration": 5})
    given = {"path_to_metadata": str(tmp_path / "meta"), "data_dir": videos}
    clips, left_out, _ = corpus.jsonl(**given)
    assert left_out == []
    assert {clip.id: (clip.split, clip.video.relative_to(videos).as_posix()) for clip in clips} == {
        **{"dog/v1": ("train", "dog/v1.mp4"), "a/x/v2": ("train", "a/x/v2.mp4"), "b/x/v2": ("train", "b/x/v2.mp4")},
        **{"w.mp4": ("train", "w.mp4"), "w.mov": ("train", "w.mov")},
        **{"cat/v1": ("test", "cat/v1.mp4"), "x/v2": ("test", "x/v2.mp4")},
    }
    assert [clip.id for clip in in_split(clips, "predict")] == ["cat/v1"]
    (tmp_path / "meta" / "predict" / "data.jsonl").unlink()
    (tmp_path / "meta" / "validation").mkdir()
    (tmp_path / "meta" / "validation" / "data.jsonl").touch()
    described(tmp_path / "meta" / "predict" / "data.jsonl")
    together, apart = asked(corpus.jsonl, **given)
    assert len(together) == 7
    assert together == apart


def test_what_several_lists_hold_is_never_trained_on_and_told(tmp_path):
    given = small(tmp_path, train="a b c d", validation="c d e", test="d a f", predict="a b j")
    clips, left_out, _ = corpus.vggsound(**given)
    assert [letters(clips, split) for split in WORDS] == ["b", "ce", "adf", "baj"]
    videos = tmp_path / "videos"
    assert sorted(left_out) == [
        f"{videos / 'a_0_10000.mp4'} stands in the lists train and test, and is of the split test",
        f"{videos / 'c_0_10000.mp4'} stands in the lists train and val, and is of the split val",
        f"{videos / 'd_0_10000.mp4'} stands in the lists train and test, and is of the split test",
        f"{videos / 'd_0_10000.mp4'} stands in the lists val and test, and is of the split test",
    ]
    for split, own, told in (("train", "b", 3), ("val", "ce", 1), ("test", "adf", 0), ("predict", "abj", 0)):
        clips, left_out, _ = corpus.vggsound(**given, splits=(split,))
        assert (letters(clips, split), len(left_out)) == (own, told)


def test_two_files_of_one_id_are_told(tmp_path):
    write(tmp_path / "lists" / "x_train.txt", "one/a_0_10000\ntwo/a_0_10000\none/b_0_10000\n")
    write(tmp_path / "lists" / "x_predict.txt", "two/b_0_10000\n")
    folder = folder_of(tmp_path / "videos", *(f"{n}/{letter}_0_10000.mp4" for n in ("one", "two") for letter in "ab"))
    clips, left_out, _ = corpus.audioset(data_dir=folder, split_dir=str(tmp_path / "lists"))
    assert [clip.video.parent.name for clip in clips] == ["one", "one"]
    assert left_out == [
        f"{folder}/two/{letter}_0_10000.mp4 has the id {letter}_0_10000, as {folder}/one/{letter}_0_10000.mp4 has; "
        "give one of the files another name"
        for letter in "ab"
    ]


def test_a_list_may_begin_with_a_mark_and_hold_other_ends_of_lines(tmp_path):
    folder_of(tmp_path / "meta" / "test", "a.mp4")
    line = json.dumps({"filepath": "a.mp4", "duration": 5, "description": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "meta" / "test" / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    (clip,) = corpus.jsonl(path_to_metadata=str(tmp_path / "meta")).clips
    assert clip.facts == {"description": "one\u2028two"}


@pytest.mark.parametrize("above", ["", "\n", "# written by hand\n", "  \n\n# one\n# two\n"])
@pytest.mark.parametrize("header", ["file,start_sec\n", ""])
def test_a_header_is_the_first_row_that_is_one(tmp_path, above, header):
    table = write(tmp_path / "starts.csv", f"{above}{header}a_0_10000,1.5\nb_0_10000,2\n")
    clips, *_ = corpus.fixed_starts(data_dir=small(tmp_path)["data_dir"], fixed_start_pts_file=table)
    assert [(clip.id[0], clip.start) for clip in clips] == [("a", 1.5), ("b", 2.0)]
    if header:
        clips, *_ = corpus.vggsound(**small(tmp_path), included_files=table)
        assert letters(clips, "train") == "ab"


def test_a_clip_that_would_begin_behind_its_end_is_left_out_without_a_duration_too(tmp_path):
    table = write(tmp_path / "starts.csv", "file,start_sec\na_0_10000,10\nb_0_10000,12.5\nc_0_10000,9\n")
    clips, left_out, _ = corpus.fixed_starts(data_dir=small(tmp_path)["data_dir"], fixed_start_pts_file=table)
    assert [clip.id[0] for clip in clips] == ["c"]
    assert [told.partition(".mp4 ")[2] for told in left_out] == [
        "lasts 10.00 s, and the clip would begin at 10 s",
        "lasts 10.00 s, and the clip would begin at 12.5 s",
    ]


# --- what is wrong is told in a sentence ---

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:cf16\nsize 858\n"


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"data_dir": None}, "data_dir=FOLDER"),
        ({"data_dir": "/nowhere"}, "/nowhere does not exist"),
        ({"split_dir": "/nowhere"}, "no folder /nowhere of split lists"),
        ({"meta_file": "/nowhere.csv"}, r"no file /nowhere\.csv"),
        ({"meta_file": "id,start,desc\na,ten,dog\n"}, r"bad\.txt, line 2: not a row of filename,start,desc,split"),
        ({"fixed_start_pts_file": "file,start_sec\na_0_10000,-1\n"}, r"bad\.txt, line 2: .*begins at 0 s or later"),
        ({"fixed_start_pts_file": "file,start_sec\na_0_10000\n"}, r"bad\.txt, line 2"),
        ({"scores_file": "[1, 2]"}, r"bad\.txt is no JSON"),
        ({"scores_file": '{"a": "high"}'}, r"bad\.txt is no JSON"),
        ({"scores_file": POINTER}, "git lfs pull"),
        ({"insync_file": "a,0,0,yes,no\n"}, r"bad\.txt, line 1: not a row of id,offset"),
        ({"excluded_files": "/nowhere.txt"}, r"no file /nowhere\.txt"),
    ],
)
def test_a_file_that_does_not_fit_is_told(tmp_path, change, about):
    key, value = next(iter(change.items()))
    if value is not None and not value.startswith("/"):
        value = write(tmp_path / "bad.txt", value)
    with pytest.raises(InputError, match=about) as told:
        corpus.vggsound(**{**small(tmp_path), key: value})
    assert "\n" not in str(told.value)


def test_two_lists_of_one_split_are_told(tmp_path):
    given = small(tmp_path)
    write(tmp_path / "lists" / "y_train.txt", "a_0_10000\n")
    with pytest.raises(InputError, match=r"x_train\.txt and .*y_train\.txt both list the split train"):
        corpus.vggsound(**given)


@pytest.mark.parametrize(
    ("line", "about"),
    [
        ("{", "line 1"),
        ('{"filepath": "a.mp4"}', "duration"),
        ('{"filepath": 3, "duration": 1}', "line 1"),
        ('{"filepath": "", "duration": 1}', "line 1"),
    ],
)
def test_a_line_of_a_list_that_does_not_fit_is_told(tmp_path, line, about):
    write(tmp_path / "meta" / "test" / "data.jsonl", line)
    with pytest.raises(InputError, match=about):
        corpus.jsonl(path_to_metadata=str(tmp_path / "meta"))


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / "meta" / "test").mkdir(parents=True)
    (tmp_path / "meta" / "test" / "data.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match=r"data\.jsonl\.gz cannot be read as text"):
        corpus.jsonl(path_to_metadata=str(tmp_path / "meta"))


def test_every_reader_can_be_given_its_files_first_and_the_run_s_things_later(tmp_path):
    given = small(tmp_path)
    reader: corpus.Reader = functools.partial(corpus.vggsound, split_dir=given["split_dir"])
    assert letters(reader(data_dir=given["data_dir"], splits=("val",), duration=2.56)[0], "val") == "de"
