import math

import pytest
import torch

from vaura.errors import InputError
from vaura.media.mel import LogMel, stft
from vaura.media.pieces import Reach
from vaura.media.torchaudio_door import torchaudio
from vaura.vocoder.griffin_lim import GriffinLim, overlap_add

SETTINGS = {"sample_rate": 16_000, "n_mels": 64, "n_fft": 512, "hop_length": 160, "floor": 1e-3}


def strikes(*times: float, samples: int = 16_000, pitch: float = 700.0) -> torch.Tensor:
    """Damped partials with a burst of noise at each of `times` (seconds): (1, N)."""
    wav = torch.zeros(1, samples)
    generator = torch.Generator().manual_seed(0)
    for time in times:
        start = round(time * 16_000)
        t = torch.arange(samples - start) / 16_000
        ring = sum(torch.sin(2 * math.pi * pitch * ratio * t) * torch.exp(-t * 12 * ratio) for ratio in (1, 2.76, 5.4))
        wav[0, start:] += 0.2 * ring + 0.3 * torch.randn(len(t), generator=generator) * torch.exp(-t / 0.004)
    return wav


def convergence(wav: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance of linear mel magnitudes, share of what is wanted."""
    mel = LogMel(**SETTINGS)
    return ((mel(wav).exp() - mel(wanted).exp()).norm() / mel(wanted).exp().norm()).item()


def test_gives_whole_cells():
    vocoder = GriffinLim(**SETTINGS)
    for frames in (1, 2, 33):
        assert vocoder(torch.full((3, 64, frames), -3.0)).shape == (3, 1, frames * 160)


def test_overlap_add_inverts_the_analysis():
    wav = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for length, hop in ((512, 160), (640, 160), (400, 200)):
        window = torch.hann_window(length, dtype=torch.float64)
        frames = torch.fft.irfft(stft(wav, window, hop), length) * window
        gain = overlap_add((window * window).expand(1, 1600 // hop, -1), hop)
        torch.testing.assert_close(overlap_add(frames, hop) / gain, wav)


def test_magnitude_is_not_negative_and_has_the_given_mel():
    vocoder = GriffinLim(**SETTINGS)
    mel = vocoder.analysis(strikes(0.1, 0.5))
    magnitude = vocoder.magnitude(mel)
    assert magnitude.min() >= 0
    back = (magnitude @ vocoder.analysis.filters).transpose(1, 2)
    wanted = mel.exp() - SETTINGS["floor"]
    assert (back - wanted).norm() < 0.05 * wanted.norm()


def test_a_blow_comes_back_when_it_fell_with_little_before_it():
    for sample in (8000, 8040, 8080, 8120):
        wav = GriffinLim(**SETTINGS)(LogMel(**SETTINGS)(strikes(sample / 16_000)))[0, 0]
        energy = wav.square().unfold(0, 32, 1).mean(-1)
        first = int((energy > 0.1 * energy.max()).nonzero()[0]) + 31
        assert abs(first - sample) <= 64  # 4 ms; the window is 32 ms
        assert wav[sample - 320 : sample - 64].square().mean() < 0.05 * wav[sample : sample + 256].square().mean()


def test_a_tone_keeps_pitch_and_level():
    wav = 0.3 * torch.sin(2 * math.pi * 500 * torch.arange(16_000) / 16_000)[None]
    back = GriffinLim(**SETTINGS)(LogMel(**SETTINGS)(wav))[0, 0, 2000:14_000]
    spectrum = torch.fft.rfft(back * torch.hann_window(12_000)).abs()
    assert abs(spectrum.argmax() * 16_000 / 12_000 - 500) < 16  # half a bin of the analysis
    assert abs(20 * math.log10(back.square().mean().sqrt() / (0.3 / math.sqrt(2)))) < 1


def test_comes_closer_than_random_phases_with_as_many_rounds():
    wav = strikes(0.1, 0.37, 0.61)
    vocoder = GriffinLim(**SETTINGS, iterations=8)
    mel = LogMel(**SETTINGS)(wav)
    torch.manual_seed(0)
    random = torchaudio.transforms.GriffinLim(512, n_iter=8, hop_length=160, power=1, momentum=0.99)
    theirs = random(vocoder.magnitude(mel).transpose(1, 2))
    # torchaudio's frames are centred on multiples of the hop, ours half a hop later
    ours, wanted = (x[:, 80 : 80 + theirs.shape[-1]] for x in (vocoder(mel)[:, 0], wav))
    assert convergence(ours, wanted) < 0.8 * convergence(theirs, wanted)


def test_rounds_help_noise():
    wav = 0.05 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    errors = [convergence(GriffinLim(**SETTINGS, iterations=n)(LogMel(**SETTINGS)(wav))[:, 0], wav) for n in (0, 4, 16)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_same_whatever_the_company():
    vocoder = GriffinLim(**SETTINGS)
    mel = LogMel(**SETTINGS)(torch.cat([strikes(0.1 + 0.02 * n, pitch=300 + 40 * n) for n in range(10)]))
    together = vocoder(mel)
    assert torch.equal(together, vocoder(mel))
    torch.testing.assert_close(vocoder(mel[7:8]), together[7:8], rtol=0, atol=1e-3)


def warble(seconds: float) -> torch.Tensor:
    """A wandering tone, blows and noise: (1, N)."""
    time = torch.arange(round(seconds * 16_000)) / 16_000
    tone = 0.3 * torch.sin(2 * math.pi * (300 * time + 40 * torch.sin(3 * time)))
    blows = 0.2 * torch.sin(2 * math.pi * 1234 * time) * torch.exp(-5 * (time % 0.8))
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return (tone + blows + 0.01 * noise)[None]


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("frames", [1, 10, 77])
@pytest.mark.parametrize(("n_fft", "hop_length"), [(512, 160), (400, 200)])
def test_long_mel_sounds_as_it_does_whole(iterations, frames, n_fft, hop_length):
    """In double precision, for the phases that are summed over a long sound are not told from one another in single."""
    settings = SETTINGS | {"n_fft": n_fft, "hop_length": hop_length}
    vocoder = GriffinLim(**settings, iterations=iterations).double()
    mel = LogMel(**settings)(torch.cat([warble(2.5), 0.5 * warble(2.5)])).double()
    whole = vocoder(mel)
    vocoder.piece = frames * hop_length / 16_000
    assert mel.shape[-1] > 2 * frames
    torch.testing.assert_close(vocoder(mel), whole, rtol=0, atol=1e-8)


def test_a_shorter_reach_would_be_heard():
    vocoder = GriffinLim(**SETTINGS, iterations=4).double()
    mel = LogMel(**SETTINGS)(warble(2.5)).double()
    whole = vocoder(mel)
    vocoder.piece = 0.5
    vocoder.reach = Reach(vocoder.reach.step, vocoder.reach.before / 4, vocoder.reach.after / 4)
    assert (vocoder(mel) - whole).abs().max() > 1e-4


def test_no_seam_is_heard():
    """Where pieces meet, spectrum and level are as close to what is wanted as in the whole, and nothing clicks."""
    wav = warble(6)
    vocoder, mel = GriffinLim(**SETTINGS), LogMel(**SETTINGS)(wav)
    whole = vocoder(mel)[:, 0]
    vocoder.piece = 0.5
    pieces = vocoder(mel)[:, 0]
    assert not torch.equal(pieces, whole)

    def errors(back: torch.Tensor) -> torch.Tensor:
        """Of each frame: distance of spectra, of levels, and the sharpest bend."""
        spectrum = (LogMel(**SETTINGS)(back) - mel)[0].abs().mean(0)
        level = (back.view(-1, 160).square().mean(1) / wav.view(-1, 160).square().mean(1)).log().abs()
        return torch.stack([spectrum, level, back[0].diff(n=2, prepend=back[0, :2]).abs().view(-1, 160).amax(1)])

    frames = torch.arange(600)
    meeting = ((frames + 3) % 50 < 6) & (frames > 3) & (frames < 597)
    assert (errors(pieces)[:, meeting].mean(1) < 1.05 * errors(whole)[:, meeting].mean(1)).all()
    assert errors(pieces)[2, meeting].max() < 1.05 * errors(whole)[2, meeting].max()


def test_silence_stays_silent():
    assert GriffinLim(**SETTINGS)(torch.full((1, 64, 20), math.log(SETTINGS["floor"]) - 1)).abs().max() == 0


def test_refuses_frames_that_hardly_overlap():
    with pytest.raises(InputError, match="hop_length is 300"):
        GriffinLim(**SETTINGS | {"hop_length": 300})
