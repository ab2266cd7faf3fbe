"""Networks taught alone, tiny, from a corpus of arrays and from videos; and the transformer that learns over one of them."""

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vaura import experiment
from vaura.components import instantiate
from vaura.config import compose, load_config
from vaura.errors import InputError
from vaura.launch import run
from vaura.lm.sampling import Sampler
from vaura.task.classification import Classification
from vaura.train import build_trainer
from vaura.train_part import check_logging, load_data, settled

COLUMNS, CLASSES = 48, 2
KINDS = ("feature_rgb_bninception_dim1024_21.5fps", "feature_flow_bninception_dim1024_21.5fps")
TRAINER = "trainer.max_epochs=null trainer.check_val_every_n_epoch=null trainer.log_every_n_steps=1 trainer.accelerator=cpu"
CODEC = (
    "tokenizer.width=8 tokenizer.multipliers=[1,1,1,1,1] tokenizer.blocks=1 tokenizer.latent_dim=8 tokenizer.codebook_dim=8 "
    "tokenizer.codebook_size=16 tokenizer.window=3 tokenizer.overlap=1 tokenizer.vocoder.iterations=2"
)
TRANSFORMER = "lm.num_layers=1 lm.dim=32 lm.num_heads=2 conditioner.features=3 logging.patience=9 task.optimizer.lr=1e-2"

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Six clips of two classes, whose mels are rows of waves, and their features."""
    place = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    lines = []
    for number in range(6):
        kind = ("bell", "drum")[number % CLASSES]
        folder = place / kind
        for sub in ("melspec_10s_22050hz", *KINDS):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        wave = 0.5 + 0.4 * np.sin(
            np.arange(80)[:, None] / (30 + 9 * (number % CLASSES)) + np.arange(COLUMNS + 12) / (9 + 5 * number)
        )
        np.save(folder / "melspec_10s_22050hz" / f"clip_{number}_mel.npy", wave.astype(np.float32))
        for sub in KINDS:
            (folder / sub / f"clip_{number}.pkl").write_bytes(pickle.dumps(draw.random((12, 4), dtype=np.float32), 3))
        lines.append(f"{kind}/clip_{number}")
    (place / "train.txt").write_text("\n".join(lines[:4]))
    (place / "valid.txt").write_text("\n".join(lines[4:]))
    return place


@pytest.fixture(scope="module")
def data(corpus) -> list[str]:
    lists = f"data.lists.train={corpus / 'train.txt'} data.lists.val={corpus / 'valid.txt'}"
    sizes = f"data.mel_frames={COLUMNS} data.feature_frames=12 data.feature_crop=10 data.batch_size=2 data.workers=0"
    return [f"data.data_dir={corpus}", *lists.split(), *sizes.split()]


def command(name: str, folder: Path, steps: int, *more: str) -> list[str]:
    every = [f"trainer.max_steps={steps}", "trainer.val_check_interval=2", f"hydra.run.dir={folder}"]
    return [f"config=configs/experiments/specvqgan/{name}.yaml", *every, *TRAINER.split(), *more]


@pytest.fixture(scope="module")
def codebook(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codebook") / "run"
    adversary = ["task.adversary.discriminator.width=4", "task.adversary.start=30", "task.optimizer.lr=1e-2"]
    words = command("vas_codebook", folder, 40, *data, *CODEC.split(), *adversary, "task.revive_every=4", "data.features=3")
    assert run([*words, "logging.preview_clips=1"]) == 0
    return folder


def board_of(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "audio": 0})
    return board.Reload()


def test_a_codebook_learns_and_is_looked_at_and_listened_to(codebook):
    board = board_of(codebook)
    losses = [event.value for event in board.Scalars("val/rec")]
    assert min(losses) < 0.8 * losses[0]
    tags = board.Tags()
    assert {"val/codes_used", "val/perplexity", "train/g_loss", "train/d_loss", "train/d_weight"} <= set(tags["scalars"])
    assert "bell/clip_4/mel" in tags["images"]
    assert {"bell/clip_4/true", "bell/clip_4/reconstructed"} <= set(tags["audio"])


def test_what_was_taught_is_a_tokenizer(codebook):
    config = load_config(codebook / "config.yaml")
    config.tokenizer.weights = str(codebook / "tokenizer.safetensors")
    tokenizer = instantiate(config.tokenizer)
    codes = tokenizer.encode(0.1 * torch.randn(2, 1, 9000))
    assert codes.shape == (2, 5, 3)
    assert tokenizer.decode(codes).shape == (2, 1, 3 * 4096)


def test_an_interrupted_codebook_goes_on(data, codebook, tmp_path, capsys):
    words = [*data, *CODEC.split(), "task.adversary.discriminator.width=4", "data.features=3", "logging.preview_clips=0"]
    words.append("logging.last_every=1")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(command("vas_codebook", whole, 4, *words)) == 0
    assert run(command("vas_codebook", halves, 2, *words)) == 0
    assert run(command("vas_codebook", halves, 4, *words)) == 0
    one, other = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (whole, halves))
    assert one["batches"] == other["batches"] == 4
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def transformer(data, codebook, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transformer") / "run"
    words = [*data, *CODEC.split(), *TRANSFORMER.split(), f"tokenizer.weights={codebook / 'tokenizer.safetensors'}"]
    words += ["encoder.dim=8", "lm.max_positions=18", "logging.preview_clips=1"]
    assert run(command("vas_transformer", folder, 20, *words)) == 0
    return folder


def test_a_transformer_learns_over_it_and_a_sample_is_heard(transformer):
    board = board_of(transformer)
    losses = [event.value for event in board.Scalars("train/loss")]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1
    assert {"bell/clip_4/true", "bell/clip_4/generated"} <= set(board.Tags()["audio"])
    assert board.Audio("bell/clip_4/generated")[-1].length_frames == 3 * 4096


def test_a_transformer_learns_with_the_alignment_loss(data, codebook, tmp_path):
    folder = tmp_path / "run"
    words = [*data, *CODEC.split(), *TRANSFORMER.split(), f"tokenizer.weights={codebook / 'tokenizer.safetensors'}"]
    words += [
        "encoder.dim=8",
        "lm.max_positions=18",
        "logging.preview_clips=0",
        "logging.last_every=1",
        "task.drop_condition=0",
    ]
    words += ["task.alignment.lags=4", "task.alignment.segments=4", "task.alignment.width=8"]
    assert run(command("vas_transformer_aligned", folder, 4, *words)) == 0
    assert {"train/alignment", "val/alignment", "train/loss"} <= set(board_of(folder).Tags()["scalars"])
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["alignment.audio.bn1.num_batches_tracked"] == 4
    task, config = experiment.load(folder)
    assert task.alignment.form == config.task.alignment.form == "fixed"


def test_centred_windows_all_see_what_the_first_is_shown(transformer, monkeypatch):
    task, _ = experiment.load(transformer)
    rate, asked, forward = task.tokenizer.frame_rate, [], task.conditioner.forward
    monkeypatch.setattr(task.conditioner, "forward", lambda *given: asked.append((given[1], given[3])) or forward(*given))
    how = {"seeds": [1], "sampler": Sampler(), "guidance": 1.0, "window": 3 / rate, "stride": 3 / rate, "loop": "centred"}
    task.generate(torch.rand(1, 3, 8), 1.0, **how)
    assert asked == [(3, 0)]  # the frames of a whole window, from the beginning


def test_it_draws_longer_than_its_window_from_its_folder_alone(transformer):
    task, _ = experiment.load(transformer)
    rate = task.tokenizer.frame_rate
    how = {"seeds": [1], "sampler": Sampler(1.0, top_k=8), "guidance": 2.0, "window": 3 / rate, "stride": 1 / rate}
    features = torch.rand(1, 3, 8)
    for loop in ("centred", "windows"):
        (wav,) = task.generate(features, 1.0, loop=loop, **how)
        assert wav.shape == (1, 22050)


@pytest.mark.parametrize(
    ("name", "more", "part"),
    [
        ("vggsound_melception", ["task.network.num_classes=2", "data.batch_size=4", "task.auxiliary=0"], "classifier"),
        ("vggsound_vggishish", ["task.network.num_classes=2"], "classifier"),
    ],
)
@pytest.mark.slow
def test_a_classifier_is_taught(data, corpus, tmp_path, name, more, part):
    words = [*data, "data.features=3", "data.labels_file=null", "data.lists.test=null", f"data.mel_frames={COLUMNS}", *more]
    assert run(command(name, tmp_path / "run", 2, *words)) == 0
    assert (tmp_path / "run" / f"{part}.safetensors").is_file()


def test_a_vocoder_is_taught_from_videos(tiny, tmp_path):
    words = [f"data.manifest={tiny.manifest}", "data.duration=0.96", "data.batch_size=2", "data.workers=0"]
    words += ["data.data_dir=null", "task.vocoder.width=16", "task.segment=2048", "logging.preview_clips=1"]
    words += [f"task.adversary.discriminator.discriminators.{number}.width={width}" for number, width in ((0, 4), (1, 16))]
    assert run(command("vas_hifigan", tmp_path / "run", 2, *words)) == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    config.task.vocoder.weights = str(tmp_path / "run" / "vocoder.safetensors")
    assert instantiate(config.task.vocoder)(torch.rand(1, 80, 4)).shape == (1, 1, 4 * 256)


def made(name: str, *words: str):
    config = compose(f"configs/experiments/specvqgan/{name}.yaml", [*words, "trainer.accelerator=cpu"])
    engine = build_trainer(config.trainer, logger=False, enable_checkpointing=False)
    return config, engine


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_processes_look_for_what_a_turn_leaves_out(strategy):
    by_turns, at_once = SimpleNamespace(automatic_optimization=False), SimpleNamespace(automatic_optimization=True)
    config, engine = made("vas_hifigan", "trainer.devices=2", f"trainer.strategy={strategy}")
    assert settled(config.trainer, engine, by_turns).strategy == "ddp_find_unused_parameters_true"
    assert settled(config.trainer, engine, at_once).strategy == strategy
    config, engine = made("vas_hifigan", "trainer.devices=1", f"trainer.strategy={strategy}")
    assert settled(config.trainer, engine, by_turns).strategy == strategy


def test_batch_norms_of_cpus_are_not_measured_together():
    task = SimpleNamespace(automatic_optimization=True)
    config, engine = made("vas_codebook", "trainer.devices=2")
    with pytest.warns(UserWarning, match=r"trainer\.sync_batchnorm=true needs GPUs"):
        assert settled(config.trainer, engine, task).sync_batchnorm is False
    assert config.trainer.sync_batchnorm is True
    config, engine = made("vas_codebook", "trainer.devices=1")
    assert settled(config.trainer, engine, task).sync_batchnorm is True


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "trainer.gradient_clip_val=1",
            r"trainer\.gradient_clip_val=1 is for one optimizer.*set trainer\.gradient_clip_val=null",
        ),
        ("trainer.accumulate_grad_batches=2", r"trainer\.accumulate_grad_batches=2 .*set trainer\.accumulate_grad_batches=1"),
    ],
)
def test_what_two_optimizers_by_turns_cannot_do_is_told(word, told):
    config, engine = made("vas_hifigan", word)
    with pytest.raises(InputError, match=told):
        settled(config.trainer, engine, SimpleNamespace(automatic_optimization=False))


def test_a_cache_of_codes_is_nothing_to_a_part():
    config, _ = made("vas_hifigan", "data.cache=somewhere", "task.vocoder.width=16")
    with pytest.raises(InputError, match=r"set data\.cache=null"):
        load_data(config, SimpleNamespace(vocoder=SimpleNamespace(signal="audio")))


def test_a_classifier_has_nothing_to_preview():
    settings = OmegaConf.create({"keep_best": 1, "preview_clips": 2})
    check_logging(settings, SimpleNamespace())
    with pytest.raises(InputError, match=r"unknown key 'logging\.preview_clips'"):
        check_logging(settings, Classification.__new__(Classification))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["logging.tracked=[a]"], "unknown key 'logging.tracked'"),
        (["+logging.peak_flops=1e9"], "unknown key 'logging.peak_flops'"),
        (["trainer.strategy=fsdp2"], "trainer.strategy=fsdp2 divides a model among processes.*set trainer.strategy=auto"),
        (["data.mel_frames=16"], "data.mel_frames=16 leaves mels of 16 columns.* at least; set data.mel_frames=24 or more"),
        (["task=token_prediction"], "encoder"),
    ],
)
def test_what_cannot_be_taught_is_told(corpus, tmp_path, capsys, more, told):
    more = [word.format(folder=tmp_path) for word in more]
    assert run(command("vas_codebook", tmp_path / "run", 2, *more)) != 0
    said = capsys.readouterr().err
    assert re.search(told, said), said
    assert "Traceback" not in said
    assert said.count("error") == 1
