import os
import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf

import vaura.data.sound
import vaura.generate
from vaura.data.wanted import find_clips, open_clip
from vaura.drawing import How, VideoToAudio
from vaura.encoder import lazy
from vaura.errors import InputError
from vaura.generate import new_folder, summary
from vaura.launch import run
from vaura.lm.sampling import Sampler
from vaura.media.audio import read_audio
from vaura.media.mux import replace_sound, write_video
from vaura.precision import pick_device
from vaura.timing import align

SHARED = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[2] / "shared"))
REAL = [
    path
    for folder in ("vggsound/video", "vas/videos/drum")
    for path in sorted((SHARED / "media/specvqgan" / folder).glob("*.mp4"))[:1]
]
RATE = 16_000
BITS = 12


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def model(tiny):
    return VideoToAudio(tiny.folder, device="cpu", precision="float32")


@pytest.fixture
def keen(model, tiny, monkeypatch):
    """Features whose differences are large enough to be heard by a model that learnt next to nothing."""
    look = VideoToAudio.look

    def whole(self, clip):
        return look(self, clip).whole()

    centre = whole(model, open_clip(tiny.videos[-1], 0.0, None)).mean(1, keepdim=True)
    monkeypatch.setattr(VideoToAudio, "look", lambda self, clip: 300 * (whole(self, clip) - centre))


def command(tiny, video, *more):
    asked = [f"experiment_path={tiny.folder}", f"video={video}", "device=cpu", "precision=float32"]
    return run(["config=generate", *asked, *more])


def bars(count, height=64, width=96):
    """(F, 3, H, W): frame i spells i in bars that survive a codec."""
    levels = torch.tensor([[215 if index >> bit & 1 else 40 for bit in range(BITS)] for index in range(count)])
    columns = torch.arange(width) * BITS // width
    return levels.to(torch.uint8)[:, columns][:, None, None].expand(count, 3, height, width).contiguous()


def film(path, seconds, fps=25.0, wav=None):
    """An mp4 whose frame i spells i."""
    write_video(path, bars(max(1, round(seconds * fps))), fps, wav)
    return path


def irregular(path, times):
    """An mp4 whose frame i spells i and begins at times[i] seconds; the last one lasts 40 ms."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        clock = [round(1000 * time) for time in times]
        lengths = {begin: end - begin for begin, end in zip(clock, [*clock[1:], clock[-1] + 40], strict=True)}
        for image, begin in zip(bars(len(times)), clock, strict=True):
            frame = av.VideoFrame.from_ndarray(image.permute(1, 2, 0).contiguous().numpy()).reformat(format="yuv420p")
            frame.pts, frame.time_base = begin, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.duration = lengths[packet.pts]
                file.mux(packet)
        for packet in stream.encode(None):
            packet.duration = lengths[packet.pts]
            file.mux(packet)
    return path


def on_its_side(path):
    """Turn an mp4 of one track a quarter by the display matrix in its header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def sound_of(path):
    wav, rate = soundfile.read(path)
    assert rate == RATE
    return wav


def picture_of(path):
    """Seconds at which frames begin, the numbers they spell, their size; and how long the container says it lasts."""
    with av.open(str(path)) as file:
        begins, spelled, size = [], [], (0, 0)
        for frame in file.decode(video=0):
            image = frame.to_ndarray(format="gray").mean(0)
            bright = image.reshape(BITS, -1).mean(1) > 128 if len(image) % BITS == 0 else []
            begins.append(float(frame.pts * frame.time_base))
            spelled.append(sum(1 << bit for bit, on in enumerate(bright) if on))
            size = frame.width, frame.height
        return begins, spelled, size, file.duration / av.time_base


def heard_in(path, samples):
    with av.open(str(path)) as file:
        parts = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
    return np.concatenate(parts)[:samples]


# --- what is written ---


@pytest.mark.parametrize(
    ("fps", "duration"), [(25.0, 0.1), (30.0, 1.0), (30000 / 1001, 2.555), (25.0, 3.3), (30.0, 10.24), (12.5, 0.64)]
)
def test_sound_and_picture_last_exactly_as_long_as_asked(tiny, tmp_path, fps, duration):
    video = film(tmp_path / "clip.mp4", duration + 0.3, fps)
    assert command(tiny, video, f"duration={duration}", f"out={tmp_path}/out") == 0
    wav = sound_of(tmp_path / "out/clip.wav")
    assert len(wav) == round(duration * RATE)
    begins, spelled, _, length = picture_of(tmp_path / "out/clip.mp4")
    assert abs(length - duration) < 1 / fps
    assert spelled == list(range(len(spelled)))
    assert begins == pytest.approx([index / fps for index in spelled], abs=1e-3)
    played = heard_in(tmp_path / "out/clip.mp4", len(wav))
    assert np.corrcoef(played, wav[: len(played)])[0, 1] > 0.8


def test_left_out_the_duration_is_the_videos_own(tiny, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    lengths = {
        "ntsc": 45 * 1001 / 30000,
        "pal": 1.0,
        "varied": 0.94,
        "still": 0.04,
        "turned": 0.8,
        "sounding": 0.72,
    }
    film(folder / "ntsc.mp4", 1.5015, 30000 / 1001)
    film(folder / "pal.mp4", 1.0)
    irregular(folder / "varied.mp4", [0, 0.04, 0.2, 0.23, 0.6, 0.9])
    film(folder / "still.mp4", 0.04)
    on_its_side(film(folder / "turned.mp4", 0.8))
    film(folder / "sounding.mp4", 0.72, wav=torch.rand(1, round(0.72 * RATE)) - 0.5)
    assert command(tiny, folder, f"out={tmp_path}/out") == 0
    for name, seconds in lengths.items():
        assert len(sound_of(tmp_path / f"out/{name}.wav")) == round(seconds * RATE), name
        _, _, size, length = picture_of(tmp_path / f"out/{name}.mp4")
        assert abs(length - seconds) < 0.04, name
        assert size == ((64, 96) if name == "turned" else (96, 64)), name
    begins, spelled, _, _ = picture_of(tmp_path / "out/varied.mp4")
    assert spelled == list(range(6))
    assert begins == pytest.approx([0, 0.04, 0.2, 0.23, 0.6, 0.9], abs=2e-3)


@pytest.mark.skipif(not REAL, reason="no real clips: the folder `shared` is not beside the repository")
@pytest.mark.parametrize("video", REAL, ids=lambda path: path.stem)
def test_a_real_clip(tiny, tmp_path, video):
    assert command(tiny, video, "duration=1.5", "start=2", f"out={tmp_path}/out") == 0
    assert len(sound_of(tmp_path / f"out/{video.stem}.wav")) == 24_000
    with av.open(str(tmp_path / f"out/{video.stem}.mp4")) as file, av.open(str(video)) as source:
        assert abs(file.duration / av.time_base - 1.5) < 1 / float(source.streams.video[0].average_rate)


def test_start_chooses_the_picture_and_another_sound(tiny, tmp_path):
    video = film(tmp_path / "clip.mp4", 2.0)
    assert command(tiny, video, "start=0.8", "duration=0.4", f"out={tmp_path}/late") == 0
    assert command(tiny, video, "duration=0.4", f"out={tmp_path}/early") == 0
    assert picture_of(tmp_path / "late/clip.mp4")[1] == list(range(20, 30))
    assert not np.array_equal(sound_of(tmp_path / "late/clip.wav"), sound_of(tmp_path / "early/clip.wav"))


def test_a_clips_sound_depends_on_nothing_beside_it(tiny, keen, tmp_path):
    """Not on the other clips, nor on the size of a batch; samples differ from one another and from other seeds."""
    folder = tiny.videos[0].parent
    common = ("duration=0.5", "samples_per_video=3")
    assert command(tiny, folder, *common, f"out={tmp_path}/all") == 0
    assert command(tiny, folder, *common, f"out={tmp_path}/pairs", "batch_size=2") == 0
    assert command(tiny, tiny.videos[1], *common, f"out={tmp_path}/alone", "batch_size=2") == 0
    assert command(tiny, tiny.videos[1], *common, f"out={tmp_path}/seed", "seed=1") == 0
    stem = tiny.videos[1].stem
    for number in (1, 2, 3):
        sounds = [(tmp_path / run / f"{stem}_{number}.wav").read_bytes() for run in ("all", "pairs", "alone", "seed")]
        assert sounds[0] == sounds[1] == sounds[2] != sounds[3]
    assert len({(tmp_path / f"alone/{stem}_{number}.wav").read_bytes() for number in (1, 2, 3)}) == 3
    for video in folder.glob("*.mp4"):
        assert all(
            (tmp_path / f"all/{video.stem}_{n}.wav").read_bytes() == (tmp_path / f"pairs/{video.stem}_{n}.wav").read_bytes()
            for n in (1, 2, 3)
        )


def test_videos_of_one_name_keep_their_endings(tiny, tmp_path):
    folder = tmp_path / "films"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.mp4", "a.mov", "deep/a.mp4", "b.v2.mp4"):
        film(tmp_path / "film.mp4", 0.2).rename(folder / name)
    assert command(tiny, folder, f"out={tmp_path}/out") == 0
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    names = ("a.mov", "a.mp4", "b.v2", "deep/a")
    assert written == {"config.yaml", *(f"{name}.{kind}" for name in names for kind in ("wav", "mp4"))}


def test_a_manifest_names_spans(tiny, tmp_path):
    assert command(tiny, tiny.manifest, "start=0.5", "duration=0.5", f"out={tmp_path}/out") == 0
    clip = tiny.videos[0].stem
    assert command(tiny, tiny.videos[0], "start=0.5", "duration=0.5", f"out={tmp_path}/file") == 0
    assert (tmp_path / f"out/{clip}.wav").read_bytes() == (tmp_path / f"file/{clip}.wav").read_bytes()
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4
    clips, failed = find_clips(tiny.manifest, 0.5, None)
    assert [clip.duration for clip in clips] == pytest.approx([1.42] * 4)
    assert not failed


# --- how it is drawn ---


def test_a_prompt_is_continued(tiny, model, tmp_path):
    """The sound begins with what the tokenizer keeps of the prompt; only what follows depends on the seed."""
    prompt = torch.rand(1, 8000, generator=torch.Generator().manual_seed(0)).sub(0.5)
    soundfile.write(tmp_path / "prompt.wav", prompt[0].numpy(), RATE, subtype="FLOAT")
    for seed in (0, 1):
        more = (f"prompt={tmp_path}/prompt.wav", f"seed={seed}", "duration=1.2", f"out={tmp_path}/{seed}")
        assert command(tiny, tiny.videos[0], *more) == 0
    ours, other = (sound_of(tmp_path / f"{seed}/{tiny.videos[0].stem}.wav") for seed in (0, 1))
    tokenizer = model.task.tokenizer
    kept = tokenizer.decode(tokenizer.encode(prompt[None]))[0, 0].numpy()
    sure = 8000 - 3200  # what follows reaches back through the vocoder's overlapping windows
    assert np.corrcoef(ours[:sure], kept[:sure])[0, 1] > 0.99
    assert np.corrcoef(ours[8000:], other[8000:])[0, 1] < 0.5


def test_the_picture_decides_the_sound(model, keen, tiny):
    """The same seed, name and span with another video's picture sounds otherwise; with its own it is repeated."""
    one, other = (open_clip(video, 0.0, 1.0) for video in tiny.videos[:2])
    own, again, swapped = (model.sounds([one], model.features(clip), model.how)[0].wav for clip in (one, one, other))
    assert torch.equal(own, again)
    assert not torch.equal(own, swapped)


def test_guidance_window_and_stride_reach_the_lm(model, tiny, monkeypatch):
    seen = []
    generate = type(model.task).generate
    monkeypatch.setattr(
        type(model.task), "generate", lambda task, *args, **how: seen.append(how) or generate(task, *args, **how)
    )
    plain = model.generate(tiny.videos[0], 1.2)
    one = model.generate(tiny.videos[0], 1.2, guidance=1.0)
    narrow = model.generate(tiny.videos[0], 1.2, window=0.4)
    assert [(how["guidance"].scale, how["window"], how["stride"]) for how in seen] == [
        (3, 0.64, 0.32),
        (1, 0.64, 0.32),
        (3, 0.4, 0.2),
    ]
    assert not torch.equal(plain.wav, one.wav)
    assert not torch.equal(plain.wav, narrow.wav)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guidance": -1}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"window": 0}, "window"),
        ({"window": float("inf")}, "window"),
        ({"stride": 0}, "stride"),
        ({"stride": -1}, "stride"),
        ({"stride": 2.1}, "stride"),
    ],
)
def test_how_refuses_numbers_that_say_nothing(change, said):
    with pytest.raises(InputError, match=f"^{said}="):
        How(**{"sampler": Sampler(), "guidance": 3.0, "window": 2.0, **change})
    assert How(Sampler(), 0.0, 2.0, 2.0).step == 2.0
    assert How(Sampler(), 1.0, 2.0).step == 1.0


def test_overridden_hparams_change_the_run_and_not_the_experiment(tiny, tmp_path, capsys):
    before = tiny.files()
    changes = ("overridden_hparams.data.duration=0.32", "overridden_hparams.tokenizer.vocoder.iterations=0")
    assert command(tiny, tiny.videos[0], "duration=1.0", f"out={tmp_path}/plain") == 0
    assert command(tiny, tiny.videos[0], "duration=1.0", f"out={tmp_path}/changed", *changes) == 0
    plain, changed = (sound_of(tmp_path / run / f"{tiny.videos[0].stem}.wav") for run in ("plain", "changed"))
    assert not np.array_equal(plain, changed)
    capsys.readouterr()
    assert command(tiny, tiny.videos[0], "overridden_hparams.tokenizer.vocoder.iteratons=0") == 2
    said = capsys.readouterr().err
    assert "tokenizer.vocoder.iterations" in said
    assert said.count("\n") == 1
    assert tiny.files() == before


# --- where it is written ---


def test_only_the_samples_folder_is_written(tiny, working_folder):
    before, samples = tiny.files(), tiny.folder / "samples"
    there = set(samples.glob("*"))
    assert command(tiny, tiny.videos[0], "duration=0.2") == 0
    assert command(tiny, tiny.videos[0], "duration=0.2") == 0
    assert not list(working_folder.iterdir())
    assert tiny.files() == before
    stem = tiny.videos[0].stem
    new = set(samples.glob("*")) - there
    assert len(new) == 2
    for folder in new:
        assert {path.name for path in folder.iterdir()} == {"config.yaml", f"{stem}.wav", f"{stem}.mp4"}
        assert OmegaConf.load(folder / "config.yaml").duration == 0.2


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    folders = [new_folder(tmp_path / "samples") for _ in range(20)]
    assert len(set(folders)) == 20
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize("where", ["write_wav", "replace_sound", "play"])
def test_interrupted_it_leaves_no_half_file(tiny, tmp_path, monkeypatch, where):
    """The second clip's file is being made when Ctrl-C comes."""
    home = lazy if where == "play" else vaura.data.sound
    calls, original = [], getattr(home, where)

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(home, where, interrupted)
    assert command(tiny, tiny.manifest, "duration=0.2", "batch_size=1", f"out={tmp_path}/out") == 130
    for path in (tmp_path / "out").glob("*.wav"):
        assert len(sound_of(path)) == 3200
    for path in (tmp_path / "out").glob("*.mp4"):
        assert picture_of(path)[3] == pytest.approx(0.2, abs=0.04)
    assert not list((tmp_path / "out").glob(".*"))
    assert len(list((tmp_path / "out").glob("*.mp4"))) in (1, 2)


def test_no_video_is_written_over(tiny, tmp_path, capsys):
    video = film(tmp_path / "clip.mp4", 0.4)
    before = video.read_bytes()
    assert command(tiny, video, f"out={tmp_path}") == 2
    assert "written over" in capsys.readouterr().err
    assert video.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "here"]
    with pytest.raises(InputError, match="written over"):
        VideoToAudio(tiny.folder, device="cpu").generate(video, 0.2).save(tmp_path)


# --- what can be wrong ---


def refused(capsys, said):
    error = capsys.readouterr().err.splitlines()
    sentences = [line for line in error if line.startswith("error: ")]
    assert len(sentences) == 1, error
    assert error[-1] == sentences[0]
    for part in said:
        assert part in sentences[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["duration=5"], ["clip.mp4 lasts 0.40 s", "ask for 0.40 s"]),
        (["duration=-1"], ["-1", "longer than 0 s"]),
        (["duration=0"], ["0", "longer than 0 s"]),
        (["duration=nan"], ["nan"]),
        (["duration=0.000001"], ["less than 0.01 s"]),
        (["start=9"], ["start=9", "lasts 0.40 s"]),
        (["start=-1"], ["-1", "starts at 0 s or later"]),
        (["video=nothing.mp4"], ["nothing.mp4"]),
        (["video=empty"], ["empty", "no video"]),
        (["video=text.mp4"], ["text.mp4"]),
        (["video=cut.mp4"], ["cut.mp4"]),
        (["out=text.mp4/below"], ["text.mp4/below"]),
        (["device=cuda:99"], ["cuda:99", "device=auto"]),
        (["device=gpu"], ["device=gpu"]),
        (["sampler.temperature=-1"], ["temperature", "-1"]),
        (["samples_per_video=0"], ["samples_per_video=0"]),
        (["batch_size=0"], ["batch_size=0"]),
        (["stride=0"], ["stride=0"]),
        (["window=0"], ["window=0"]),
        (["prompt=long.wav"], ["prompt", "shorter"]),
        (["prompt=text.mp4"], ["text.mp4"]),
        (["prompt=nothing.wav"], ["nothing.wav"]),
        (["checkpoint=nothing.ckpt"], ["nothing.ckpt"]),
        (["checkpoint=text.mp4"], ["text.mp4"]),
        (["guidence=2"], ["guidence", "guidance"]),
    ],
    ids=lambda value: value[0] if value and "=" in value[0] else "",
)
def test_what_a_person_got_wrong_is_one_sentence(tiny, working_folder, capsys, more, said):
    film(working_folder / "clip.mp4", 0.4)
    (working_folder / "text.mp4").write_text("no video\n")
    whole = film(working_folder / "whole.mp4", 2.0).read_bytes()
    (working_folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (working_folder / "empty").mkdir()
    soundfile.write(working_folder / "long.wav", np.zeros(RATE), RATE)
    before = sorted(working_folder.rglob("*"))
    samples = set((tiny.folder / "samples").glob("*"))
    assert command(tiny, "clip.mp4", *more) == 2
    refused(capsys, said)
    assert sorted(working_folder.rglob("*")) == before
    if not more[0].startswith("prompt=long"):
        assert set((tiny.folder / "samples").glob("*")) == samples


def test_a_wrong_experiment_names_the_nearest(tiny, capsys):
    wrong = tiny.folder.with_name("experimnt")
    assert run(["config=generate", f"experiment_path={wrong}", f"video={tiny.videos[0]}", "device=cpu"]) == 2
    refused(capsys, [str(wrong), "Did you mean", "experiment'"])


def test_a_broken_or_foreign_checkpoint_is_told(tiny, tmp_path, capsys):
    checkpoint = next((tiny.folder / "checkpoints").glob("*.ckpt"))
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    assert command(tiny, tiny.videos[0], f"checkpoint={tmp_path}/cut.ckpt") == 2
    refused(capsys, ["cut.ckpt"])
    encoder = tiny.folder / "encoder/checkpoints/last.ckpt"
    assert command(tiny, tiny.videos[0], f"checkpoint={encoder}") == 2
    refused(capsys, [str(encoder)])
    assert command(tiny, tiny.videos[0], "overridden_hparams.lm.dim=64") == 2
    refused(capsys, [str(checkpoint.parent), "another model", "(17, 16)"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_here(tiny, capsys):
    assert command(tiny, tiny.videos[0], "device=cuda") == 2
    refused(capsys, ["device=cuda", "device=auto"])
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(tiny, tmp_path, capsys):
    folder = tmp_path / "films"
    folder.mkdir()
    film(folder / "good.mp4", 1.0)
    film(folder / "short.mp4", 0.2)
    (folder / "text.mp4").write_text("no video\n")
    whole = film(folder / "holed.mp4", 4.0).read_bytes()
    at = whole.index(b"mdat") + (len(whole) - whole.index(b"mdat")) // 2
    (folder / "holed.mp4").write_bytes(whole[:at] + bytes(400) + whole[at + 400 :])
    film(folder / "too.mp4", 1.0)
    assert command(tiny, folder, "duration=0.9", "samples_per_video=2", "batch_size=1", f"out={tmp_path}/out") == 2
    said = capsys.readouterr()
    sentence = said.err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert all(sentence.count(f"{name}.mp4") == 1 for name in ("short", "text"))
    written = {path.name for path in (tmp_path / "out").glob("*.mp4")}
    assert {"good_1.mp4", "good_2.mp4", "too_1.mp4", "too_2.mp4"} <= written
    assert f"samples: {len(written)} in {tmp_path / 'out'}" in said.out


def test_a_picture_damaged_behind_its_beginning_is_told_once(tiny, tmp_path, capsys, monkeypatch):
    films = tmp_path / "films"
    films.mkdir()
    for name in ("a", "b"):
        film(films / f"{name}.mp4", 0.4)
    assert command(tiny, films / "b.mp4", "samples_per_video=3", f"out={tmp_path}/alone") == 0
    original = lazy.play

    def damaged(path, *args, **how):
        for number, frame in enumerate(original(path, *args, **how)):
            if path.stem == "a" and number == 5:
                raise InputError(f"{path} is damaged at 0.20 s")
            yield frame

    monkeypatch.setattr(lazy, "play", damaged)
    assert command(tiny, films, "samples_per_video=3", "batch_size=2", f"out={tmp_path}/out") == 2
    assert capsys.readouterr().err.count("is damaged at") == 1
    assert {path.stem for path in (tmp_path / "out").glob("*.wav")} == {"b_1", "b_2", "b_3"}
    for number in (1, 2, 3):
        assert (tmp_path / f"out/b_{number}.wav").read_bytes() == (tmp_path / f"alone/b_{number}.wav").read_bytes()


def test_one_id_for_two_spans_is_refused(tiny, tmp_path, capsys):
    line = tiny.manifest.read_text().splitlines()[0].replace("train/", f"{tiny.manifest.parent}/train/")
    (tmp_path / "twice.jsonl").write_text(f"{line}\n{line}\n")
    assert command(tiny, tmp_path / "twice.jsonl") == 2
    refused(capsys, ["train_000000", "own id"])
    (tmp_path / "out.jsonl").write_text(line.replace('"id": "', '"id": "../'))
    assert command(tiny, tmp_path / "out.jsonl") == 2
    refused(capsys, ["../train_000000"])


# --- long videos ---


def test_a_long_picture_is_encoded_in_pieces_as_if_in_one(model, tmp_path, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    write_video(tmp_path / "long.mp4", torch.randint(0, 256, (300, 3, 48, 48), generator=rng, dtype=torch.uint8), 25.0)
    clip = open_clip(tmp_path / "long.mp4", 0.5, None)
    whole = model.features(clip)
    lengths = []
    monkeypatch.setattr(lazy, "PIECE", 64)
    model.task.encoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    pieces = model.features(clip)
    assert max(lengths) <= 64 + 2 * 25 < 288
    assert len(lengths) == 5
    assert whole.shape == (1, 576, 16)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)


def test_after_90_seconds_a_feature_still_meets_its_token_frame(model, tmp_path, monkeypatch):
    """The picture turns white at 80.2 s; so does the condition, to the token frame."""
    frames = torch.zeros(30 * 90, 3, 96, 96, dtype=torch.uint8)
    frames[round(80.2 * 30) :] = 255
    write_video(tmp_path / "long.mp4", frames, 30.0, preset="ultrafast")

    class Brightness(torch.nn.Module):
        dim, fps, frame_rate, size, resize, segment, context = 1, 25.0, 50.0, 16, 16, 1, 0.0

        def forward(self, video):
            assert video.shape[1] <= lazy.PIECE
            return video.float().mean((2, 3, 4)).repeat_interleave(2, 1).unsqueeze(-1)

    monkeypatch.setitem(model.task._modules, "encoder", Brightness())
    features = model.features(open_clip(tmp_path / "long.mp4", 0.0, None))[0, :, 0]
    tokens = model.task.tokenizer.num_frames(90.0)
    index = align(tokens, model.task.tokenizer.frame_rate, 50.0)
    assert (len(features), int(index[-1])) == (4500, 4499)
    bright = torch.nonzero(features[index] > 128)[:, 0]
    # seen at 25 frames a second, white first shows on the frame at 80.2 s
    assert abs(int(bright[0]) / model.task.tokenizer.frame_rate - 80.2) <= 1 / model.task.tokenizer.frame_rate
    assert len(bright) == tokens - int(bright[0])


# --- what sounds begin with, and at what level they end ---


def test_a_sound_goes_on_from_the_clips_own_beginning(tiny, model, tmp_path):
    """Each clip of a batch from its own, as far as the tokenizer keeps it."""
    films = tmp_path / "films"
    films.mkdir()
    for video in tiny.videos[:2]:
        (films / video.name).symlink_to(video)
    assert command(tiny, films, "prepend_gt_audio=true", "prompt_duration=0.64", f"out={tmp_path}/out") == 0
    tokenizer = model.task.tokenizer
    begun = []
    for video in tiny.videos[:2]:
        wav, _ = soundfile.read(tmp_path / f"out/{video.stem}.wav", dtype="float32")
        own = tokenizer.decode(tokenizer.encode(read_audio(video, 0.0, 0.64, RATE, 1)[None]))[0, 0].numpy()
        sure = len(own) - 3200  # what follows reaches back through the vocoder's overlapping windows
        assert np.corrcoef(wav[:sure], own[:sure])[0, 1] > 0.99
        begun.append(own[:sure])
    assert np.corrcoef(*begun)[0, 1] < 0.5


def test_a_clip_shorter_than_the_prompt_does_not_stop_the_others(tiny, tmp_path, capsys):
    folder = tmp_path / "films"
    folder.mkdir()
    film(folder / "short.mp4", 0.6)
    film(folder / "long.mp4", 1.2)
    soundfile.write(tmp_path / "prompt.wav", np.full(RATE, 0.1), RATE)
    assert command(tiny, folder, f"prompt={tmp_path}/prompt.wav", f"out={tmp_path}/out") == 2
    error = capsys.readouterr().err
    assert "nothing is left to generate" in error
    assert "short.mp4" in error
    assert (tmp_path / "out/long.wav").is_file()
    assert not (tmp_path / "out/short.wav").exists()


def test_a_prompt_that_is_removed_takes_its_picture_along(tiny, tmp_path):
    video, length = tiny.videos[0], 16_000 * 1.92
    own = ["prepend_gt_audio=true", "prompt_duration=0.5"]
    for name, more in (("kept", []), ("removed", ["remove_prompts=true"])):
        assert command(tiny, video, *own, *more, f"out={tmp_path}/{name}") == 0
    kept, removed = (soundfile.read(tmp_path / f"{name}/{video.stem}.wav")[0] for name in ("kept", "removed"))
    assert len(kept) == length
    assert np.array_equal(removed, kept[8000:])
    assert vaura.media.video.probe(tmp_path / f"removed/{video.stem}.mp4").duration == pytest.approx(1.42, abs=0.05)


def test_two_ways_to_begin_are_one_too_many(tiny, tmp_path, capsys):
    asked = ["prepend_gt_audio=true", f"prompt={tiny.videos[1]}", f"out={tmp_path}/out"]
    assert command(tiny, tiny.videos[0], *asked) == 2
    assert "give one of the two" in capsys.readouterr().err
    assert command(tiny, tiny.videos[0], "prepend_gt_audio=true", "prompt_duration=0", f"out={tmp_path}/out") == 2
    assert "prompt_duration=0 is no length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("loop=windws", "loop=windws is none of windows, rolling, centred, published. Did you mean 'windows'?"),
        ("normalize=peek", "normalize=peek is none of limit, lufs, clip, peak, rms, loudness. Did you mean 'peak'?"),
        ("guidance_shape=liner", "guidance_shape=liner is none of linear, cosine. Did you mean 'linear'?"),
        ("guidance_end=-1", "guidance_end=-1 is no scale"),
    ],
)
def test_a_word_that_says_nothing_is_refused(tiny, tmp_path, capsys, word, told):
    assert command(tiny, tiny.videos[0], word, f"out={tmp_path}/out") == 2
    assert told in capsys.readouterr().err


def test_the_level_is_what_was_asked_for(tiny):
    model = VideoToAudio(tiny.folder, device="cpu")
    plain = model.generate(tiny.videos[0], 1.2)
    peak = model.generate(tiny.videos[0], 1.2, normalize="peak")
    assert peak.wav.abs().max() == pytest.approx(10 ** (-6 / 20), rel=1e-5)
    torch.testing.assert_close(peak.wav / peak.wav.abs().max(), plain.wav / plain.wav.abs().max())


def test_the_original_is_saved_beside_its_sample(tiny, tmp_path):
    video = tiny.videos[0]
    asked = ["save_original_files=true", "compress_original_audio=false", "duration=1", "start=0.5", "samples_per_video=2"]
    assert command(tiny, video, *asked, f"out={tmp_path}/out") == 0
    names = {path.name for path in (tmp_path / "out").glob("*.wav")}
    assert names == {f"{video.stem}{end}.wav" for end in ("_1", "_2", "_original")}
    wav, rate = soundfile.read(tmp_path / f"out/{video.stem}_original.wav", dtype="float32")
    assert np.abs(wav - read_audio(video, 0.5, 1.0, rate, 1)[0].numpy()).max() < 2**-14


def test_features_are_kept_and_found_again(tiny, tmp_path, monkeypatch):
    asked = [f"features_cache={tmp_path}/cache", "duration=1"]
    assert command(tiny, tiny.videos[0], *asked, f"out={tmp_path}/first") == 0
    monkeypatch.setattr(lazy, "play", None)  # not read again
    assert command(tiny, tiny.videos[0], *asked, f"out={tmp_path}/second") == 0
    first, second = ((tmp_path / f"{name}/{tiny.videos[0].stem}.wav").read_bytes() for name in ("first", "second"))
    assert first == second


def test_neither_or_both_of_video_and_corpus_is_refused(tiny, tmp_path, capsys):
    assert run(["config=generate", f"experiment_path={tiny.folder}", "device=cpu"]) == 2
    assert "give video=FILE_OR_FOLDER, or a corpus by data, one of the two" in capsys.readouterr().err


def test_much_that_failed_is_told_in_short_and_written_down(tmp_path):
    path = tmp_path / "left_out.txt"
    assert vaura.generate.tell(["a is broken", "b is broken"], path) == "a is broken; b is broken"
    assert not path.exists()
    sentences = [f"video {number} is broken" for number in range(30)]
    told = vaura.generate.tell(sentences, path)
    assert told.endswith(f"video 9 is broken; and 20 more, all of them in {path}")
    assert path.read_text().splitlines() == sentences


def test_the_published_loop_is_for_encoders_of_its_segments(tiny, tmp_path, capsys):
    assert command(tiny, tiny.videos[0], "loop=published", "window=0.64", f"out={tmp_path}/out") == 2
    assert "which this encoder has not; set loop=windows" in capsys.readouterr().err


# --- what is drawn together, and what comes first ---


def test_clips_of_any_lengths_sound_in_one_batch_as_they_do_alone(tiny, keen, tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    for number, video in enumerate(tiny.videos):
        seconds = (0.4, 1.92, 1.0, 1.7)[number]
        replace_sound(video, films / video.name, torch.zeros(1, round(seconds * RATE)), RATE, 0.0, seconds)
    for name, more in (("together", "batch_size=8"), ("alone", "batch_size=1")):
        assert command(tiny, films, more, "samples_per_video=2", f"out={tmp_path}/{name}") == 0
    wavs = sorted(path.name for path in (tmp_path / "together").glob("*.wav"))
    assert len(wavs) == 8
    for name in wavs:
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("loop", ["windows", "rolling"])
def test_a_stream_is_the_sound_and_begins_before_the_video_was_read(model, tmp_path, monkeypatch, loop):
    video = film(tmp_path / "film.mp4", 8.0)
    read, closed, play = [], [], lazy.play

    def counted(*args, **how):
        try:
            for frame in play(*args, **how):
                read.append(len(read))
                yield frame
        finally:
            closed.append(True)

    monkeypatch.setattr(lazy, "play", counted)
    monkeypatch.setattr(lazy, "FIRST", 16)
    how = {"seed": 4, "loop": loop}
    whole = model.generate(video, 7.9, start=0.05, normalize="limit", **how).wav
    frames = len(read)
    read.clear()
    closed.clear()
    pieces, first = [], None
    for piece in model.stream(video, 7.9, start=0.05, **how):
        first = first or len(read)
        assert not closed or len(read) == frames
        pieces.append(piece)
    assert first < frames
    assert len(pieces) > 1
    streamed = torch.cat(pieces, 1)
    assert streamed.shape == whole.shape == (1, round(7.9 * RATE))
    # the codes are the same; iterations of the vocoder carry on the rounding of its pieces
    torch.testing.assert_close(streamed / streamed.abs().max().clamp(min=1), whole, atol=2e-3, rtol=0)
    assert len(read) == frames
    assert closed


def test_a_stream_that_is_left_closes_the_video(model, world_video, monkeypatch):
    closed, play = [], lazy.play

    def counted(*args, **how):
        try:
            yield from play(*args, **how)
        finally:
            closed.append(True)

    monkeypatch.setattr(lazy, "play", counted)
    monkeypatch.setattr(lazy, "FIRST", 16)
    stream = model.stream(world_video)
    next(stream)
    assert not closed
    stream.close()
    assert closed


def test_what_a_stream_cannot_do_is_told_at_once(model, world_video, tmp_path):
    with pytest.raises(InputError, match="cannot be levelled before it is whole; leave normalize out"):
        model.stream(world_video, normalize="lufs")
    with pytest.raises(InputError, match="ask for"):
        model.stream(world_video, 9.0)


def test_what_was_made_is_told_in_one_line(tiny, tmp_path, capsys):
    asked = ["duration=0.5", "samples_per_video=2", "engine=torch", f"out={tmp_path}/out"]
    assert command(tiny, tiny.videos[0], *asked) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    told = re.fullmatch(
        r"made 1\.00 s of sound in ([\d.]+) s \(([\d.]+) times real time, (\d+) steps a second\), (\d+) MB of memory at most; "
        r"engine: torch, float32",
        last,
    )
    assert told, last
    seconds, times, steps, memory = map(float, told.groups())
    assert times == pytest.approx(1 / seconds, rel=0.2)
    assert steps == pytest.approx(2 * (25 + 1) / seconds, rel=0.2)
    assert 100 < memory < 20_000
    assert summary(60.0, 3000, 30.0, None, "native, int8") == (
        "made 60.00 s of sound in 30.00 s (2.00 times real time, 100 steps a second); engine: native, int8"
    )


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "int8"])
def test_other_precisions_sound_much_the_same(tiny, tmp_path, precision):
    model = VideoToAudio(tiny.folder, device="cpu", precision=precision)
    sound = model.generate(tiny.videos[0], 1.0)
    assert sound.wav.shape == (1, RATE)
    assert model.engine is model.engine
    assert precision == "auto" or model.engine.name.endswith(precision)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("precision=bfloat", "precision=bfloat is none of auto, float32, bfloat16, int8. Did you mean 'bfloat16'?"),
        ("engine=cuda", "engine=cuda is none of auto, native, torch."),
    ],
)
def test_an_engine_that_is_none_is_refused_before_anything_is_written(tiny, tmp_path, capsys, word, told):
    assert command(tiny, tiny.videos[0], word, f"out={tmp_path}/out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
