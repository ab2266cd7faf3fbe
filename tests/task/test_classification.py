import math

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vaura.command import CONFIGS
from vaura.components import check_components, instantiate
from vaura.config import compose, load_config
from vaura.data.stored import MEL, StoredClip, StoredData
from vaura.errors import InputError
from vaura.metric.classifier import statistics_of
from vaura.metric.melception import Melception
from vaura.metric.vggishish import VGGishish
from vaura.task.classification import Classification


class Bands(Dataset):
    """Mels with a bright band for each class."""

    def __init__(self, labels, mels=None):
        self.clips = [StoredClip(str(place), "train", None, str(place), label) for place, label in enumerate(labels)]
        draw = torch.Generator().manual_seed(0)
        self.mels = 0.3 * torch.rand(len(labels), 80, 64, generator=draw)
        for mel, label in zip(self.mels, labels, strict=True):
            mel[20 * label : 20 * label + 20] += 0.5

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return {"id": self.clips[index].id, "mel": self.mels[index], "label": torch.tensor(self.clips[index].label)}


def small(num_classes=3):
    torch.manual_seed(0)
    return VGGishish(num_classes, layers=(4, "MP", 8, "MP"), hidden=16)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-3)


def learn(task, labels, steps=40, folder=None):
    return fit(task, DataLoader(Bands(labels), 6, shuffle=True), DataLoader(Bands(labels), 5), steps, folder)


def fit(task, training, validation, steps, folder):
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(task, training, validation)
    return trainer.callback_metrics


def test_it_learns_what_is_plain(alone, tmp_path):
    task = Classification(small(), adam)
    found = learn(task, [0, 1, 2] * 6, folder=tmp_path)
    assert found["val/accuracy_1"] == found["val/mAP"] == found["val/mAUC"] == 1
    assert found["val/loss"] < 0.3 < math.log(3)
    mean, std = statistics_of(Bands([0, 1, 2] * 6).mels)
    assert torch.allclose(task.network.mean, mean)
    assert torch.allclose(task.network.std, std)


def test_stored_mels_with_labels(alone, tmp_path):
    """The loaders of a corpus of arrays, whose keys are not plain numbers; measuring does not disturb their order."""
    for place, label in enumerate(["cat", "dog", "owl"] * 3):
        path = tmp_path / label / MEL / f"video_{place:05d}_mel.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        mel = 0.3 * np.random.RandomState(place).rand(80, 70).astype(np.float32)
        mel[20 * (place % 3) : 20 * (place % 3) + 20] += 0.5
        np.save(path, mel)
    lines = [f"{path.parent.parent.name}/{path.stem.removesuffix('_mel')}" for path in sorted(tmp_path.rglob("*.npy"))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    lists = dict.fromkeys(("train", "val"), str(tmp_path / "list.txt"))
    data = StoredData(data_dir=str(tmp_path), lists=lists, features=1, batch_size=3, workers=0, mel_frames=64)
    task = Classification(small(), adam, class_weighted=True)
    found = fit(task, data.loader("train"), data.loader("val"), 40, tmp_path)
    assert found["val/accuracy_1"] == 1
    assert task.class_weights.tolist() == pytest.approx([1, 1, 1])
    mean, _ = statistics_of(item["mel"] for item in data.items("train"))
    assert torch.allclose(task.network.mean, mean, atol=1e-6)


def test_what_it_saves_is_the_whole_classifier(alone, tmp_path):
    task = Classification(small(), adam, measured=4)
    learn(task, [0, 1, 2], 2, tmp_path)
    task.save_classifier(tmp_path / "classifier.safetensors")
    again = VGGishish(3, str(tmp_path / "classifier.safetensors"), layers=(4, "MP", 8, "MP"), hidden=16)
    mel = torch.rand(2, 80, 64)
    assert torch.equal(again.eval()(mel), task.network.eval()(mel))


def test_statistics_that_are_given_stay(alone, tmp_path):
    network = small()
    network.normalise_by(torch.zeros(80), torch.ones(80))
    learn(Classification(network, adam), [0, 1, 2], 1, tmp_path)
    assert not network.mean.any()


def test_rare_classes_count_as_much(alone, tmp_path):
    task = Classification(small(), adam, class_weighted=True)
    learn(task, [0] * 9 + [1] * 3 + [2] * 3, 1, tmp_path)
    assert task.class_weights.tolist() == pytest.approx([3 / 7, 9 / 7, 9 / 7])


def test_a_second_head_learns_where_it_is_asked_to():
    mel, label = torch.rand(3, 80, 80), torch.tensor([0, 1, 2])
    for weight, learns in ((0.4, True), (0.0, False)):
        network = Melception(3)
        network.normalise_by(torch.full((80,), 0.5), torch.ones(80))
        task = Classification(network, adam, auxiliary=weight)
        task.log = lambda *_, **__: None
        loss = task.training_step({"id": ["a", "b", "c"], "mel": mel, "label": label}, 0)
        loss.backward()
        assert (network.AuxLogits.fc.weight.grad is not None) is learns
        assert sum(group.numel() for group in task.configure_optimizers().param_groups[0]["params"]) == sum(
            p.numel() for name, p in network.named_parameters() if learns or "AuxLogits" not in name
        )


def test_a_batch_of_nothing_teaches_nothing():
    task = Classification(small(), adam)
    assert task.training_step(None, 0).item() == 0
    assert task.validation_step(None, 0) is None


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="VGGishish has no second head"):
        Classification(small(), adam, auxiliary=0.4)
    network = small()
    network.normalise_by(torch.zeros(80), torch.ones(80))
    for label, told in ((-1, "a clip has no label"), (3, "a clip is of class 3")):
        with pytest.raises(InputError, match=told):
            Classification(network, adam).training_step({"mel": torch.rand(1, 80, 64), "label": torch.tensor([label])}, 0)


@pytest.mark.parametrize("name", ["melception", "vggishish"])
def test_the_published_recipe(name):
    config = compose(CONFIGS / f"experiments/specvqgan/vggsound_{name}.yaml")
    check_components(config.task)
    assert config.task.network.num_classes == 309
    optimizer = instantiate(config.task.optimizer)([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 3e-4
    assert load_config(CONFIGS / f"task/classifier_{name}.yaml") == config.task
