"""Training and fine-tuning from shards: the codes and features of the model's own tokenizer and encoder, and of no others."""

import json

import pytest
import torch

from vaura import experiment
from vaura.data.manifest import read_manifest, write_manifest
from vaura.data.packing import pack
from vaura.data.prepared import MANIFEST, part_path, write_part
from vaura.launch import run
from vaura.media.audio import read_audio
from vaura.media.video import read_video
from vaura.train import makers_of

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.filterwarnings("ignore:This DataLoader will create")]


@pytest.fixture(scope="module")
def shards(tiny, tmp_path_factory):
    """What the tiny experiment's tokenizer and encoder make of its clips."""
    folder, (task, _) = tmp_path_factory.mktemp("prepared"), experiment.load(tiny.folder)
    makers, clips = makers_of(task), read_manifest(tiny.manifest)
    for clip in clips:
        size = task.encoder.size
        wav = read_audio(clip.video, 0.0, clip.duration, task.tokenizer.sample_rate, 1)
        frames = read_video(clip.video, 0.0, clip.duration, task.encoder.fps, size)
        frames = frames[: len(frames) // task.encoder.segment * task.encoder.segment]
        with torch.no_grad():
            codes, features = task.tokenizer.encode(wav[None])[0], task.encoder(frames[None])[0]
        for kind, name, tensor, rate, maker in (
            ("codes", "codes", codes, task.tokenizer.frame_rate, "tokenizer"),
            ("tiny", "features", features, task.encoder.frame_rate, "encoder"),
        ):
            write_part(part_path(folder, kind, clip.id), {name: tensor}, {"frame_rate": rate, "fingerprint": makers[maker]})
    write_manifest(folder / MANIFEST, clips)
    pack(folder, ["codes", "tiny"], clips=2)
    return folder / "shards"


def asked(shards, out):
    few = "data.duration=0.64 data.batch_size=2 data.workers=0 trainer.max_steps=2 trainer.val_check_interval=2"
    given = f"data=packed data.data_dir={shards} trainer.accelerator=cpu logging.preview_clips=1 hydra.run.dir={out}"
    return [*few.split(), *given.split()]


def test_a_model_goes_on_with_shards_of_its_own_parts(tiny, shards, tmp_path):
    assert run(["config=finetune", f"experiment_path={tiny.folder}", *asked(shards, tmp_path / "new")]) == 0
    result = json.loads((tmp_path / "new/finetune.json").read_text())
    assert result["before"].keys() == result["after"].keys() == {"validation_loss"}
    assert torch.load(tmp_path / "new/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_shards_of_other_parts_are_refused(tiny, shards, tmp_path, capsys):
    parts = [
        f"tokenizer.weights={tiny.folder}/tokenizer.safetensors",
        "tokenizer.codebook_size=16",
        "tokenizer.num_codebooks=2",
    ]
    assert run(["config=train", *parts, *asked(shards, tmp_path / "one")]) == 2
    assert "give encoder.weights=ITS_FILE" in capsys.readouterr().err
