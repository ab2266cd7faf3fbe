import math

import pytest
import torch
from torch import Tensor, nn

from vaura.conditioner import ChannelConditioner
from vaura.lm.engine import engine_for
from vaura.lm.llama import TokenLM
from vaura.lm.native import NoLibrary, library
from vaura.lm.sampling import Guidance, Sampler
from vaura.protocols import ABSENT, Condition
from vaura.task.optimizer import Optimizer
from vaura.task.token_prediction import TokenPrediction
from vaura.timing import Window, cover

pytestmark = pytest.mark.filterwarnings("ignore:.*self.trainer:UserWarning")  # steps without a Trainer
K, V, E = 2, 8, 5
SAMPLED = Sampler(1.0)


class Tones(nn.Module):
    """A tokenizer whose frame of 24 samples holds one number, the digits of which are the codes."""

    num_codebooks, codebook_size, sample_rate, channels, frame_rate = K, V, 600, 1, 25.0

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.drop = nn.Dropout(0.5)

    def num_frames(self, duration: float) -> int:
        return cover(duration, self.frame_rate)

    def encode(self, wav: Tensor) -> Tensor:
        number = (
            (self.drop(self.gain * wav)[:, 0, : wav.shape[2] // 24 * 24].unflatten(1, (-1, 24)).mean(2) * 64).round().long()
        )
        return torch.stack([number // V, number % V], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        return ((codes[:, 0] * V + codes[:, 1]) / 64.0).repeat_interleave(24, dim=1).unsqueeze(1)

    def stream(self, pieces):
        return (self.decode(codes) for codes in pieces)


class Eyes(nn.Module):
    """An encoder whose feature is the mean picture, five times."""

    dim, frame_rate, fps, size, resize, segment, context = E, 12.5, 12.5, 2, 2, 1, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1 / 255))

    def forward(self, video: Tensor) -> Tensor:
        return (video.float() * self.scale).mean((2, 3, 4)).unsqueeze(-1).expand(-1, -1, E)


def make(seed: int = 0, **settings) -> TokenPrediction:
    torch.manual_seed(seed)
    return TokenPrediction(
        Tones(),
        Eyes(),
        ChannelConditioner,
        lambda **sizes: TokenLM(num_layers=1, dim=16, num_heads=2, channels=8, ffn_multiple=8, **sizes),
        Optimizer(lr=0.02),
        **settings,
    )


def stir(task: TokenPrediction) -> TokenPrediction:
    for parameter in task.lm.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.4)
    return task


def some_batch(batch: int = 4, seed: int = 0) -> dict:
    """A second of clips in which the picture's brightness is the first code, every two token frames another."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, V, (batch, 13), generator=generator)
    video = (first * 32 + 8).to(torch.uint8)[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    codes = torch.stack([first.repeat_interleave(2, dim=1), torch.randint(0, V, (batch, 26), generator=generator)], dim=1)
    return {"id": [str(n) for n in range(batch)], "start": torch.zeros(batch), "video": video, "audio": Tones().decode(codes)}


def test_a_checkpoint_holds_what_was_trained_and_loads_strictly():
    task, other = stir(make()), make(seed=1)
    state = task.state_dict()
    learning = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert set(state) == learning
    assert not any(name.startswith(("tokenizer", "encoder")) for name in state)
    assert {name for name, _ in task.named_parameters()} - learning == {"tokenizer.gain", "encoder.scale"}
    other.load_state_dict(state)
    batch = some_batch()
    with torch.no_grad():
        losses = [model.eval().losses(batch, lambda codes: codes, None) for model in (task, other)]
    assert torch.equal(*losses)


def test_a_state_that_does_not_fit_is_an_error():
    task, state = make(), make().state_dict()
    lost = {key: value for key, value in state.items() if key != "lm.norm.weight"}
    with pytest.raises(RuntimeError, match=r"lm\.norm\.weight"):
        task.load_state_dict(lost)
    with pytest.raises(RuntimeError, match=r"lm\.other"):
        task.load_state_dict({**state, "lm.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        task.load_state_dict({**state, "lm.norm.weight": torch.zeros(7)})
    task.load_state_dict(lost, strict=False)


def test_the_frozen_parts_stay_in_evaluation_and_unlearnt():
    task = make().train()
    assert task.lm.training
    assert not task.tokenizer.training
    assert not task.encoder.training
    batch = some_batch()
    assert torch.equal(task.tokenise(batch)[0], task.tokenise(batch)[0])  # its dropout is off
    task.training_step(batch, 0).backward()
    assert task.tokenizer.gain.grad is None
    assert task.encoder.scale.grad is None


def test_tokens_made_beforehand_are_taken_as_they_are():
    task, batch = stir(make()).eval(), some_batch()
    codes, features = task.tokenise(batch)
    made = {"id": batch["id"], "codes": codes, "features": features}
    with torch.no_grad():
        assert torch.equal(task.losses(made, lambda c: c, None), task.losses(batch, lambda c: c, None))


def test_history_is_hidden_before_a_frame_only():
    torch.manual_seed(0)
    codes = torch.randint(0, V, (400, K, 10))
    given = make(hide_history=0.75)._hide(codes)
    hidden = given == ABSENT
    assert torch.equal(given[~hidden], codes[~hidden])
    assert (hidden == hidden[:, :1]).all()  # the same frames of every codebook
    until = hidden[:, 0].sum(1)
    assert torch.equal(hidden[:, 0], torch.arange(10) < until.unsqueeze(1))
    # a quarter is left alone, and a frame of 0 hides nothing either: 1 - 0.75 * 0.9, within three standard deviations
    assert float((until == 0).float().mean()) == pytest.approx(0.325, abs=0.075)
    assert set(until.tolist()) == set(range(10))
    assert torch.equal(make(hide_history=0.0)._hide(codes), codes)


def test_every_code_is_scored_even_where_history_is_hidden():
    task = make(hide_history=1.0)
    losses = task.losses(some_batch(), lambda codes: torch.full_like(codes, ABSENT), None)
    assert losses.tolist() == pytest.approx([math.log(V)] * K)  # the heads are still zero


def test_guidance_rows_are_the_clips_and_then_exactly_the_null():
    task, features = make(), torch.randn(3, 13, E)
    whole = Window(0, 26, 0)
    given = task.condition(features, whole, Guidance(1.0)).channel
    both = task.condition(features, whole, Guidance(3.0)).channel
    null = task.conditioner(task.conditioner.null.expand(3, 13, -1), 26).channel
    torch.testing.assert_close(both, torch.cat([given, null]), atol=1e-6, rtol=0)
    others = task.condition(torch.randn(3, 13, E), whole, Guidance(3.0)).channel
    assert torch.equal(others[3:], both[3:])  # not a trace of the features


@pytest.mark.parametrize(("share", "blind"), [(1.0, True), (0.0, False)])
def test_training_drops_the_condition_as_often_as_asked(share, blind):
    task = stir(make(drop_condition=share))
    dark, light = some_batch(), {**some_batch(), "video": some_batch(seed=1)["video"]}
    with torch.no_grad():
        assert (task.training_step(dark, 0) == task.training_step(light, 0)) == blind


@pytest.mark.parametrize("duration", [1.0, 0.99, 0.5017, 1.04, 2 / 3])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_sound_lasts_exactly_as_long_as_asked(duration, guidance):
    task = stir(make()).eval()
    features = torch.randn(2, cover(duration, 12.5), E)
    how = {"seeds": [0, 1], "sampler": SAMPLED, "guidance": guidance, "window": 0.4, "stride": 0.2}
    wavs = task.generate(features, duration, **how)
    assert [wav.shape for wav in wavs] == [(1, math.floor(duration * 600 + 0.5))] * 2
    assert not any(wav.requires_grad for wav in wavs)


def test_a_sound_to_go_on_from_is_where_the_sound_begins():
    task, batch = stir(make()).eval(), some_batch(2)
    begun = batch["audio"][..., : 24 * 7]
    how = {"seeds": [0, 1], "sampler": SAMPLED, "guidance": 1.0, "window": 0.4, "stride": 0.2}
    wav = torch.stack(task.generate(task.tokenise(batch)[1], 1.0, prompt=begun, **how))
    assert torch.equal(wav[..., : 24 * 7], begun)
    assert not torch.equal(wav, torch.stack(task.generate(task.tokenise(batch)[1], 1.0, **how)))


@pytest.mark.parametrize("loop", ["windows", "rolling"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_long_sound_sees_the_feature_of_each_instant(loop, guidance):
    """An LM without layers that says what it sees: the number of a feature, in windows far behind the first too."""
    task = make()
    task.lm = TokenLM(K, V, num_layers=0, dim=2 * V, num_heads=1, channels=V, pattern="parallel")
    for k in range(K):
        nn.init.zeros_(task.lm.embeddings[k].weight)
        task.lm.heads[k].weight.data = torch.eye(V, 2 * V)
    shown = torch.randint(0, V, (60,), generator=torch.Generator().manual_seed(0))

    class Label(nn.Module):
        def forward(self, features, frames, drop=None, start=0):
            at = torch.arange(start, start + frames) // 2  # two token frames a feature
            channel = features[:, int(at[0]) : int(at[-1]) + 1][:, at - at[0]]
            return Condition(channel if drop is None else torch.zeros_like(channel), start)

    task.conditioner = Label()
    how = {"seeds": [0], "sampler": Sampler(0.0), "guidance": guidance, "window": 0.8, "stride": 0.44, "loop": loop}
    codes = task.eval().sample(torch.eye(V)[shown].unsqueeze(0), 4.8, **how)
    assert torch.equal(codes, shown.repeat_interleave(2).expand(1, K, -1))


@pytest.mark.parametrize("alignment", ["time", "repeat"])
@pytest.mark.parametrize("guidance", [1.0, Guidance(3.0, end=1.5)], ids=["plain", "guided"])
@pytest.mark.parametrize("loop", ["windows", "rolling"])
@pytest.mark.parametrize("begun", [0, 7])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_clips_of_different_lengths_sound_as_they_do_alone(alignment, guidance, loop, begun, engine):
    if loop == "rolling" and guidance != 1.0:
        guidance = Guidance(3.0)
    task = stir(make()).eval()
    rate = {"feature_rate": 12.5, "frame_rate": 25.0}
    task.conditioner = ChannelConditioner(E, 8, **rate, alignment=alignment, repeat=3 if alignment == "repeat" else None)
    nn.init.normal_(task.conditioner.fc1.weight)
    nn.init.normal_(task.conditioner.fc2.weight)
    seconds, seeds = [0.5, 2.4, 1.0, 1.0, 0.96], [1, 2, 3, 3, 4]
    # with "repeat" a feature lasts longer than it is on show, so more than a clip shows are never asked for
    features = [torch.randn(1, cover(duration, 12.5) + 1, E) for duration in seconds]
    prompt = some_batch(5)["audio"][..., : 24 * begun] if begun else None
    made = engine_for(task.lm, "float32", engine if library_or_none() else "torch")

    def codes(clips: list[int]) -> Tensor:
        return task.sample(
            [features[b] for b in clips],
            [seconds[b] for b in clips],
            seeds=[seeds[b] for b in clips],
            sampler=SAMPLED,
            guidance=guidance,
            window=0.64,
            stride=0.24,
            loop=loop,
            prompt=None if prompt is None else prompt[clips],
            engine=made,
        )

    together = codes([0, 1, 2, 3, 4])
    assert together.shape == (5, K, 60)
    for b, duration in enumerate(seconds):
        length = cover(duration, 25.0)
        assert torch.equal(together[b : b + 1, :, :length], codes([b]))
        assert (together[b, :, length:] == ABSENT).all()
    assert not torch.equal(together[2], together[3])  # one seed, another picture


def library_or_none() -> object:
    try:
        return library()
    except NoLibrary:
        return None


def test_each_clip_is_decoded_to_its_own_end_and_no_further(monkeypatch):
    task, seen = stir(make()).eval(), []
    decode = task.tokenizer.decode
    monkeypatch.setattr(task.tokenizer, "decode", lambda codes: seen.append(codes) or decode(codes))
    seconds = [0.5, 1.0, 0.5]
    features = [torch.randn(1, 13, E) for _ in seconds]
    how = {"seeds": [0, 1, 2], "sampler": SAMPLED, "guidance": 2.0, "window": 0.4, "stride": 0.2}
    wavs = task.generate(features, seconds, **how)
    assert [wav.shape for wav in wavs] == [(1, round(duration * 600)) for duration in seconds]
    assert sorted(len(codes) for codes in seen) == [1, 2]
    assert all((codes != ABSENT).all() for codes in seen)


def test_a_stream_is_the_sound_and_looks_no_further_than_it_must():
    class Watched:
        """Features that remember which of them were asked for."""

        def __init__(self, features: Tensor) -> None:
            self.features, self.shape, self.device, self.stop = features, features.shape, features.device, 0

        def __len__(self) -> int:
            return 1

        def __getitem__(self, key):
            self.stop = max(self.stop, key[1].stop)
            return self.features[key]

    task = stir(make()).eval()
    features = torch.randn(1, 50, E)
    how = {"seeds": [5], "sampler": SAMPLED, "guidance": 2.0, "window": 0.8, "stride": 0.4}
    (whole,) = task.generate(features, 3.99, **how)
    watched = Watched(features)
    stops, pieces = [], []
    for piece in task.stream([watched], 3.99, **how):
        assert not piece.requires_grad
        pieces.append(piece)
        stops.append(watched.stop)
    assert torch.equal(torch.cat(pieces, 2)[0], whole)
    assert len(stops) == 9
    assert stops == sorted(stops)
    assert (stops[0], stops[-1]) == (10, 50)


def test_training_learns_to_look_at_the_picture():
    task, unseen = make(drop_condition=0.2, hide_history=0.5), some_batch(8, seed=99)
    made = task.optimizer_of(task, 100)
    for step in range(100):
        made["optimizer"].zero_grad()
        loss = task.training_step(some_batch(16, seed=step), step)
        if step == 0:
            assert float(loss.detach()) == pytest.approx(math.log(V))
        loss.backward()
        made["optimizer"].step()
    task.eval()
    with torch.no_grad():
        seeing = task.losses(unseen, lambda codes: codes, None)
        blind = task.losses(unseen, lambda codes: codes, torch.ones(8, dtype=torch.bool))
    assert seeing[0] < 0.5 * math.log(V)  # the first code is in the picture
    assert blind[0] > seeing[0] + 0.3  # of a pair, the first is a guess without it
    assert seeing[1] > 0.9 * math.log(V)  # the second is chance in both


def test_a_batch_without_a_readable_clip_is_passed_over():
    task = make()
    loss = task.training_step(None, 0)
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in task.parameters() if p.requires_grad)  # and every one has a gradient, as DDP wants
    task.validation_step(None, 0)
