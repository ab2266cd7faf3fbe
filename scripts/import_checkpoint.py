"""Turn an experiment that V-AURA or SpecVQGAN published into one of the house, with safetensors.

    python scripts/import_checkpoint.py EXPERIMENT FOLDER [--checkpoint FILE] [--encoder-weights FILE]

EXPERIMENT is V-AURA's folder (`checkpoints/*.ckpt` and a subfolder with `hparams.yaml`) or the name of one, which is fetched,
or the folder of a SpecVQGAN transformer (`checkpoints/*.ckpt` and `configs/*-project.yaml`). FOLDER becomes a new experiment:
config.yaml, checkpoints/*.safetensors with what was trained, encoder.safetensors and tokenizer.safetensors with what was
frozen, and import.json, which names every key that was used or dropped. A checkpoint that misses a key of its model is refused,
and every such key is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save

from vaura import experiment
from vaura.checkpoint import CHECKPOINTS
from vaura.config import save_config
from vaura.errors import InputError
from vaura.files import make_folder, write_aside
from vaura.published import specvqgan
from vaura.published.vaura import find_experiment, is_published, read_published


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="folder of a published experiment, or its name")
    parser.add_argument("folder", type=Path, help="folder of the new experiment")
    parser.add_argument("--checkpoint", type=Path, help="a file in place of the one with the lowest validation loss")
    parser.add_argument("--encoder-weights", help="AV-CLIP's epoch_best.pt, where the checkpoint holds none")
    given = parser.parse_args(argv)
    try:
        print(import_experiment(given.experiment, given.folder, given.checkpoint, given.encoder_weights))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def import_experiment(
    source: str | Path, folder: Path, checkpoint: Path | None = None, encoder_weights: str | None = None
) -> str:
    """Write the experiment `source` anew into `folder`; returns what became of its keys, in a few lines.

    Raises InputError where `source` is no published experiment, `folder` is not empty, or a key of the model is missing.
    """
    source = find_experiment(source)
    theirs = specvqgan.is_published(source)
    if not theirs and not is_published(source):
        raise InputError(
            f"{source} is no experiment of V-AURA's or SpecVQGAN's own: it has no {CHECKPOINTS}/*.ckpt, or has a config.yaml"
        )
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; name a new folder")
    reading = specvqgan.read_published(source, checkpoint) if theirs else read_published(source, checkpoint, encoder_weights)
    task = experiment.build(reading.config)
    if missed := sorted(task.state_dict().keys() - reading.state.keys()):
        raise InputError(f"{reading.checkpoint} lacks {len(missed)} keys of its model: {', '.join(missed)}")
    experiment.check_model({"state_dict": reading.state}, task, reading.checkpoint)

    make_folder(folder / CHECKPOINTS)
    with write_aside(folder / CHECKPOINTS / f"{reading.checkpoint.stem}.safetensors") as aside:
        aside.write_bytes(save({key: value.clone().contiguous() for key, value in reading.state.items()}))
    config = reading.config.copy()
    for part, name in (("tokenizer", experiment.TOKENIZER), ("encoder", experiment.ENCODER)):
        if "weights" in config[part]:  # features that are stored have none
            getattr(task, part).save(folder / name)
            config[part].weights = None  # those of the experiment itself
    save_config(config, folder / experiment.CONFIG)
    account = {"source": str(reading.checkpoint), "used": reading.used, "dropped": reading.dropped}
    with write_aside(folder / "import.json") as aside:
        aside.write_text(json.dumps(account, indent=2) + "\n")
    lines = [f"{len(reading.used)} keys used, {len(reading.dropped)} dropped, none missed: {folder / 'import.json'}"]
    lines += [f"  dropped {key}: {why}" for key, why in reading.dropped.items()]
    return "\n".join([*lines, f"experiment: {folder}"])


if __name__ == "__main__":
    sys.exit(main())
