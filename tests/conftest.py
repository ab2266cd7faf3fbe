"""What several tests need: a tiny experiment, trained once; a small folder of configs and a verb that only remembers."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each: threads of all would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from omegaconf import DictConfig, OmegaConf

from vaura.command import CONFIGS
from vaura.config import VERBS
from vaura.data.world import World, build
from vaura.encoder import avclip
from vaura.launch import run
from vaura.run_folder import run_dir
from vaura.tokenizer import dac_network

TINY = """
    lm.num_layers=1 lm.dim=32 lm.num_heads=2 lm.channels=16 encoder.dim=16 encoder.width=8 encoder.size=32
    contrast.trainer.max_steps=2 contrast.batch_size=2 contrast.task.crop=0.32 contrast.task.instants=4
    tokenizer.codebook_size=16 tokenizer.num_codebooks=2 task.optimizer.lr=0.03 task.optimizer.schedule.warmup=1
    trainer.max_steps=12 trainer.val_check_interval=6 trainer.accelerator=cpu
    data.duration=0.64 data.batch_size=2 data.workers=0 logging.preview_clips=0
"""


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell's background job ignores Ctrl-C, and so would all that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def alone(monkeypatch):
    """Training in this process: one thread, no arguments of pytest's, and its signal handlers back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["main.py"])
    yield
    torch.set_num_threads(threads)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def forked() -> Callable[..., list[int | None]]:
    """forked(work, [arguments, ...]): one child each, all at once; their exit statuses."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked")

    def run_all(work: Callable[..., object], calls: Sequence[tuple]) -> list[int | None]:
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=work, args=arguments) for arguments in calls]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        return [child.exitcode for child in children]

    return run_all


class Tiny(NamedTuple):
    """An experiment that learnt for a dozen steps from a manifest of four clips of 1.92 s."""

    folder: Path
    manifest: Path

    @property
    def videos(self) -> list[Path]:
        return sorted(self.manifest.parent.rglob("*.mp4"))

    def files(self) -> dict[str, str]:
        """Path -> hash of everything in it but its samples."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and "samples" not in path.parts]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    settings = World(size=64, duration=1.92)
    manifest = build(root / "world", {"train": range(3), "val": range(10, 11)}, settings, workers=1)
    folder = root / "experiment"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(["config=train", f"data.manifest={manifest}", f"hydra.run.dir={folder}", *TINY.split()]) == 0
    torch.set_num_threads(threads)
    return Tiny(folder, manifest)


@pytest.fixture(scope="session")
def world_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 3 s with sound, 64 pixels a side."""
    manifest = build(tmp_path_factory.mktemp("video"), {"train": range(1)}, World(size=64, duration=3.0), workers=1)
    (video,) = manifest.parent.rglob("*.mp4")
    return video


# --- the command line in-process ---

TRAIN = """\
# trains a small thing
defaults:
  - schema: train
  - house
  - tokenizer: encodec_24khz
  - lm: small
  - _self_
name: hello
data:
  batch_size: 4
  root: here
  betas: [0.9, 0.95]
encoder: null
logging: null
conditioner: null
task: null
trainer:
  max_steps: 3
"""
FILES = {
    "train.yaml": TRAIN,
    "resumed.yaml": TRAIN.replace("name: hello", "name: again\nhydra:\n  run:\n    dir: ${resume_or_new:logs/${name}}"),
    "twin.yaml": TRAIN.replace("name: hello", "name: again\nhydra:\n  run:\n    dir: ${resume_or_new:logs/${name}}"),
    "open.yaml": TRAIN.replace("root: here", "root: ???  # the folder of clips"),
    "stranger.yaml": TRAIN + "trainr: 3\n",
    "mistyped.yaml": TRAIN + "seed: many\n",
    "broken.yaml": "a: 1\nb: c: d\n",
    "bare.yaml": TRAIN.replace("  - schema: train\n", ""),
    "lm/small.yaml": "num_layers: 2\ndim: ${data.batch_size}\n",
    "lm/large.yaml": "num_layers: 24\ndim: ${data.batch_size}\n",
    "tokenizer/encodec_24khz.yaml": "bandwidth: 6.0\n",
    "experiments/system/main.yaml": "# @package _global_\n# the published one\ndefaults:\n  - /train\n  - override /lm: large\n"
    "  - _self_\nname: main\nseed: 7\n",
    "experiments/system/lost.yaml": "defaults:\n  - /train\n  - _self_\nname: lost\n",
}


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Iterator[Path]:
    """The small folder of configs, in a repository that is the working folder."""
    for name, text in FILES.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "configs/house.yaml").write_text((CONFIGS / "house.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["main.py"])
    handlers = logging.root.handlers[:]
    yield tmp_path / "configs"
    logging.root.handlers[:] = handlers


@pytest.fixture
def seen(monkeypatch) -> list[types.SimpleNamespace]:
    """Every call of a verb: the config, the experiment folder, and the command line as the verb saw it."""
    calls = []

    def verb(cfg: DictConfig) -> None:
        calls.append(types.SimpleNamespace(cfg=cfg, folder=run_dir(), argv=sys.argv[1:]))

    monkeypatch.setitem(sys.modules, "fake_verb", types.SimpleNamespace(verb=verb))
    for action in VERBS:
        monkeypatch.setitem(VERBS, action, "fake_verb:verb")
    return calls


@pytest.fixture
def refusal(configs, capsys) -> Callable[..., str]:
    """The sentence with which a command line is refused."""

    def refuse(*argv: str) -> str:
        assert run(argv, configs) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert "HYDRA_FULL_ERROR" not in err
        return err.removeprefix("error: ").rstrip("\n")

    return refuse


# --- an experiment of V-AURA's own ---


class Original(NamedTuple):
    """What V-AURA's training left behind, in small: its folder, and the files of the frozen parts on their own."""

    folder: Path
    checkpoint: Path
    avclip: Path
    dac: Path


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """A token LM of 24 channels, a DAC of 512 samples a token frame and a tower that sees 32 pixels, all by chance."""
    root, generator = tmp_path_factory.mktemp("original"), torch.Generator().manual_seed(0)

    def chance(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}

    def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in module.state_dict().items()}

    sizes = avclip.Sizes(width=64, depth=1, hidden=64, pooled_hidden=64, patches=4)
    tower = chance(shapes_of(avclip.Tower(sizes)))
    codec = dac_network.Sizes(encoder_dim=4, latent_dim=16, decoder_dim=16, num_codebooks=3, codebook_size=16)
    plain = chance(shapes_of(dac_network.Codec(codec)))
    normed = {}
    for key, value in plain.items():  # as old weight normalisation wrote them
        if key.endswith(".weight") and value.ndim == 3:
            normed[f"{key}_v"], normed[f"{key}_g"] = value, value.flatten(1).norm(dim=1).view(-1, 1, 1)
        else:
            normed[key] = value
    shapes: dict[str, Any] = {
        "empty_video_emb": (1, 1, 8),
        "cls_embeddings.uncond_embedding": (32, 64),
        "cls_embeddings.projection.fc1.weight": (8, 64),
        "cls_embeddings.projection.fc2.weight": (8, 8),
        "layers.0.attention.wqkv.weight": (72, 24),
        "layers.0.attention.wo.weight": (24, 24),
        "layers.0.feed_forward.w1.weight": (256, 24),
        "layers.0.feed_forward.w3.weight": (256, 24),
        "layers.0.feed_forward.w2.weight": (24, 256),
        "layers.0.attention_norm.weight": (24,),
        "layers.0.ffn_norm.weight": (24,),
        "norm.weight": (24,),
    }
    for k in range(3):
        shapes[f"lm_heads.{k}.weight"] = (16, 24)
        shapes[f"tok_embeddings.{k}.emb.weight"] = (17, 8)
        for part, shape in (("weight_g", (16, 1, 1)), ("weight_v", (16, 8, 1)), ("bias", (16,))):
            shapes[f"tok_embeddings.{k}.out_proj.{part}"] = shape
    state = {f"sampler.{key}": value for key, value in chance(shapes).items()}
    state |= {f"visual_feature_extractor.{key}": value for key, value in tower.items()}
    state |= {f"audio_encoder.model.{key}": value.half() for key, value in normed.items()}

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    settings = {
        "learning_rate": 1e-3,
        "lr_scheduler": {"target": "models.modules.misc.lr_schedulers.CosineLRScheduler", "params": {"warmup_steps": 2}},
        "weight_decay": 1e-5,
        "betas": [0.9, 0.95],
        "feature_extractor_config": {
            "target": "models.modules.feature_extractors.avclip.motionformer.MotionFormer",
            "params": {"ckpt_path": "/not/here/epoch_best.pt"},
        },
        "audio_encoder_config": {"target": "models.modules.dac.model.DacModelWrapper", "params": {"model_sr": 44100}},
        "sampler_config": {
            "target": "models.modules.sampler.llama.Transformer",
            "params": {"num_layers": 1, "d_model": 24, "nhead": 2, "cond_feature_channel_scaler": 3, "num_codebooks": 3},
        },
        "pattern_provider_config": {"target": "models.modules.misc.codebook_patterns.DelayedPatternProvider"},
    }
    hyper = {key: OmegaConf.create(value) if isinstance(value, dict | list) else value for key, value in settings.items()}
    hyper["lr_scheduler"].params = OmegaConf.create({"optimizer": None}, flags={"allow_objects": True})
    hyper["lr_scheduler"].params.optimizer = optimizer
    lightning = {"epoch": 0, "global_step": 2, "loops": {}, "callbacks": {}, "optimizer_states": [optimizer.state_dict()]}

    folder = root / "24-08-01T08-34-26"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "vgg-9cb").mkdir()
    best = folder / "checkpoints/epoch=0-step=2-val_loss=4.483.ckpt"
    torch.save({**lightning, "state_dict": state, "hyper_parameters": hyper}, best)
    worse = {key: torch.zeros_like(value) for key, value in state.items()}
    for name in ("epoch=0-step=1-val_loss=4.569-v1.ckpt", "last.ckpt"):
        torch.save({**lightning, "state_dict": worse, "hyper_parameters": hyper}, folder / "checkpoints" / name)
    (folder / "vgg-9cb/hparams.yaml").write_text(OmegaConf.to_yaml(settings))

    synchformer = {f"module.v_encoder.{key}": value for key, value in tower.items()} | {"module.logit_scale": torch.zeros(())}
    torch.save({"state_dict": synchformer, "epoch": 3, "args": OmegaConf.create({"a": [1]})}, root / "epoch_best.pt")
    torch.save({"state_dict": normed, "metadata": {"kwargs": {"sample_rate": 44100}}}, root / "weights.pth")
    return Original(folder, best, root / "epoch_best.pt", root / "weights.pth")
