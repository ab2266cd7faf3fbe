import random
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch

from vaura import timing
from vaura.errors import InputError
from vaura.media.audio import read_audio, resample, write_wav

TONE, RATE = 997.0, 44100


def chirp(rate, seconds, begin=0.0):
    """A sweep from 100 Hz to 3100 Hz over 2 s, sampled anywhere: the closed form that a resampled one is held against."""
    time = begin + np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (100 * time + 750 * time**2))).astype(np.float32)


def noise(samples, channels=1):
    rng = torch.Generator().manual_seed(0)
    return torch.nn.functional.avg_pool1d(torch.rand(channels, samples, generator=rng) - 0.5, 9, 1, 4)


def lag(got, expected):
    """Samples by which got (N) comes later than expected (N), by cross-correlation."""
    size = 2 * max(len(got), len(expected))
    spectrum = torch.fft.rfft(got, size) * torch.fft.rfft(expected, size).conj()
    peak = int(torch.fft.irfft(spectrum, size).argmax())
    return peak if peak < size // 2 else peak - size


def write_sound(path, wav, rate, codec, begin=0.0, picture=None):
    """Encode wav (A, N) from `begin` seconds on, beside a grey picture of `picture` frames at 25 Hz."""
    with av.open(str(path), "w") as file:
        if picture:
            stream = file.add_stream("libx264", rate=25)
            stream.width = stream.height = 32
            stream.pix_fmt = "yuv420p"
        sound = file.add_stream(codec, rate=rate, layout="mono" if len(wav) == 1 else "stereo")
        if picture:
            for index in range(picture):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24").reformat(
                    format="yuv420p"
                )
                frame.pts = index
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav), format="fltp", layout=sound.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(begin * rate), Fraction(1, rate)
        file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    return path


@pytest.mark.parametrize(("old", "new"), [(8000, 16000), (48000, 16000), (44100, 8000), (16000, 48000)])
@pytest.mark.parametrize("samples", [1, 3, 21, 22, 66, 67])
def test_the_shortest_sound_is_as_long_as_it_should_be(old, new, samples):
    """And a constant stays one to its end: what is longer goes on as its own reflection, too."""
    got = resample(torch.full((2, samples), 0.5), old, new)
    assert got.shape == (2, -(-samples * new // old))
    torch.testing.assert_close(got, torch.full_like(got, 0.5), atol=0.01, rtol=0)


@pytest.mark.parametrize(("old", "new"), [(44100, 16000), (48000, 16000), (16000, 44100), (22050, 24000), (44100, 48000)])
def test_resampling_neither_bends_nor_shifts_time(old, new):
    got = resample(torch.from_numpy(chirp(old, 2))[None], old, new)[0].numpy()
    expected = chirp(new, 2)
    assert len(got) == len(expected)
    edge = new // 100
    assert np.abs(got - expected)[edge:-edge].max() < 2e-3


def test_resampling_lets_nothing_fold_back():
    high = np.sin(2 * np.pi * 12000 * np.arange(RATE) / RATE).astype(np.float32)
    assert resample(torch.from_numpy(high)[None], RATE, 16000)[0, 100:-100].abs().max() < 1e-2


@pytest.mark.parametrize(
    ("suffix", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "mp3"), ("m4a", "aac"), ("mkv", "flac")]
)
def test_every_kind_of_file_begins_at_its_beginning(tmp_path, suffix, codec):
    wav = noise(RATE)
    path = write_sound(tmp_path / f"sound.{suffix}", wav.numpy(), RATE, codec)
    got = read_audio(path, 0.0, 1.0, RATE)
    assert got.shape == (1, RATE)
    assert got.dtype == torch.float32
    assert lag(got[0], wav[0]) == 0
    if codec in {"pcm_s16le", "flac"}:
        assert (got - wav).abs().max() <= 1 / 32768


@pytest.mark.parametrize(("suffix", "codec"), [("wav", "pcm_s16le"), ("mp3", "mp3"), ("m4a", "aac"), ("mkv", "aac")])
@pytest.mark.parametrize("sample_rate", [16000, 44100, 24000])
def test_a_cut_is_the_same_cut_of_the_whole(tmp_path, suffix, codec, sample_rate):
    path = write_sound(tmp_path / f"sound.{suffix}", noise(4 * RATE).numpy(), RATE, codec)
    whole = read_audio(path, sample_rate=sample_rate)
    for start in [0.0, 1.0, *(random.Random(0).uniform(0, 3) for _ in range(4))]:
        first = timing.count(start, sample_rate)
        got = read_audio(path, start, 0.7, sample_rate)
        assert got.shape == (1, timing.count(0.7, sample_rate))
        torch.testing.assert_close(got, whole[:, first : first + got.shape[1]], atol=1e-6, rtol=0)


def test_a_cut_far_into_an_mp4_is_sought_exactly(tmp_path):
    path = write_sound(tmp_path / "sound.m4a", noise(40 * 16000).numpy(), 16000, "aac")
    whole = read_audio(path)
    for start in (33.3337, 38.9):
        got = read_audio(path, start, 0.1)[0]
        expected = whole[0, timing.count(start, 16000) :][:1600]
        # the decoder fills noise in at random, hence not equal to the bit
        assert (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_click_stays_where_it_is(tmp_path):
    wav = np.zeros((1, RATE), np.float32)
    wav[0, 22050] = 0.9
    path = write_sound(tmp_path / "click.wav", wav, RATE, "pcm_s16le")
    assert read_audio(path, 0.0, 1.0)[0].argmax() == 8000
    assert read_audio(path, 0.4, 0.2)[0].argmax() == 1600


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "aac"), ("mkv", "pcm_s16le")])
def test_sound_that_begins_late_is_preceded_by_silence(tmp_path, suffix, codec):
    wav = noise(16000)
    path = write_sound(tmp_path / f"late.{suffix}", wav.numpy(), 16000, codec, begin=0.5, picture=50)
    got = read_audio(path, 0.0, 2.0)
    assert got.shape == (1, 32000)
    assert got[0, :7000].abs().max() < 1e-3
    assert got[0, 25000:].abs().max() < 1e-3
    assert lag(got[0], torch.cat([torch.zeros(8000), wav[0], torch.zeros(8000)])) == 0
    assert read_audio(path, 0.1, 0.2).abs().max() < 1e-3


def test_silence_fills_up_to_the_end_of_the_picture_and_no_further(tmp_path):
    path = write_sound(tmp_path / "short.mp4", noise(8000).numpy(), 16000, "aac", picture=50)
    got = read_audio(path, 0.2, 1.8)
    assert got.shape == (1, 28800)
    assert got[0, 10000:].abs().max() == 0
    assert read_audio(path, 1.0, 1.0).abs().max() == 0
    with pytest.raises(InputError, match=r"short\.mp4 lasts 2\.00 s, but 1 s to 2\.5 s was asked"):
        read_audio(path, 1.0, 1.5)


def test_the_end_of_a_sound_file(tmp_path):
    wav = noise(16000)
    path = write_sound(tmp_path / "sound.wav", wav.numpy(), 16000, "pcm_s16le")
    assert read_audio(path, 0.25).shape == (1, 12000)
    assert read_audio(path, 0.5, 0.55).shape == (1, 8800)
    with pytest.raises(InputError, match=r"sound\.wav lasts 1\.00 s"):
        read_audio(path, 0.5, 1.0)
    with pytest.raises(InputError, match=r"sound\.wav has no sound from 2 s on"):
        read_audio(path, 2.0)


def test_aac_ends_with_its_last_sample(tmp_path):
    path = write_sound(tmp_path / "sound.m4a", noise(16500).numpy(), 16000, "aac")
    assert abs(read_audio(path).shape[1] - 16500) <= 16  # this file counts milliseconds; ours (test_mux) count samples


def test_channels(tmp_path):
    wav = noise(16000, channels=2)
    stereo = write_sound(tmp_path / "stereo.flac", wav.numpy(), 16000, "flac")
    torch.testing.assert_close(read_audio(stereo, channels=2), wav, atol=1e-4, rtol=0)
    torch.testing.assert_close(read_audio(stereo), wav.mean(0, keepdim=True), atol=1e-4, rtol=0)
    mono = write_sound(tmp_path / "mono.flac", wav[:1].numpy(), 16000, "flac")
    torch.testing.assert_close(read_audio(mono, channels=2), wav[:1].expand(2, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_has_the_same_scale(tmp_path, subtype):
    wav = noise(4000, channels=2)
    soundfile.write(tmp_path / "sound.wav", wav.T.numpy(), 16000, subtype=subtype)
    torch.testing.assert_close(read_audio(tmp_path / "sound.wav", channels=2), wav, atol=1 / 127, rtol=0)


def test_what_has_no_sound(tmp_path):
    with av.open(str(tmp_path / "silent.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        file.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        file.mux(stream.encode(None))
    with pytest.raises(InputError, match=r"silent\.mp4 has no sound"):
        read_audio(tmp_path / "silent.mp4", 0.0, 0.02)
    with pytest.raises(InputError, match=r"there is no file"):
        read_audio(tmp_path / "nowhere.wav")
    (tmp_path / "text.wav").write_text("not a sound\n" * 20)
    with pytest.raises(InputError, match=r"text\.wav is not a video or sound file"):
        read_audio(tmp_path / "text.wav")


def test_what_is_written_is_read_back(tmp_path):
    wav = noise(5000, channels=2)
    write_wav(tmp_path / "a" / "sound.wav", wav, 22050)
    samples, rate = soundfile.read(tmp_path / "a" / "sound.wav", dtype="int16")
    assert (rate, samples.shape) == (22050, (5000, 2))
    assert np.abs(samples.T / 32768 - wav.numpy()).max() <= 1 / 32768
    write_wav(tmp_path / "float.wav", wav, 22050, subtype="FLOAT")
    assert np.array_equal(soundfile.read(tmp_path / "float.wav", dtype="float32")[0].T, wav.numpy())


def test_a_loud_sound_is_turned_down_not_clipped(tmp_path):
    wav = noise(5000)
    loud = 3 * wav / wav.abs().max()
    write_wav(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    got = torch.from_numpy(soundfile.read(tmp_path / "loud.wav", dtype="float32")[0])
    torch.testing.assert_close(got, loud[0] / 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_written(tmp_path, value):
    wav = torch.zeros(1, 100)
    wav[0, 50] = value
    with pytest.raises(InputError, match="not finite"):
        write_wav(tmp_path / "sound.wav", wav, 16000)
    assert not list(tmp_path.iterdir())


def test_packets_stamped_when_they_came_are_put_one_after_another(tmp_path):
    """Some recorders' stamps fall behind by up to a packet, and durations with them; nothing is missing and nothing doubled."""
    path, other = write_sound(tmp_path / "even.m4a", chirp(RATE, 2)[None], RATE, "aac"), tmp_path / "uneven.m4a"
    behind = {4: 465, 5: 908, 6: 433, 13: 903, 14: 432, 30: 892}
    with av.open(str(path)) as source, av.open(str(other), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for number, packet in enumerate(packet for packet in source.demux(audio=0) if packet.size):
            packet.pts = packet.dts = packet.pts - behind.get(number, 0)
            packet.stream = stream
            target.mux(packet)
    with av.open(str(other)) as file:
        durations = {packet.duration for packet in file.demux(audio=0) if packet.size}
    assert len(durations) > 3
    wanted = read_audio(path, 0.0, 1.9, RATE)
    torch.testing.assert_close(read_audio(other, 0.0, 1.9, RATE), wanted, rtol=0, atol=1e-6)
