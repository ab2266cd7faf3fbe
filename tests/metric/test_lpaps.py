from pathlib import Path

import numpy as np
import pytest
import torch

from vaura.errors import InputError
from vaura.metric.lpaps import LPAPS, published_keys
from vaura.metric.vggishish import POOL, VGGishish

LAYERS = (4, POOL, 6, 6)
BANDS = 16


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A codebook as published, of a smaller network; and the same trunk and weights in files of their own."""
    torch.manual_seed(0)
    net = VGGishish(3, layers=LAYERS, hidden=4, n_mels=BANDS)
    net.normalise_by(torch.linspace(0.2, 0.6, BANDS), torch.linspace(0.1, 0.3, BANDS))
    linear = {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in enumerate((4, 6))}
    names = published_keys(LAYERS)
    codebook = {names[key.replace("features", "net")]: v for key, v in net.state_dict().items() if key.startswith("features")}
    scaling = {"scaling_layer.shift": 2 * net.mean.view(1, 1, -1, 1) - 1, "scaling_layer.scale": 2 * net.std.view(1, 1, -1, 1)}
    whole = {f"loss.perceptual_loss.{key}": value for key, value in (codebook | linear | scaling).items()}
    torch.save({"state_dict": whole}, tmp_path / "codebook.ckpt")
    torch.save({key: value for key, value in net.state_dict().items() if "." in key}, tmp_path / "vggishish.pt")
    torch.save(linear, tmp_path / "lpaps.pt")
    rows = zip(net.mean.tolist(), net.std.tolist(), strict=True)
    (tmp_path / "statistics.txt").write_text("".join(f"{mean} {std}\n" for mean, std in rows))
    return {name: str(tmp_path / name) for name in ("codebook.ckpt", "vggishish.pt", "lpaps.pt", "statistics.txt")}


def mels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, BANDS, 20, generator=generator), torch.rand(2, BANDS, 20, generator=generator)


def test_it_is_a_distance(files):
    ours, (a, b) = LPAPS(files["codebook.ckpt"], files["codebook.ckpt"], layers=LAYERS), mels()
    assert torch.equal(ours(a, a), torch.zeros(2))
    assert (ours(a, b) > 0).all()
    torch.testing.assert_close(ours(a, b), ours(b, a))
    torch.testing.assert_close(ours.train()(a, b), ours.train()(a, b), atol=0, rtol=0)  # nothing is left to chance
    assert not any(p.requires_grad for p in ours.parameters())
    near = a + 0.1 * (b - a)
    assert (ours(a, near) < ours(a, b)).all()


def test_of_one_layer_in_closed_form(files):
    ours, (a, b) = LPAPS(files["codebook.ckpt"], files["codebook.ckpt"], layers=LAYERS), mels()
    one, two = (x[0] for x in (ours.look(a), ours.look(b)))
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (one, two)]
    want = torch.nn.functional.conv2d((unit[0] - unit[1]) ** 2, ours.lin[0]).mean((1, 2, 3))
    torch.testing.assert_close(ours.terms(a, b)[0], want)
    assert [x.shape[1:] for x in ours.look(a)] == [(4, 16, 20), (6, 8, 10)]


def test_files_of_their_own_say_the_same(files):
    whole = LPAPS(files["codebook.ckpt"], files["codebook.ckpt"], layers=LAYERS)
    parts = LPAPS(files["vggishish.pt"], files["lpaps.pt"], files["statistics.txt"], LAYERS)
    torch.testing.assert_close(parts(*mels()), whole(*mels()))


def test_it_refuses_to_compare_by_chance(files):
    with pytest.raises(InputError, match="no weights for trunk: give trunk=FILE"):
        LPAPS(None, files["lpaps.pt"])
    with pytest.raises(InputError, match="no weights for linear: give linear=FILE"):
        LPAPS(files["codebook.ckpt"], None)
    with pytest.raises(InputError, match="says how mels are normalised; give statistics=FILE"):
        LPAPS(files["vggishish.pt"], files["lpaps.pt"], layers=LAYERS)
    with pytest.raises(InputError, match=r"LPAPS trunk: .*lpaps.pt lacks 0.weight"):
        LPAPS(files["lpaps.pt"], files["lpaps.pt"], files["statistics.txt"], LAYERS)
    with pytest.raises(InputError, match=r"LPAPS linear: .*vggishish.pt lacks 0"):
        LPAPS(files["vggishish.pt"], files["vggishish.pt"], files["statistics.txt"], LAYERS)


def test_vggishish_refuses_what_is_not_whole(files, tmp_path):
    with pytest.raises(InputError, match="does not say how mels are normalised; give statistics=FILE"):
        VGGishish(3, files["vggishish.pt"], layers=LAYERS, hidden=4, n_mels=BANDS)
    with pytest.raises(InputError, match=r"VGGish-ish weights: .*classifier.4.weight has the shape"):
        VGGishish(5, files["vggishish.pt"], files["statistics.txt"], LAYERS, 4, BANDS)
    with pytest.raises(InputError, match="does not know how mels are normalised"):
        VGGishish(3, layers=LAYERS, hidden=4, n_mels=BANDS)(mels()[0])
    with pytest.raises(InputError, match="statistics are of 16 mel bands, and mels here have 80"):
        VGGishish(3, statistics=files["statistics.txt"], layers=LAYERS, hidden=4)


def test_its_own_state_holds_the_statistics(files, tmp_path):
    ours = VGGishish(3, files["vggishish.pt"], files["statistics.txt"], LAYERS, 4, BANDS)
    torch.save({"state_dict": ours.state_dict()}, tmp_path / "ours.ckpt")
    again = VGGishish(3, str(tmp_path / "ours.ckpt"), layers=LAYERS, hidden=4, n_mels=BANDS)
    mel = mels()[0]
    assert torch.equal(again(mel), ours(mel))


def test_the_published_container_is_unwrapped(files, tmp_path):
    inner = torch.load(files["vggishish.pt"], weights_only=True)
    metrics = {"accuracy": np.float64(0.3), "mAP": np.float32(0.2)}
    whole = {"loss": np.float64(2.5), "metrics": metrics, "epoch": 7, "optimizer": {"state": {}}, "model": inner}
    torch.save(whole, tmp_path / "vggishish16.pt")
    ours = VGGishish(3, str(tmp_path / "vggishish16.pt"), files["statistics.txt"], LAYERS, 4, BANDS)
    assert torch.equal(ours.features[0].weight, inner["features.0.weight"])


def test_a_band_that_never_changes_is_refused(files, tmp_path):
    state = torch.load(files["codebook.ckpt"], weights_only=True)["state_dict"]
    state["loss.perceptual_loss.scaling_layer.scale"][0, 0, 9] = 0
    torch.save({"state_dict": state}, tmp_path / "flat.ckpt")
    with pytest.raises(InputError, match=r"LPAPS: mel band 9 has the mean .* and the deviation 0, which is to be above 0"):
        LPAPS(str(tmp_path / "flat.ckpt"), files["lpaps.pt"], layers=LAYERS)
