import pytest
import torch
from torch import nn

from vaura.errors import InputError
from vaura.task.discriminators import (
    ActNorm,
    MelGANDiscriminator,
    MultiPeriod,
    MultiResolution,
    MultiScale,
    PatchDiscriminator,
    Resolution,
    Several,
    weight_norms,
)

SOUND = [
    (MelGANDiscriminator(width=4, layers=2), 3),
    (MultiPeriod(width=2), 5),
    (MultiScale(width=16), 3),
    (MultiResolution((256, 128), width=4), 2),
    (Several([MultiPeriod((2, 3), width=2), MultiResolution((64,), width=2)]), 3),
]


@pytest.mark.parametrize(("discriminator", "networks"), SOUND, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("samples", [2048, 2051, 130])
def test_sound_is_seen_by_every_network(discriminator: nn.Module, networks: int, samples: int):
    wav = torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(0), requires_grad=True)
    seen = discriminator(wav)
    assert len(seen) == networks
    for layers in seen:
        assert all(len(layer) == 2 for layer in layers)
        assert len(layers) > 2
    sum(layers[-1].sum() for layers in seen).backward()
    assert wav.grad.abs().sum() > 0


def test_patches_of_a_mel():
    mel = torch.randn(1, 1, 80, 848)
    ours = PatchDiscriminator()
    (layers,) = ours(mel)
    assert layers[-1].shape == (1, 1, 8, 104)  # as published
    assert [layer.shape[1] for layer in layers] == [64, 128, 256, 512, 1]
    assert PatchDiscriminator(8, bands=80)(mel)[0][-1].shape == (1, 1, 104)
    with pytest.raises(InputError, match=r"norm=bacth is none of batch, act.*Did you mean 'batch'"):
        PatchDiscriminator(norm="bacth")


def test_weights_of_another_discriminator_are_refused(tmp_path):
    torch.save({"state_dict": PatchDiscriminator(8).state_dict()}, tmp_path / "weights.ckpt")
    again = PatchDiscriminator(8, weights=str(tmp_path / "weights.ckpt"))
    assert torch.equal(
        again.main[0].weight, torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]["main.0.weight"]
    )
    with pytest.raises(InputError, match=r"discriminator's weights: .*main.0.weight has the shape"):
        PatchDiscriminator(4, weights=str(tmp_path / "weights.ckpt"))


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 3, 24)])
def test_act_norm_begins_with_the_first_batch(shape: tuple[int, ...]):
    norm, x = ActNorm(3), 7 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    others = (0, *range(2, x.ndim))
    assert torch.equal(norm.eval()(x), x)
    first = norm.train()(x)
    torch.testing.assert_close(first.mean(others), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.std(others), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        norm(2 * x), first + x * norm.scale.detach().view(1, 3, *[1] * (x.ndim - 2)), atol=1e-4, rtol=1e-4
    )


def test_a_period_mixes_no_columns():
    """A sample moves what is seen of its own place in the period, and nothing else."""
    period = MultiPeriod((5,), width=2).discriminators[0]
    wav = torch.randn(1, 1, 200)
    other = wav.clone()
    other[0, 0, 53] += 1  # the fourth of its period
    for one, two in zip(period(wav)[:-1], period(other)[:-1], strict=True):
        moved = (one - two).abs().amax((0, 1, 2))
        assert moved[3] > 0
        assert moved[[0, 1, 2, 4]].max() == 0


def test_white_noise_is_as_loud_at_every_resolution():
    noise, power = torch.randn(1, 1, 200_000, generator=torch.Generator().manual_seed(0)), []
    for n_fft in (1024, 128):
        ours, seen = Resolution(n_fft, width=1), []
        ours.convs[0].register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        ours(noise)
        power.append(seen[0].square().sum(1).mean())
    torch.testing.assert_close(torch.stack(power), torch.ones(2), atol=0.05, rtol=0)


def test_old_names_of_weight_norm():
    """Weights under their old names give what torch's own old weight norm gives."""
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Conv1d(2, 3, 5))
    new = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 5))
    nn.init.normal_(old.weight_g)
    state = weight_norms({f"x.{key}": value.detach() for key, value in old.state_dict().items()})
    new.load_state_dict({key.removeprefix("x."): value for key, value in state.items()})
    x = torch.randn(1, 2, 9)
    torch.testing.assert_close(new(x), old(x))
