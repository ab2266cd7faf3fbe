import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vaura.data.manifest import read_manifest
from vaura.media.mux import write_video

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "make_manifest.py"
SHARED = Path(os.environ.get("VAURA_SHARED", REPOSITORY.parent / "shared"))
REAL, VIDEOS = SHARED / "media" / "vaura" / "data", SHARED / "media" / "specvqgan" / "vggsound" / "video"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no files of V-AURA: the folder `shared` is not beside the repository")


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def corpus(tmp_path) -> dict[str, str]:
    """Four clips in two splits, of which one is missing and one is no video."""
    folder, lists = tmp_path / "videos", tmp_path / "lists"
    folder.mkdir()
    lists.mkdir()
    frames = torch.randint(0, 255, (10, 3, 32, 32), dtype=torch.uint8)
    for name in ("a_0_1000", "b_0_1000"):
        write_video(folder / f"{name}.mp4", frames, 10, 0.1 * torch.randn(1, 8000), 8000)
    (folder / "c_0_1000.mp4").write_text("no video")
    (lists / "x_train.txt").write_text("b_0_1000\na_0_1000\nd_0_1000\n")
    (lists / "x_validation.txt").write_text("c_0_1000\n")
    (lists / "x_predict.txt").write_text("a_0_1000\n")
    return {"data_dir": str(folder), "split_dir": str(lists), "output": str(tmp_path / "out" / "x.jsonl")}


def words(options: dict[str, str], style: str = "--{}={}") -> list[str]:
    return [style.format(key.replace("_", "-") if style.startswith("--") else key, value) for key, value in options.items()]


def test_a_manifest_counts_per_split_and_what_was_left_out(main, corpus, capsys):
    assert main(["vggsound", *words(corpus)]) == 0
    output = Path(corpus["output"])
    assert [(clip.id, clip.split, clip.facts) for clip in read_manifest(output)] == [
        ("a_0_1000", "train", {"predict": True}),
        ("b_0_1000", "train", {}),
        ("c_0_1000", "val", {}),
    ]
    told = capsys.readouterr().out
    assert [line.split() for line in told.splitlines()[:5]] == [
        *(["train", "2"], ["val", "1"], ["test", "0"], ["predict", "0"]),
        ["also", "listed", "under", "predict:", "1"],
    ]
    reasons = output.with_suffix(".left_out.txt")
    assert f"left out: 1, see {reasons}" in told
    assert reasons.read_text() == f"there is no video {corpus['data_dir']}/d_0_1000.mp4\n"


def test_opening_every_video_finds_what_is_broken(main, corpus, capsys):
    assert main(["vggsound", *words(corpus), "--verify", "2"]) == 0
    clips = read_manifest(corpus["output"])
    assert [clip.id for clip in clips] == ["a_0_1000", "b_0_1000"]
    assert all(0.9 < clip.duration <= 1.0 for clip in clips)
    reasons = Path(corpus["output"]).with_suffix(".left_out.txt").read_text().splitlines()
    assert len(reasons) == 2
    assert "c_0_1000.mp4 is not a video" in reasons[1]
    assert "left out: 2" in capsys.readouterr().out


def test_the_spelling_of_the_other_commands_works_too(main, corpus):
    assert main(["vggsound", *words(corpus, "{}={}"), "--splits", "train"]) == 0
    assert {clip.split for clip in read_manifest(corpus["output"])} == {"train"}


def test_switches_and_lists_are_spelt_that_way_too(main, corpus, tmp_path):
    write_video(tmp_path / "videos" / "silent.mp4", torch.zeros(10, 3, 32, 32, dtype=torch.uint8), 10)
    given = ["folder", f"data_dir={corpus['data_dir']}", f"output={tmp_path / 'mine.jsonl'}"]
    ids = {}
    for words_ in ((), ("needs_sound=true",), ("needs_sound=false",), ("needs_sound=False", "verify=1", "keep_silent=true")):
        assert main([*given, *words_]) == 0
        ids[words_] = sorted(clip.id for clip in read_manifest(tmp_path / "mine.jsonl"))
    assert list(ids.values()) == [*[["a_0_1000", "b_0_1000"]] * 2, *[["a_0_1000", "b_0_1000", "silent"]] * 2]
    assert main([*given, "needs_sound=false", "verify=1", "keep_silent=false"]) == 0
    assert len(read_manifest(tmp_path / "mine.jsonl")) == 2
    for spelt in ("splits=train,val", "splits=[train, val]"):
        assert main(["vggsound", *words(corpus, "{}={}"), spelt]) == 0
        assert {clip.split for clip in read_manifest(corpus["output"])} == {"train", "val"}
    for wrong in ("needs_sound=perhaps", "splits=train,dev"):
        with pytest.raises(SystemExit):
            main([*given, wrong])


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_utf_8_is_told_and_written(main, corpus, tmp_path):
    whole = tmp_path / "videos" / "a_0_1000.mp4"
    os.link(whole, tmp_path / "videos" / os.fsdecode(b"caf\xe9.mp4"))
    (tmp_path / "videos" / os.fsdecode(b"no\nvideo \xe9.mp4")).write_text("no video")
    output = tmp_path / "mine.jsonl"
    assert main(["folder", f"data_dir={corpus['data_dir']}", f"output={output}", "val_share=0"]) == 0
    assert os.fsdecode(b"caf\xe9") in {clip.id for clip in read_manifest(output)}
    told = output.with_suffix(".left_out.txt").read_text(encoding="utf-8").splitlines()
    assert len(told) == 2
    assert r"no video \udce9.mp4 is not a video" in told[1]


def test_rules_are_told_and_a_run_without_losses_clears_the_old_list(main, corpus, tmp_path, capsys):
    (tmp_path / "bad.txt").write_text("d_0_1000\n")
    main(["vggsound", *words(corpus)])
    assert main(["vggsound", *words(corpus), f"--excluded-files={tmp_path / 'bad.txt'}"]) == 0
    told = capsys.readouterr().out
    assert f"not wanted: 1 of 3 clips of the split train, which {tmp_path / 'bad.txt'} excludes" in told
    assert "nothing was left out" in told
    reasons = Path(corpus["output"]).with_suffix(".left_out.txt")
    assert reasons.read_text().startswith("1 of 3 clips")
    (Path(corpus["split_dir"]) / "x_train.txt").write_text("a_0_1000\n")
    assert main(["vggsound", *words(corpus)]) == 0
    assert not reasons.exists()


def test_a_plain_folder(main, corpus, tmp_path):
    output = tmp_path / "mine.jsonl"
    given = ["folder", "--data-dir", corpus["data_dir"], "--output", str(output), "--val-share", "0.5"]
    assert main(given) == 0
    assert {clip.split for clip in read_manifest(output)} == {"train", "val"}
    assert "c_0_1000.mp4 is not a video" in output.with_suffix(".left_out.txt").read_text()
    assert main([*given, "--duration", "5"]) == 2


def test_lists_of_measured_files_and_test_sets(main, corpus, tmp_path):
    described = tmp_path / "meta" / "test" / "data.jsonl"
    described.parent.mkdir(parents=True)
    described.write_text(json.dumps({"filepath": f"{corpus['data_dir']}/a_0_1000.mp4", "duration": 1.0}))
    assert main(["vas", f"--path-to-metadata={tmp_path / 'meta'}", f"--output={corpus['output']}"]) == 0
    assert [(clip.id, clip.split) for clip in read_manifest(corpus["output"])] == [("a_0_1000", "test")]
    (tmp_path / "sparse.csv").write_text("file,start_sec\nb_0_1000,0.25\n")
    given = [f"--data-dir={corpus['data_dir']}", f"--fixed-start-pts-file={tmp_path / 'sparse.csv'}"]
    assert main(["vggsound_sparse", *given, f"--output={corpus['output']}"]) == 0
    (clip,) = read_manifest(corpus["output"])
    assert (clip.id, clip.start, clip.duration, clip.split) == ("b_0_1000", 0.25, 0.75, "test")


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"data_dir": "/nowhere"}, "error: the folder of videos /nowhere does not exist; check data_dir\n"),
        ({"split_dir": "/nowhere"}, "error: there is no folder /nowhere of split lists; check split_dir\n"),
        ({"meta_file": "/nowhere.csv"}, "error: there is no file /nowhere.csv"),
        ({"duration": "30"}, "error: no clip can be used, so there is no manifest; left out: 4, see "),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(main, corpus, capsys, change, about):
    assert main(["vggsound", *words(corpus | change)]) == 2
    assert capsys.readouterr().err.startswith(about)
    assert not Path(corpus["output"]).exists()


@pytest.mark.parametrize(
    "wrong", [[], ["vgsound"], ["vggsound"], ["vggsound", "--no-such-option=1"], ["folder", "--output=x", "--workers=two"]]
)
def test_a_wrong_command_line_is_refused(main, capsys, wrong):
    with pytest.raises(SystemExit) as refused:
        main(wrong)
    assert refused.value.code == 2
    assert "usage: make_manifest.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vggsound", "vggsound_sparse", "greatesthit", "audioset", "vas", "folder"])
def test_help_tells_every_option(main, capsys, name):
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "--output FILE.jsonl" in shown
    assert "--data-dir" in shown


@real
def test_from_a_shell_with_v_auras_own_files(tmp_path):
    output = tmp_path / "vgg.jsonl"
    options = {"data_dir": VIDEOS, "split_dir": REAL / "splits" / "vggsound", "output": output, "verify": 2}
    options |= dict.fromkeys(("included_files", "fixed_start_pts_file"), REAL / "test_sets" / "vggsound_test.csv")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "vggsound", *words(options)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    clips = read_manifest(output)
    assert sorted(clip.id for clip in clips) == sorted(path.stem for path in VIDEOS.glob("*.mp4"))
    assert {clip.split for clip in clips} == {"test"}
    assert {clip.id: clip.start for clip in clips}["-1pRmoJIGQc_10000_20000"] == 1.49
    assert all(clip.start + clip.duration == pytest.approx(10.0, abs=0.05) for clip in clips)
    assert "test           8" in done.stdout
