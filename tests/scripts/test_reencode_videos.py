import importlib.util
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vaura.files import write_aside
from vaura.media.mux import write_video
from vaura.media.reencode import Settings
from vaura.media.video import probe

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "reencode_videos.py"
QUICK = ["--size=32", "--preset=ultrafast"]
RATE = 16000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reencode_videos", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def video(path: Path, seconds: float = 0.4, sound: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = torch.randint(0, 255, (round(seconds * 30), 3, 48, 64), dtype=torch.uint8)
    write_video(path, frames, 30, 0.1 * torch.randn(2, round(seconds * RATE)) if sound else None, RATE)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Videos in a tree, one of them silent, and two files that are none."""
    whole = video(tmp_path / "old" / "one.mp4")
    video(tmp_path / "old" / "deep" / "er" / "two words.mp4")
    video(tmp_path / "old" / "silent.mp4", sound=False)
    (tmp_path / "old" / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "old" / "text.mp4").write_text("no video")
    (tmp_path / "old" / "notes.txt").write_text("not touched")
    return tmp_path / "old"


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def start(*words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_folder_becomes_the_same_folder_and_what_failed_is_listed_with_the_reason(script, folder, tmp_path, capsys):
    assert script.main([str(folder), str(tmp_path / "new"), *QUICK, "--workers=1"]) == 1
    made = ["deep/er/two words.mp4", "failed.txt", "one.mp4", "settings.json", "silent.mp4", "without_sound.txt"]
    assert tree(tmp_path / "new") == made
    after = probe(tmp_path / "new" / "deep" / "er" / "two words.mp4")
    assert (after.fps, after.width, after.height, after.sample_rate, after.channels) == (25, 42, 32, 44100, 1)
    failed = (tmp_path / "new" / "failed.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in failed] == ["cut.mp4", "text.mp4"]
    assert "cut short" in failed[0] or "damaged" in failed[0]  # as the cut falls
    assert "is not a video" in failed[1]
    assert (tmp_path / "new" / "without_sound.txt").read_text() == "silent.mp4\n"
    told = capsys.readouterr()
    assert "3 videos are in" in told.out
    assert "without sound, as their sources: 1" in told.out
    assert "failed: 2" in told.err


def test_what_is_finished_stays_and_what_failed_is_tried_again(script, folder, tmp_path, capsys):
    words = [str(folder), str(tmp_path / "new"), *QUICK, "--workers=1"]
    script.main(words)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*.mp4")}
    for name in ("cut", "text"):
        (folder / f"{name}.mp4").unlink()
        video(folder / f"{name}.mp4")
    capsys.readouterr()
    assert script.main(words) == 0
    assert "3 of 5 are finished already" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert len(list((tmp_path / "new").rglob("*.mp4"))) == 5
    assert not (tmp_path / "new" / "failed.txt").exists()
    assert (tmp_path / "new" / "without_sound.txt").read_text() == "silent.mp4\n"


def test_a_folder_made_with_other_numbers_is_refused(script, folder, tmp_path, capsys):
    script.main([str(folder), str(tmp_path / "new"), *QUICK, "--workers=1"])
    assert script.main([str(folder), str(tmp_path / "new"), "--preset=ultrafast", "--size=48"]) == 2
    assert "was made with --size 32; give the same to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["{old}", "{old}/new"], "lies in"),
        (["{old}", "{old}"], "lies in"),
        (["{old}/nowhere", "{new}"], "does not exist"),
        (["{old}", "{new}", "--workers=0"], "workers=0"),
        (["{old}", "{new}", "--crf=99"], "crf=99"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(script, folder, tmp_path, capsys, words, about):
    places = {"old": str(folder), "new": str(tmp_path / "new")}
    assert script.main([word.format(**places) for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert about in told
    assert not (tmp_path / "new").exists()


def test_help_tells_every_number_and_what_it_is_unless_given(script, capsys):
    with pytest.raises(SystemExit) as done:
        script.main(["--help"])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option, value in [("fps", 25.0), ("size", 256), ("crf", 10), ("sample-rate", 44100), ("channels", 1)]:
        assert f"--{option} " in shown
        assert f"(default: {value})" in shown


@pytest.mark.parametrize("first", ["one.mov", "one.mp4"])
def test_videos_that_differ_in_their_suffix_alone_keep_it_whichever_came_first(script, tmp_path, capsys, first):
    old, new = tmp_path / "old", tmp_path / "new"
    words = [str(old), str(new), *QUICK, "--workers=1"]
    lengths = {"one.mov": 0.4, "one.mp4": 0.8}
    for name in sorted(lengths, key=lambda name: name != first):
        video(old / "other.mp4", lengths[name]).rename(old / name)
        assert script.main(words) == 0
    told = capsys.readouterr().err
    assert "keep it in their new names: one.*" in told
    assert f"{new / 'one.mp4'} was made when only one of them was there" in told
    made = {name: probe(new / f"{name}.mp4").duration for name in lengths}
    assert made == pytest.approx(lengths, abs=0.05)
    (new / "one.mp4").unlink()
    assert script.main(words) == 0
    assert "remove it" not in capsys.readouterr().err
    assert sorted(path.name for path in new.glob("*.mp4")) == ["one.mov.mp4", "one.mp4.mp4"]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_failure_with_a_name_that_is_no_utf_8_is_listed(script, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / os.fsdecode(b"caf\xe9.mp4")).write_text("no video")
    assert script.main([str(tmp_path / "old"), str(tmp_path / "new"), *QUICK, "--workers=1"]) == 1
    assert (tmp_path / "new" / "failed.txt").read_text(encoding="utf-8").startswith(r"caf\udce9.mp4: ")


def test_a_defect_is_told_with_its_kind_and_does_not_end_the_others(script, folder, tmp_path, monkeypatch):
    real = script.reencode
    monkeypatch.setattr(script, "reencode", lambda source, *rest: 1 / 0 if source.stem == "one" else real(source, *rest))
    assert script.main([str(folder), str(tmp_path / "new"), *QUICK, "--workers=1"]) == 1
    failed = (tmp_path / "new" / "failed.txt").read_text()
    assert "one.mp4: " in failed
    assert "ZeroDivisionError" in failed
    assert (tmp_path / "new" / "silent.mp4").exists()


def test_a_video_that_kills_its_worker_is_found_out_and_no_other_is_lost(script, tmp_path, monkeypatch):
    jobs = [script.Job(Path(f"{n}.mp4"), tmp_path / f"{n}.mp4") for n in range(7)]

    def together(waiting, in_hand, settings, workers):
        while waiting or in_hand:
            while waiting and len(in_hand) < workers:
                in_hand[object()] = waiting.popleft()
            if any(job.source.stem == "3" for job in in_hand.values()):
                raise BrokenProcessPool
            key = next(iter(in_hand))
            yield in_hand.pop(key), script.Outcome("")

    monkeypatch.setattr(script, "_attempt_together", together)
    outcomes = dict(script.attempt_all(jobs, Settings(), 3))
    assert set(outcomes) == set(jobs)
    assert [job.source.stem for job, outcome in outcomes.items() if outcome.reason] == ["3"]
    assert "ended the process" in outcomes[jobs[3]].reason


def test_what_a_killed_run_left_behind_is_cleared_and_what_is_being_written_is_not(script, tmp_path):
    target, others = tmp_path / "a[1].mp4", [".a[1].b.mp4", ".a1.77-0123abcd.mp4", "a[1].77-0123abcd.mp4"]
    with write_aside(target) as abandoned:  # what a kill leaves is what is there now
        abandoned.touch()
    target.unlink()
    for name in (abandoned.name, *others):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - 100))
    with write_aside(target) as aside:
        aside.touch()
        script.clear_abandoned(target)
        assert tree(tmp_path) == sorted([aside.name, *others])


def test_several_at_once_from_a_shell(folder, tmp_path):
    running = start(folder, tmp_path / "new", *QUICK, "--workers=2")
    out, err = running.communicate(timeout=120)
    assert running.returncode == 1, err
    assert len(list((tmp_path / "new").rglob("*.mp4"))) == 3
    assert "3 videos are in" in out
    assert "re-encode: 5/5" in err


@pytest.fixture
def many(tmp_path) -> Path:
    """Twelve videos, each of which takes a while."""
    first = video(tmp_path / "old" / "00.mp4", seconds=8)
    for n in range(1, 12):
        (tmp_path / "old" / f"{n:02d}.mp4").symlink_to(first)
    return tmp_path / "old"


def test_ctrl_c_ends_it_at_once_and_cleanly_and_the_same_command_goes_on(many, tmp_path):
    new = tmp_path / "new"
    words = (many, new, "--size=32", "--preset=fast", "--workers=2")
    running = start(*words)
    wait_for(lambda: len(list(new.glob("[!.]*.mp4"))) >= 2)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"interrupted; the same command goes on in {new}"
    finished = {path: path.stat().st_mtime_ns for path in new.glob("*.mp4")}
    assert 2 <= len(finished) < 12
    assert all(not path.name.startswith(".") for path in finished)
    assert not (new / "failed.txt").exists()
    running = start(*words)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert f"{len(finished)} of 12 are finished already" in out
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    assert all(probe(path).duration == pytest.approx(8.0) for path in new.glob("*.mp4"))
    assert len(list(new.glob("*.mp4"))) == 12


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(rest.split()[1]) == pid and b"spawn_main" in command:
            found.append(int(name.split()[0]))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to find the workers in")
def test_nothing_is_half_done_after_a_kill_and_no_worker_outlives_it(many, tmp_path):
    new = tmp_path / "new"
    words = (many, new, "--size=32", "--preset=fast", "--workers=2")
    running = start(*words)
    wait_for(lambda: len(list(new.glob("[!.]*.mp4"))) >= 1)
    workers = children(running.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)  # one worker: its video is done by another
    wait_for(lambda: len(list(new.glob("[!.]*.mp4"))) >= 4)
    assert running.poll() is None
    workers = children(running.pid)
    running.kill()
    running.communicate()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 20)
    finished = list(new.glob("[!.]*.mp4"))
    assert len(finished) < 12
    assert all(probe(path).duration == pytest.approx(8.0) for path in finished)
