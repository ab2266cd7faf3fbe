import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vaura.codec import Codes, Maker, Row, bit_rate, decode, encode, find_sounds, means
from vaura.errors import InputError
from vaura.launch import run
from vaura.media.audio import read_audio, write_wav
from vaura.tokenizer.mel_kmeans import MelKMeans
from vaura.tokenizer.wave_codec import WaveCodec
from vaura.vocoder.griffin_lim import GriffinLim

SMALL = {"sample_rate": 8000, "width": 4, "rates": [2, 5, 4], "latent_dim": 8, "num_codebooks": 3, "codebook_size": 16}
DISTANCES = ("convergence", "log_magnitude", "log_mel")
MEDIA = Path(os.environ.get("VAURA_MEDIA", Path(__file__).parents[2] / "shared" / "media")) / "specvqgan" / "neural_audio_codec"


def noise(samples: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)


@pytest.fixture(scope="module")
def codec() -> WaveCodec:
    torch.manual_seed(0)
    made = WaveCodec(**SMALL)
    made.train()(noise(4000)[None])
    return made.eval()


@pytest.fixture
def words(codec, tmp_path) -> list[str]:
    """How the command line names that codec, and where to write."""
    codec.save(weights := tmp_path / "codec.safetensors")
    sizes = [f"tokenizer.{key}={str(value).replace(' ', '')}" for key, value in SMALL.items()]
    return [
        "config=codec",
        "tokenizer=wave_codec",
        *sizes,
        f"tokenizer.weights={weights}",
        f"out={tmp_path / 'out'}",
        "device=cpu",
    ]


@pytest.mark.parametrize(
    ("samples", "rate", "channels"), [(12_345, 11_025, 1), (8000, 8000, 1), (48_001, 48_000, 2), (1000, 44_100, 1)]
)
def test_a_sound_comes_back_as_long_as_it_was(codec, tmp_path, samples, rate, channels):
    soundfile.write(path := tmp_path / "a.wav", noise(samples, channels).T.numpy(), rate)
    codes = encode(codec, path)
    assert (codes.samples, codes.sample_rate) == (samples, rate)
    assert codes.codes.shape[1] * codec.hop_length / codec.sample_rate >= samples / rate
    assert decode(codec, codes).shape == (1, samples)


def test_codes_of_a_file_are_those_of_the_tokenizer(codec, tmp_path):
    wav = noise(8123)
    write_wav(tmp_path / "a.wav", wav, 8000, "FLOAT")
    codes = encode(codec, tmp_path / "a.wav")
    assert torch.equal(codes.codes, codec.encode(wav[None])[0])
    assert torch.equal(decode(codec, codes), codec.decode(codes.codes[None])[0, :, :8123])
    codes.save(tmp_path / "a.safetensors")
    again = Codes.load(tmp_path / "a.safetensors")
    assert torch.equal(again.codes, codes.codes)
    assert again.maker == codes.maker == Maker.of(codec)
    assert (again.codebook_size, again.samples, again.sample_rate) == (16, 8123, 8000)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.get_tensor("codes").dtype == torch.int16


def test_bit_rates_by_both_definitions(codec):
    """SpecVQGAN: 3 s are 5 x 16 codes of 10 bits, 0.26 kbps of 1024 bits. EnCodec: 8 x 75 codes of 10 bits are 6 kbps."""
    maker = Maker(
        "SpecVQGAN", num_codebooks=5, codebook_size=1024, frame_rate=22_050 / 4096, sample_rate=22_050, fingerprint=""
    )
    codes = Codes(torch.zeros(5, 16).long(), maker, samples=66_150, sample_rate=22_050)
    assert codes.counted == pytest.approx(0.26, abs=0.005)
    assert bit_rate(codec) == 3 * 4 * 200 / 1000
    assert bit_rate(WaveCodec()) == 6.0


def test_the_command(words, codec, tmp_path, capsys):
    (folder := tmp_path / "sounds").mkdir()
    write_wav(folder / "a.wav", noise(9001), 8000)
    assert run([*words, f"audio={folder / 'a.wav'}"]) == 0
    out = tmp_path / "out"
    wav, rate = soundfile.read(out / "a.wav")
    assert (len(wav), rate) == (9001, 8000)
    metrics = json.loads((out / "metrics.json").read_text())
    original, ours = metrics["sounds"]["a"]
    assert (original["name"], *(original[key] for key in DISTANCES)) == ("original", 0, 0, 0)
    assert original["kbps"] == pytest.approx(128, rel=0.01)
    assert (ours["name"], ours["kbps"]) == ("WaveCodec", 2.4)
    assert original["late"] == pytest.approx(0, abs=1e-6)
    assert min(ours[key] for key in DISTANCES) > 0
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    row = next(line for line in table.splitlines() if "WaveCodec" in line)
    assert [float(cell) for cell in row.split("|")[3:7]] == pytest.approx(
        [ours["counted"], *(ours[key] for key in DISTANCES)], abs=0.01
    )
    page = (out / "index.html").read_text()
    assert len(re.findall("<audio", page)) == len(re.findall("<img", page)) == 2
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert sorted(path.name for path in out.iterdir()) == [
        *("a.safetensors", "a.wav", "config.yaml", "index.html", "metrics.json", "table.md"),
    ]


def test_codes_become_the_same_sound(words, tmp_path):
    write_wav(tmp_path / "a.wav", noise(9001), 11_025)
    assert run([*words, f"audio={tmp_path / 'a.wav'}"]) == 0
    first = (tmp_path / "out" / "a.wav").read_bytes()
    assert run([*words, f"audio={tmp_path / 'out' / 'a.safetensors'}", f"out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "a.wav").read_bytes() == first


def test_others_of_the_same_sound_stand_beside_it(words, tmp_path):
    for n, name in enumerate(("one", "two")):
        (folder := tmp_path / "set" / name).mkdir(parents=True)
        write_wav(folder / "original.wav", noise(8000, seed=n), 8000)
        write_wav(folder / "same_3.0kbps.wav", noise(8000, seed=n), 8000)
        write_wav(folder / "other.wav", noise(6000, seed=n + 5), 16_000)
    assert run([*words, f"audio={tmp_path}/set/*/original.wav", f"compare={tmp_path / 'set'}"]) == 0
    sounds = json.loads((tmp_path / "out" / "metrics.json").read_text())["sounds"]
    assert list(sounds) == ["one/original", "two/original"]
    for rows in sounds.values():
        assert [row["name"] for row in rows] == ["original", "WaveCodec", "other", "same_3.0kbps"]
        assert [row["kbps"] for row in rows[2:]] == [None, 3.0]
        assert [rows[3][key] for key in DISTANCES] == [0, 0, 0]
        assert rows[2]["log_mel"] > 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("**mean of 2 sounds**")
    assert (tmp_path / "out" / "two" / "original.wav").is_file()


def test_means_are_over_rows_of_one_name(words, tmp_path):
    for n in range(2):
        write_wav(tmp_path / "set" / f"{n}.wav", noise(8000, seed=n), 8000)
    write_wav(tmp_path / "others" / "0_lyra_3kbps.wav", noise(8000, seed=9), 8000)
    assert run([*words, f"audio={tmp_path / 'set'}", f"compare={tmp_path / 'others'}"]) == 0
    sounds = json.loads((tmp_path / "out" / "metrics.json").read_text())["sounds"]
    assert [len(rows) for rows in sounds.values()] == [3, 2]
    heard = {name: [Row(**row) for row in rows] for name, rows in sounds.items()}
    mean = {row.name: row for row in means(heard)}
    assert mean["WaveCodec"].log_mel == pytest.approx(sum(rows[1].log_mel for rows in heard.values()) / 2)
    assert mean["0_lyra_3kbps"].log_mel == heard["0"][2].log_mel


def test_the_sound_of_a_video(words, world_video, tmp_path):
    assert run([*words, f"audio={world_video}"]) == 0
    truth = read_audio(world_video)
    assert read_audio(tmp_path / "out" / f"{world_video.stem}.wav").shape == truth.shape


def test_what_cannot_be_heard_is_left_out_and_told(words, world_video, tmp_path, capsys):
    write_wav(tmp_path / "set" / "a.wav", noise(8000), 8000)
    (tmp_path / "set" / "broken.wav").write_text("no sound")
    assert run([*words, f"audio={tmp_path / 'set'}"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["sounds"]) == ["a"]
    assert "broken.wav is not a video or sound file" in metrics["left_out"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"tokenizer": "vaura.tokenizer.dac.DAC"},
            "tokenizer vaura.tokenizer.dac.DAC and this one has vaura.",
        ),
        ({"codebook_size": 1024}, "codebook_size 1024 and this one has 16"),
        ({"frame_rate": 75.0}, "frame_rate 75.0 and this one has 200.0"),
        ({"sample_rate": 24_000}, "sample_rate 24000 and this one has 8000"),
        ({"fingerprint": "0" * 32}, "other weights or settings; give"),
    ],
)
def test_codes_of_another_tokenizer_are_refused(codec, words, tmp_path, capsys, change, told):
    maker = replace(Maker.of(codec), **change)
    Codes(torch.zeros(3, 200).long(), maker, 8000, 8000).save(tmp_path / "c.safetensors")
    assert run([*words, f"audio={tmp_path / 'c.safetensors'}"]) == 2
    assert f"the codes were made by a tokenizer of {told}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_codes_that_do_not_say_whose_they_are_or_say_nonsense_are_refused(codec, tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"codes": torch.zeros(3, 9).long()}, path, {"codebook_size": "16", "samples": "360", "sample_rate": "8000"})
    with pytest.raises(InputError, match=r"holds no codes \('maker'\)"):
        Codes.load(path)
    for codes, samples in ((torch.zeros(2, 9), 360), (torch.zeros(9), 360), (torch.zeros(3, 9), 0)):
        Codes(codes.long(), Maker.of(codec), samples, 8000).save(path)
        with pytest.raises(InputError, match="holds no codes"):
            Codes.load(path)


def test_codes_of_half_a_sound_are_not_passed_off_as_the_whole(codec):
    codes = Codes(torch.zeros(3, 100).long(), Maker.of(codec), 8000, 8000)
    with pytest.raises(InputError, match=r"the 100 token frames of the codes are 0\.50 s of sound where 1\.00 s"):
        decode(codec, codes)
    assert decode(codec, replace(codes, samples=4000)).shape == (1, 4000)


def test_one_bad_file_costs_no_other_its_row(words, tmp_path):
    """Broken, no number, or as short as can be; among the sounds, and among what others made of them."""
    for name, wav in (("a", noise(8000)), ("b", noise(3)), ("c", noise(900) / 0), ("d", torch.zeros(1, 8000))):
        (tmp_path / "set").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "set" / f"{name}.wav", wav.T.numpy(), 8000, subtype="FLOAT")
    (others := tmp_path / "others").mkdir()
    write_wav(others / "a_good.wav", noise(8000, seed=3), 8000)
    (others / "a_broken.wav").write_text("no sound")
    soundfile.write(others / "a_nan.wav", (noise(8000) / 0).T.numpy(), 8000, subtype="FLOAT")
    assert run([*words, f"audio={tmp_path / 'set'}", f"compare={others}"]) == 0
    strict = {"parse_constant": lambda word: pytest.fail(f"{word} is no JSON")}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(), **strict)
    assert {name: len(rows) for name, rows in metrics["sounds"].items()} == {"a": 3, "b": 2, "d": 2}
    assert [sum(name in told for told in metrics["left_out"]) for name in ("a_broken.wav", "a_nan.wav", "c.wav")] == [1, 1, 1]
    assert metrics["sounds"]["d"][1]["convergence"] is None  # of silence
    assert soundfile.info(tmp_path / "out" / "b.wav").frames == 3
    mean = means({name: [Row(**row) for row in rows] for name, rows in metrics["sounds"].items()})
    assert mean[1].convergence == pytest.approx(sum(metrics["sounds"][name][1]["convergence"] for name in "ab") / 2)


def test_nothing_coded_is_no_success(words, tmp_path, capsys):
    for name in "ab":
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.wav").write_text("no sound")
    assert run([*words, f"audio={tmp_path / 'set'}"]) == 2
    assert re.search(r"none of the 2 sounds of .* could be coded, the first because .*a\.wav", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.wav", "a.safetensors", "table.md", "config.yaml"])
def test_a_neighbour_is_not_written_over(words, tmp_path, capsys, name):
    write_wav(tmp_path / "a.wav", noise(800), 8000)
    (tmp_path / "a.wav").rename(tmp_path / "a.flac")  # what it holds decides
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert run([*words, f"audio={tmp_path / 'a.flac'}"]) == 2
    assert f"{name} is there already and would be written over; choose another folder" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [(name, "mine")]


def test_find_sounds(tmp_path):
    for name in ("a/x.wav", "a/y.mp4", "b/x.wav", "b/.z.wav", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    below = lambda found: (found[0], [path.relative_to(tmp_path).as_posix() for path in found[1]])  # noqa: E731
    assert below(find_sounds(str(tmp_path))) == (tmp_path, ["a/x.wav", "a/y.mp4", "b/x.wav"])
    assert below(find_sounds(f"{tmp_path}/*/x.wav")) == (tmp_path, ["a/x.wav", "b/x.wav"])
    assert below(find_sounds(f"{tmp_path}/a/y.mp4")) == (tmp_path / "a", ["a/y.mp4"])


def test_refusals(words, tmp_path, capsys):
    write_wav(tmp_path / "a.wav", noise(800), 8000)

    def refused(*more: str) -> str:
        assert run([*words, *more]) == 2
        return capsys.readouterr().err

    assert "there is no sound" in refused(f"audio={tmp_path / 'absent.wav'}")
    assert "would be written over" in refused(f"audio={tmp_path / 'a.wav'}", f"out={tmp_path}")
    assert "there is no folder" in refused(f"audio={tmp_path / 'a.wav'}", f"compare={tmp_path / 'absent'}")
    assert "learnt nothing yet" in refused(f"audio={tmp_path / 'a.wav'}", "tokenizer.weights=null")
    (tmp_path / "b.safetensors").write_bytes(b"none")
    assert "holds no codes" in refused(f"audio={tmp_path / 'b.safetensors'}")
    assert "sample_rate is 0; give a number above 0" in refused(f"audio={tmp_path / 'a.wav'}", "sample_rate=0")
    assert "page_seconds is 0.0; give" in refused(f"audio={tmp_path / 'a.wav'}", "page_seconds=0")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not MEDIA.is_dir(), reason="needs the published sounds of Lyra and SoundStream in ../shared/media")
def test_published_codecs_are_nearer_than_a_codec_of_chance(words, tmp_path):
    assert run([*words, f"audio={MEDIA / 'clean_speech1' / 'original.wav'}", f"compare={MEDIA / 'clean_speech1'}"]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())["sounds"]["original"]}
    assert rows["lyra_3.0kbps"]["kbps"] == rows["soundstream_3.0kbps"]["kbps"] == 3.0
    assert rows["lyra_3.0kbps"]["late"] == pytest.approx(8, abs=2)
    assert abs(rows["soundstream_3.0kbps"]["late"]) < 1
    assert rows["soundstream_3.0kbps"]["log_mel"] < rows["WaveCodec"]["log_mel"]


def test_any_tokenizer_will_do(tmp_path):
    mel = {"n_mels": 64, "n_fft": 512, "hop_length": 160, "floor": 1e-3}
    tokenizer = MelKMeans(GriffinLim(16_000, **mel, iterations=0), **mel, num_codebooks=2, codebook_size=16)
    tokenizer.fit([noise(32_000)], sample=100, sweeps=1)
    write_wav(tmp_path / "a.wav", noise(22_051), 22_050)
    codes = encode(tokenizer, tmp_path / "a.wav")
    assert decode(tokenizer, codes).shape == (1, 22_051)
