"""PerceptAlign's loss, in the form that trains; recorded numbers of the other one are in tests/reference."""

import pytest
import torch
from torch import Tensor

from vaura.conditioner import PrefixConditioner
from vaura.errors import InputError
from vaura.lm.llama import TokenLM
from vaura.protocols import ABSENT
from vaura.task.alignment import Alignment, alignment_loss, cross_entropies, lag_shares, resampled
from vaura.task.optimizer import Optimizer
from vaura.task.token_prediction import TokenPrediction
from vaura.tokenizer.specvqgan import SpecVQGAN
from vaura.vocoder.griffin_lim_decibel import GriffinLimDecibel

pytestmark = pytest.mark.filterwarnings("ignore:.*self.trainer:UserWarning")  # steps without a Trainer
BANDS, STRIDE, CODES, E, FEATURES, FRAMES = 8, 4, 6, 5, 12, 12


class Stored(torch.nn.Module):
    """An encoder whose features come with the batch."""

    dim, frame_rate, fps, size, resize, segment, context = E, 21.5, 21.5, 2, 2, 1, 0.0


def tokenizer() -> SpecVQGAN:
    torch.manual_seed(0)
    sizes = {"width": 8, "multipliers": (1, 1, 1), "blocks": 1, "attention": (2,), "latent_dim": 8, "codebook_dim": 4}
    mel = {"n_mels": BANDS}
    made = SpecVQGAN(GriffinLimDecibel(**mel), **mel, codebook_size=CODES, **sizes, window=FRAMES, overlap=0)
    made.learnt.fill_(True)
    return made


def make(alignment: bool = True, drop_condition: float = 0.0, **settings) -> TokenPrediction:
    settings = {"lags": 3, "segments": 6, "offset": 1, "width": 8} | settings
    codec = tokenizer()
    torch.manual_seed(0)
    return TokenPrediction(
        codec,
        Stored(),
        lambda **sizes: PrefixConditioner(features=FEATURES, **sizes),
        lambda **sizes: TokenLM(
            num_layers=1, dim=16, num_heads=2, pattern="flatten", style="gpt", max_positions=60, shared_codebook=True, **sizes
        ),
        Optimizer(lr=0.01),
        drop_condition=drop_condition,
        alignment=(lambda **sizes: Alignment(**sizes, **settings)) if alignment else None,
    )


def some_batch(batch: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "id": [str(n) for n in range(batch)],
        "start": torch.zeros(batch),
        "codes": torch.randint(0, CODES, (batch, BANDS // STRIDE, FRAMES), generator=generator),
        "features": torch.randn(batch, FEATURES, E, generator=generator),
    }


def stir(task: TokenPrediction) -> TokenPrediction:
    torch.manual_seed(2)
    for parameter in task.lm.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return task


def gradients(task: TokenPrediction) -> dict[str, float]:
    """Size of the gradient of every parameter that the alignment loss alone reaches."""
    task.losses(some_batch(), lambda codes: codes, None)
    if task.aligned.requires_grad:
        task.aligned.backward()
    return {name: float(p.grad.norm()) for name, p in task.named_parameters() if p.grad is not None and p.grad.any()}


# --- lags ---


def impulse(at: int, frames: int = 40) -> Tensor:
    vectors = torch.zeros(1, 1, frames)
    vectors[0, 0, at] = 1
    return vectors


@pytest.mark.parametrize("late", [-3, 0, 2])
def test_a_sound_that_is_late_peaks_at_its_lag(late):
    sound, picture = impulse(20 + late), impulse(20)
    shares = lag_shares(sound, picture, lags=5, segments=1, tau=0.01)
    assert shares.argmax() == 5 + late
    assert shares.sum().item() == pytest.approx(1)
    legacy = lag_shares(sound, picture, lags=5, segments=1, tau=0.01, form="legacy")
    assert legacy.argmax() == late % 11  # lag 0 at index 0


def test_across_the_border_of_segments_the_picture_goes_on():
    shares = lag_shares(impulse(19), impulse(21), lags=5, segments=2, tau=0.1)
    assert shares[0, 0].argmax() == 5 - 2
    legacy = lag_shares(impulse(19), impulse(21), lags=5, segments=2, tau=0.1, form="legacy")
    assert legacy[0, 0].max().item() == pytest.approx(1 / 11)


def test_what_never_changes_looks_aligned_in_the_recorded_form_alone():
    still = torch.ones(1, 4, 80) / 2
    assert lag_shares(still, still, 5, 4, 1.0).sub(1 / 11).abs().max() < 1e-6
    assert lag_shares(still, still, 5, 4, 1.0, "legacy")[..., 0].min() > 3 / 11


def test_the_loss_is_lowest_where_all_falls_on_lag_0():
    def of(lag: int, form: str = "fixed") -> float:
        shares = torch.zeros(2, 3, 11)
        shares[..., lag] = 1
        return float(alignment_loss(shares, 2, form))

    losses = [of(lag) for lag in range(11)]
    assert losses.index(min(losses)) == 5
    assert losses == pytest.approx(losses[::-1])
    bell = torch.exp(-(torch.arange(-2, 3).float() ** 2) / 2)
    assert losses[3:8] == pytest.approx((-(bell / bell.sum()).log()).tolist(), abs=1e-5)


# --- gradients ---


@pytest.mark.parametrize("through", ["straight_through", "expected"])
def test_gradients_reach_the_lm_the_conditioner_and_both_extractors(through):
    reached = gradients(stir(make(through=through)).train())
    parts = {".".join(name.split(".")[:2]) for name in reached}
    assert {"lm.blocks", "lm.heads", "lm.embeddings", "conditioner.embed", "alignment.audio", "alignment.video"} <= parts
    assert not any(name.startswith(("tokenizer", "encoder")) for name in reached)


def test_the_optimizer_holds_the_extractors():
    task = make()
    groups = task.optimizer_of(task, 10)["optimizer"].param_groups
    held = {id(p) for group in groups for p in group["params"]}
    assert {id(p) for p in task.alignment.parameters()} <= held
    assert {id(p) for p in task.tokenizer.parameters()}.isdisjoint(held)


def test_the_recorded_form_gives_no_gradient():
    task = stir(make(form="legacy")).train()
    assert gradients(task) == {}
    assert not any(p.requires_grad for p in task.alignment.parameters())
    plain, batch = stir(make(alignment=False)).train(), some_batch()
    for model in (task, plain):
        model.training_step(batch, 0).backward()
    ours, theirs = dict(task.named_parameters()), dict(plain.named_parameters())
    for name, parameter in theirs.items():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, msg=lambda told, name=name: f"{name}: {told}")
    assert task.training_step(batch, 0) > plain.training_step(batch, 0)  # its sum alone is another


def test_through_expectations_the_gradient_is_the_slope():
    """Against differences of the loss along one direction."""
    task = make(through="expected")
    task.alignment.eval().double()
    task.tokenizer.network.double().quantize.embedding.weight.data.mul_(20)  # so that codes make a difference
    features, generator = some_batch()["features"], torch.Generator().manual_seed(0)
    shape = (3, BANDS // STRIDE, FRAMES, CODES)
    logits, along = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def of(x: Tensor) -> Tensor:
        mel = task.alignment.mel_of(x)
        sound, picture = task.alignment.audio(mel), task.alignment.video(resampled(features.double(), mel.shape[2]))
        return alignment_loss(lag_shares(sound, picture, 3, 6, 0.1), 1)

    (gradient,) = torch.autograd.grad(of(logits.requires_grad_()), logits)
    with torch.no_grad():
        slope = (of(logits + 1e-4 * along) - of(logits - 1e-4 * along)) / 2e-4
    assert abs(slope) > 1e-6
    assert (gradient * along).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def test_cross_entropies_are_those_of_the_lm():
    task = stir(make()).eval()
    batch = some_batch()
    codes = batch["codes"].clone()
    codes[0, 1, 3:] = ABSENT
    condition = task.conditioner(batch["features"], FRAMES)
    torch.testing.assert_close(cross_entropies(task.lm(codes, condition), codes), task.lm.loss(codes, condition))


# --- what is learnt ---


def events(clips: int, frames: int, seed: int, late: int = 0) -> tuple[Tensor, Tensor]:
    """Mels (B, BANDS, frames) that begin to ring `late` frames after a feature (B, frames / 2, E) flashes."""
    generator = torch.Generator().manual_seed(seed)
    flashes = torch.rand(clips, frames // 2, generator=generator) < 0.1
    decay = torch.exp(-torch.arange(frames) / 3.0)
    at = torch.zeros(clips, frames)
    at[:, ::2] = flashes.float()
    ring = torch.stack(
        [torch.nn.functional.conv1d(one[None, None], decay.flip(0)[None, None], padding=frames - 1) for one in at]
    )
    mel = ring[:, 0, 0, :frames].roll(late, 1).clamp(max=1)[:, None] * torch.linspace(1, 0.2, BANDS)[:, None]
    features = 0.3 * torch.randn(clips, frames // 2, E, generator=generator)
    features[:, :, 0] += 2 * flashes
    return 2 * mel - 1 + 0.05 * torch.randn(clips, BANDS, frames, generator=generator), features


def test_extractors_learn_to_tell_late_mels_from_those_in_time():
    torch.manual_seed(0)
    loss = Alignment(tokenizer(), E, lags=8, segments=4, offset=2, width=16).train()
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    frames = 96

    def of(late: int) -> float:
        with torch.no_grad():
            return float(loss.eval().apart(*events(16, frames, seed=1000, late=late)))

    before = of(0)
    for step in range(60):
        optimizer.zero_grad()
        loss.train().apart(*events(8, frames, seed=step)).backward()
        optimizer.step()
    aligned, early, late = of(0), of(-6), of(6)
    assert aligned < before - 0.3
    assert aligned < min(early, late) - 0.3


# --- as a part of the task ---


def logged(task: TokenPrediction, monkeypatch) -> dict[str, float]:
    found: dict[str, float] = {}
    monkeypatch.setattr(task, "log", lambda name, value, **_: found.update({name: value.item()}))
    monkeypatch.setattr(task, "log_dict", lambda values, **_: found.update({k: v.item() for k, v in values.items()}))
    return found


def test_the_loss_is_logged_and_summed(monkeypatch):
    task = stir(make(weight=0.5, cross_entropy_weight=2.0))
    found, batch = logged(task, monkeypatch), some_batch()
    total = task.train().training_step(batch, 0)
    codebooks = [found[f"train/loss_codebook_{k}"] for k in range(2)]
    assert total.item() == pytest.approx(2.0 * sum(codebooks) / 2 + 0.5 * found["train/alignment"]) == found["train/loss"]
    task.eval().validation_step(batch, 0)
    assert {"val/loss", "val/alignment"} <= set(found)


def test_only_clips_that_see_their_picture_count_and_only_on_its_turn(monkeypatch):
    task, batch = stir(make(clips=1, every=2)).train(), some_batch()
    seen = []
    monkeypatch.setattr(task.alignment, "apart", lambda mel, features: seen.append(features) or mel.sum() * 0)
    task.losses(batch, lambda codes: codes, torch.tensor([True, False, False]))
    assert torch.equal(seen[0], batch["features"][1:2])
    task.losses(batch, lambda codes: codes, torch.ones(3, dtype=torch.bool))
    assert task.aligned is None
    monkeypatch.setattr(type(task), "global_step", 1)
    assert task.losses(batch, lambda codes: codes, None).isfinite().all()
    assert task.aligned is None
    task.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in task.alignment.parameters())  # processes wait for all of them
    task.eval()
    task.losses(batch, lambda codes: codes, None)
    assert task.aligned is not None


def test_memory_of_several_clips_gives_the_same_gradient():
    """Clip by clip, computed again in the backward pass, as all at once."""
    task = make()
    logits = torch.randn(3, BANDS // STRIDE, FRAMES, CODES, requires_grad=True)
    mel = task.alignment.mel_of(logits)
    (apart,) = torch.autograd.grad(mel.square().sum(), logits)
    network, table = task.tokenizer.network, task.tokenizer.network.quantize.embedding.weight
    expected = (logits.softmax(-1) @ table).movedim(-1, 1)
    hard = network.quantize.vectors(logits.argmax(-1))
    whole = network.picture(hard + expected - expected.detach())[:, 0]
    torch.testing.assert_close(mel, whole)
    (together,) = torch.autograd.grad(whole.square().sum(), logits)
    assert (apart - together).norm() < 1e-3 * together.norm()
    torch.testing.assert_close((mel + 1) / 2, mel_decoded(task, logits), atol=1e-5, rtol=0)


def mel_decoded(task: TokenPrediction, logits: Tensor) -> Tensor:
    inside = task.tokenizer.decode_mel(logits.argmax(-1))
    return torch.where((inside > 0) & (inside < 1), inside, (task.alignment.mel_of(logits).detach() + 1) / 2)


def test_a_checkpoint_holds_the_extractors():
    task, other = stir(make()), make()
    state = task.state_dict()
    assert {f"alignment.{part}.fc.weight" for part in ("audio", "video")} <= set(state)
    other.load_state_dict(state)
    batch = some_batch()
    with torch.no_grad():
        for model in (task, other):
            model.eval().losses(batch, lambda codes: codes, None)
    assert torch.equal(task.aligned, other.aligned)


def test_resampled_keeps_the_middles():
    features = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    assert resampled(features, 8)[0, 0].tolist() == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"form": "fixd"}, r"task\.alignment\.form=fixd is none of fixed, legacy\. Did you mean"),
        ({"through": "gumbel"}, r"through=gumbel is none of straight_through, expected"),
        ({"lags": 0}, r"task\.alignment\.lags is 0; give 1 or more"),
        ({"every": 0}, r"every is 0; give 1 or more"),
        ({"clips": 0}, r"clips is 0; give 1 or more"),
        ({"offset": 4}, r"offset is 4; choose from 0 to task\.alignment\.lags=3"),
        ({"tau": 0.0}, r"tau is 0\.0; give more than 0"),
    ],
)
def test_settings_out_of_range(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"segments": 5}, r"segments=5 does not divide the 48 mel frames of a clip; choose 4"),
        ({"segments": 24}, r"lags=3 reaches past a segment of 2 mel frames"),
        ({"segments": 20, "form": "legacy"}, r"segments=20 cuts 48 mel frames into 24 pieces.*choose 16"),
        ({"segments": 99, "form": "legacy"}, r"segments=99 cuts 48 mel frames"),
    ],
)
def test_segments_that_do_not_fit_the_clips(settings, sentence):
    task = make(**settings)
    with pytest.raises(InputError, match=sentence):
        task.losses(some_batch(), lambda codes: codes, None)


def test_the_recorded_form_takes_what_the_original_took():
    """7 pieces of 6 frames leave 6 of 48 over, an 8th piece: it stopped there; 9 pieces of 5 leave 3."""
    make(form="legacy", segments=9).losses(some_batch(), lambda codes: codes, None)
    with pytest.raises(InputError, match="segments=7 cuts 48 mel frames into 8"):
        make(form="legacy", segments=7).losses(some_batch(), lambda codes: codes, None)


def test_a_tokenizer_without_mels_is_refused():
    with pytest.raises(InputError, match=r"task\.alignment needs a tokenizer whose codes become a mel"):
        Alignment(torch.nn.Identity(), E)


def test_one_feature_has_no_time():
    with pytest.raises(InputError, match=r"needs features over time, and here is one; set conditioner\.features above 1"):
        Alignment(tokenizer(), E).apart(torch.zeros(1, BANDS, 48), torch.zeros(1, 1, E))
