"""The experiment folder: which checkpoint fits, and what config a run that goes on keeps."""

import pytest
import torch
from torch import nn

from vaura import experiment
from vaura.config import compose, load_config
from vaura.errors import InputError


def test_a_folder_that_is_no_experiment_names_the_nearest(tmp_path):
    (tmp_path / "2026-01-01T10-00-00").mkdir()
    with pytest.raises(InputError, match=r"is no experiment: it has no config.yaml.*Did you mean '2026-01-01T10-00-00'"):
        experiment.load(tmp_path / "2026-01-01T10-00-01")


def test_a_checkpoint_fits_the_model_it_was_made_of_and_no_other(tmp_path):
    model, path = nn.Linear(3, 2), tmp_path / "a.ckpt"
    torch.save({"state_dict": model.state_dict()}, path)
    content = experiment.read_checkpoint(path)
    experiment.check_model(content, nn.Linear(3, 2), path)
    with pytest.raises(InputError, match=r"weight is shape \(2, 3\) in it and shape \(4, 3\) in the config's"):
        experiment.check_model(content, nn.Linear(3, 4), path)
    with pytest.raises(InputError, match=r"bias is shape \(2,\) in it and missing in the config's"):
        experiment.check_model(content, nn.Linear(3, 2, bias=False), path)
    with pytest.raises(InputError, match="no state of its training"):
        experiment.check_resumable(path, model)


def test_a_run_that_goes_on_keeps_its_config_and_its_model(tmp_path):
    """What may change is how long and how it is trained; a key that decides what a checkpoint means may not."""
    folder = tmp_path / "experiment"
    experiment.begin(compose("train", ["lm.dim=64"]), folder)
    saved = (folder / "config.yaml").read_text()
    experiment.begin(compose("train", ["lm.dim=64", "trainer.max_steps=9", "resume=a.ckpt"]), folder)
    assert (folder / "config.yaml").read_text() == saved
    assert load_config(folder / "config.yaml").lm.dim == 64
    for change, told in (("lm.dim=32", "lm.dim=64, not 32"), ("tokenizer=encodec_24khz", "tokenizer._target_=")):
        with pytest.raises(InputError, match=told):
            experiment.begin(compose("train", ["lm.dim=64", change]), folder)
    assert (folder / "config.yaml").read_text() == saved
