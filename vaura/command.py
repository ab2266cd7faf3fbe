"""The words of a command line, in Hydra's terms.

`python main.py config=PATH key=value ...` is Hydra's command line with one word more: `config=PATH` says where to look, and the
published spellings of keys are heard as the house's own.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from vaura.errors import InputError, nearest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# Published spellings that keep working. A key, or everything below it, gets the house's word; the longest match counts.
SPELLINGS = {
    "dataloader": "data",
    "dataloader.num_workers": "data.workers",
    "dataloader.video_length": "data.duration",
    "dataloader.rand_transform_prob": "data.flip",
    "dataloader.dataset_to_use": "data.split",
    "dataloader.split_dir": "data.corpus.split_dir",
    "dataloader.meta_file": "data.corpus.meta_file",
    "dataloader.excluded_files": "data.corpus.excluded_files",
    "dataloader.included_files": "data.corpus.included_files",
    "dataloader.fixed_start_pts_file": "data.corpus.fixed_start_pts_file",
    "dataloader.imagebind_score_file_path": "data.corpus.scores_file",
    "dataloader.imagebind_score_threshold": "data.corpus.score_threshold",
    "dataloader.path_to_metadata": "data.corpus.path_to_metadata",
    "dataloader.gen_videos_filepath": "data.corpus.gen_videos_filepath",
    "trainer.seed": "seed",
    "trainer.ckpt_path": "resume",
    "trainer.experiment_name": "name",
    "trainer.log_dir": "log_dir",
    "trainer.early_stop_patience": "logging.patience",
    "model.learning_rate": "task.optimizer.lr",
    "model.weight_decay": "task.optimizer.weight_decay",
    "model.betas": "task.optimizer.betas",
    "model.lr_scheduler.params.warmup_steps": "task.optimizer.schedule.warmup",
    "model.lr_scheduler.params.warmup_init_lr": "task.optimizer.schedule.first",
    "model.lr_scheduler.params.total_steps": "task.optimizer.schedule.total",
    "model.lr_scheduler.params.lr_min_ratio": "task.optimizer.schedule.final",
    "model.feature_extractor_config.params.ckpt_path": "encoder.weights",
    "model.audio_encoder_config.params.ckpt_path": "tokenizer.weights",
    "model.sampler_config.params.num_layers": "lm.num_layers",
    "model.sampler_config.params.d_model": "lm.dim",
    "model.sampler_config.params.nhead": "lm.num_heads",
    "model.sampler_config.params.dropout": "lm.dropout",
    "model.sampler_config.params.layer_norm_eps": "lm.norm_eps",
    "model.files_to_track_during_training": "logging.tracked",
    "checkpoint_path": "checkpoint",
    "cfg_scale": "guidance",
    "model_max_duration": "window",
    "temperature": "sampler.temperature",
    "top_k": "sampler.top_k",
    "top_p": "sampler.top_p",
    "audio_norm_strategy": "normalize",
}

# What stands elsewhere while generating, where no data is loaded in batches.
GENERATING = {"dataloader.batch_size": "batch_size"}

# Published keys that say nothing here, and why.
RETIRED = {
    "hparams": "an experiment's settings are found in its folder; change them by overridden_hparams.KEY=VALUE",
    "use_sampling": "sampler.temperature=0 takes the likeliest token",
    "use_visual_conditioning": "guidance=0 leaves the picture out",
    "vfps": "the encoder knows how many frames a second it wants",
    "afps": "the tokenizer knows its sample rate",
    "vid_len": "duration says how long",
    "frame_step": "the encoder takes every frame",
    "verbose": "progress is always shown",
    "return_sampled_indices": "vaura.load(EXPERIMENT).task.sample gives codes",
    "filter_videos": "dataloader.included_files and dataloader.excluded_files choose the clips",
    "dataloader.samples_per_video": "samples_per_video=N asks for several sounds",
    "dataloader.dataset_type": "data=GROUP chooses the corpus: vggsound, visualsound, greatesthit, audioset, vas, folder",
    "dataloader.sample_rate_audio": "the tokenizer knows its sample rate",
    "dataloader.partition_audio_to_clips": "the sound stays in one piece",
    "dataloader.partition_video_to_clips": "the encoder cuts its segments itself",
    "dataloader.filter_by_imagebind_score": "dataloader.imagebind_score_file_path=FILE filters, null does not",
    "dataloader.run_additional_checks": "a clip that cannot be read is told and left out",
    "dataloader.pin_memory": "it is pinned where there is a GPU",
    "dataloader.assert_fps": "every frame rate is read at true time",
    "dataloader.crop": "the picture is cut to the encoder's square",
    "trainer.scale_lr_with_gpu_count": "set task.optimizer.lr",
    "model.name": "name=NAME names the experiment",
    "model.batch_size": "data.batch_size counts clips a step",
    "model.use_visual_conditioning": "task.drop_condition=1 trains without the picture",
    "model.freeze_feature_extractor": "the encoder is always frozen",
    "model.return_attention_weights": "fused attention keeps no weights",
    "model.flatten_vis_feats": "features always come as one sequence",
    "model.apply_per_video_frame_mask": "the token LM never used it",
    "model.predict_at_val_start": "logging.preview_clips=N generates after each validation, 0 does not",
    "model.plot_distr_of_pred_indices": "the histogram of sampled codes comes with the preview",
    "model.visual_bridge_config": "the conditioner projects the features",
    "model.pattern_provider_config": "lm.pattern=delay or lm.pattern=parallel",
    "model.lr_scheduler.target": "task.optimizer.schedule._target_ names one of vaura.task.optimizer",
    "model.audio_encoder_config.params.model_sr": "tokenizer=dac_44khz, dac_24khz or dac_16khz chooses the codec",
}

# Keys, or last words of keys, whose values are paths, which may hold brackets and whatever else a person calls a file.
PATHS = {"video", "prompt", "experiment_path", "checkpoint", "out", "resume", "weights", "data_dir", "manifest"}
PATHS |= {"samples", "originals", "features_cache", "cache", "log_dir", "audio", "compare", "input", "output", "examples"}

# Trees that take any key: they are merged over another config, which knows its own keys.
FREE = ("overridden_hparams",)


@dataclass(frozen=True)
class Command:
    """A command line in Hydra's terms: `name` is looked up in `folder`, the rest are Hydra's own arguments."""

    path: Path
    folder: Path
    name: str
    arguments: list[str]
    configs: Path

    @property
    def overrides(self) -> list[str]:
        return [argument for argument in self.arguments if not argument.startswith("-")]


def translate(argv: Sequence[str], configs: Path = CONFIGS) -> Command:
    """`config=PATH` and published spellings -> Hydra's terms.

    Raises InputError where there is no `config=` or no such file.
    """
    given = [word.partition("=")[2] for word in argv if word.startswith("config=")]
    if not given:
        raise InputError(f"say which config to run: python main.py config=PATH\n{list_configs(configs)}")
    path, configs = find_config(given[-1], configs), configs.resolve()
    spellings = SPELLINGS | GENERATING if _generates(path, configs) else SPELLINGS
    arguments = [respell(word, spellings) for word in argv if not word.startswith("config=")]
    arguments.sort(key=lambda word: "=" in word and not word.startswith("-"))  # argparse wants the overrides in one piece
    if path.is_relative_to(configs):
        folder, name = configs, path.relative_to(configs).with_suffix("").as_posix()
        if "/" in name and not path.read_text().startswith("# @package _global_"):
            raise InputError(
                f"{path} needs '# @package _global_' as its first line, because it lies in a subfolder of {configs}"
            )
    else:
        _check_stranger(path)
        folder, name = path.parent, path.stem
        arguments.append(f'hydra.searchpath=["file://{configs}"]')
    if is_follower():
        arguments.append("hydra.output_subdir=null")  # rank 0 keeps the records of the run
    return Command(path, folder, name, arguments, configs)


HYDRA = ("run", "sweep", "output_subdir", "job")  # what a config from elsewhere may say to Hydra


def _check_stranger(path: Path) -> None:
    """Raise InputError where a config that is not of the house tells Hydra more than where to write.

    Callbacks, loggers and launchers of a `hydra` section are built before anything of ours can look at them.
    """
    told = _content(path).get("hydra") or {}
    keys = [f"hydra.{key}" for key in told if key not in HYDRA] if isinstance(told, dict) else ["hydra"]
    keys += [group for group, _ in defaults_of(path) if re.search(r"(^|[\s/@])hydra(/|$)", group)]
    if keys:
        raise InputError(
            f"{path} tells Hydra {keys[0]}, which can run anything; from outside of configs/ it may say {', '.join(HYDRA)}: "
            "remove the rest, or give it on the command line"
        )


def _generates(path: Path, configs: Path) -> bool:
    """Whether a config, or one that it is based on, is of the verb generate."""
    for group, option in defaults_of(path):
        if group == "schema":
            return option == "generate"
        base = configs / f"{group.lstrip('/')}.yaml"
        if not option and base != path and base.is_file() and _generates(base, configs):
            return True
    return False


def defaults_of(path: Path) -> list[tuple[str, str]]:
    """The defaults list of a config as (group, option), or (config, ""); empty where there is no such file."""
    listed = _content(path).get("defaults") if path.is_file() else None
    entries = listed if isinstance(listed, list) else []
    pairs = [next(iter(entry.items())) if isinstance(entry, dict) and entry else (entry, "") for entry in entries]
    return [(str(group), str(option)) for group, option in pairs]


def _content(path: Path) -> dict:
    """What a config says; nothing where its YAML is wrong, which Hydra then tells. Raises InputError where it is no text."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        return {}
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no config: it is not text, let alone YAML") from error
    return content if isinstance(content, dict) else {}


def is_follower() -> bool:
    """Whether torchrun, SLURM or Lightning started this process as a rank other than 0."""
    ranks = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # the first that is there counts
    return int(next((os.environ[name] for name in ranks if name in os.environ), "0")) > 0


def find_config(given: str, configs: Path = CONFIGS) -> Path:
    """The absolute path of `given`: relative to the working folder, the repository or configs/, with or without `.yaml`.

    Raises InputError naming the nearest.
    """
    for folder in (Path.cwd(), configs.parent, configs):
        for suffix in ("", ".yaml"):
            path = folder / (os.path.expanduser(given) + suffix)
            if path.is_file():
                return path.resolve()
    beside = (Path.cwd() / given).parent.glob("*.yaml")
    existing = [_shown(path) for path in (*beside, *runnable(configs))]
    names = {Path(path).name: path for path in existing}
    by_name = [f" Did you mean '{names[name]}'?" for name in difflib.get_close_matches(Path(given).name, names, n=1)]
    raise InputError(f"there is no config '{given}'." + (nearest(given, existing) or "".join(by_name)))


def runnable(configs: Path = CONFIGS) -> list[Path]:
    """The configs that can be given as `config=`: those at the top, and all below experiments/."""
    top = [path for path in sorted(configs.glob("*.yaml")) if path.stem != "house"]
    return top + sorted(configs.glob("experiments/**/*.yaml"))


def list_configs(configs: Path = CONFIGS) -> str:
    """One line per runnable config: its path and its first comment."""
    paths = {_shown(path): path for path in runnable(configs)}
    width = max(map(len, paths), default=0)
    return "\n".join(f"  config={shown:<{width}}  {_first_comment(path)}".rstrip() for shown, path in paths.items())


def _first_comment(path: Path) -> str:
    lines = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("@package")), "")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def respell(argument: str, spellings: Mapping[str, str] = SPELLINGS) -> str:
    """One argument with the house's word for a published key. Raises InputError for a key that says nothing here.

    >>> respell("dataloader.batch_size=4"), respell("overridden_hparams.a.b=1"), respell("--cfg")
    ('data.batch_size=4', '++overridden_hparams.a.b=1', '--cfg')
    """
    match = re.fullmatch(r"(\+\+|\+|~)?([\w.]+)(=.*)?", argument, re.DOTALL)
    if match is None:
        return argument
    mark, key, value = (part or "" for part in match.groups())
    tree, inner = next(((tree, key.removeprefix(f"{tree}.")) for tree in FREE if key.startswith(f"{tree}.")), ("", key))
    # V-AURA's hyper-parameters are what stands below `model` while it is trained
    asked = [f"model.{inner}", inner] if tree else [inner]
    word = next((ours for name in asked if (ours := _spelling(name, spellings))), inner)
    if tree and mark != "~":
        mark = "++"
    return mark + (f"{tree}.{word}" if tree else word) + _quoted(word, value)


def _quoted(key: str, value: str) -> str:
    """A value that Hydra can read: it takes "=" in quotes only, as in epoch=1-step=2.ckpt, and in paths more than that."""
    plain = value[1:]
    special = r"[=\[\](){}'\"]" if key.rpartition(".")[2] in PATHS else r"^[^\[\](){}'\"]*=[^\[\](){}'\"]*$"
    if plain.startswith(('"', "'")) or "${" in plain or not re.search(special, plain):
        return value
    escaped = plain.replace('"', r"\"")
    return f'="{escaped}"'


def _spelling(key: str, spellings: Mapping[str, str]) -> str | None:
    """The house's word for a published key, or None for any other."""
    for part in _heads(key):
        if part in RETIRED:
            raise InputError(f"{key} is a key of V-AURA's that says nothing here: {RETIRED[part]}; remove it")
        if part in spellings:
            return spellings[part] + key.removeprefix(part)
    return None


def _heads(key: str) -> list[str]:
    """ "a.b.c" -> a.b.c, a.b, a."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
