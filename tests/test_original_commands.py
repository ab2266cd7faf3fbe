"""The commands of V-AURA's README, each end to end through main.py on small real data.

Real: the clips, V-AURA's csv files and split lists. Small: the models, which chance made, and the lists of ids.
"""

import csv
import json
import shutil
from pathlib import Path

import av
import pytest
import soundfile
import torch

from vaura.checkpoint import best_checkpoint, read_checkpoint
from vaura.config import load_config
from vaura.launch import run

MEDIA = Path(__file__).parents[1].parent / "shared" / "media"
EXPERIMENT = "./configs/experiments/vggsound/avclip/9cb-viscond-avclip-channel_concat-llama.yaml"
STUDY = "./configs/experiments/vggsound/avclip/ib_filtering_study/9cb-viscond-avclip-channel_concat-llama_like"
SMALL = """
    model.sampler_config.params.num_layers=1 model.sampler_config.params.d_model=24 model.sampler_config.params.nhead=2
    lm.channels=8 dataloader.batch_size=2 dataloader.num_workers=0 trainer.max_steps=2 logging.preview_clips=0
    trainer.precision=32-true
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, about small data


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with V-AURA's layout of data, its lists cut down to the clips that are here."""
    videos = sorted((MEDIA / "specvqgan/vggsound/video").glob("*.mp4"))
    if not videos:
        pytest.skip(f"the real clips {MEDIA}/specvqgan/vggsound/video are not here")
    shutil.copytree(Path(__file__).parents[1] / "configs", tmp_path / "configs")
    (tmp_path / "videos").mkdir()
    for video in videos[:4]:
        (tmp_path / "videos" / video.name).symlink_to(video)
    names = [video.stem for video in videos[:4]]
    for corpus in ("vggsound", "visualsound"):
        folder = tmp_path / "data/splits" / corpus
        folder.mkdir(parents=True)
        for split, ids in {"train": names[:2], "validation": names[2:3], "test": names[2:], "predict": names[:1]}.items():
            (folder / f"{corpus}_{split}.txt").write_text("\n".join(ids) + "\n")
    table = [(name[:11], int(name[12:].split("_")[0]) // 1000, "a sound", "test") for name in names]
    write_csv(tmp_path / "data/meta/visualsound/visualsound.csv", ("filename", "start", "desc", "split"), table)
    for number, test_set in enumerate(("vggsound_test", "vggsound_sparse", "visualsound")):
        starts = [(name, f"{2.5 + number:.2f}") for name in names[2:]]
        write_csv(tmp_path / f"data/test_sets/{test_set}.csv", ("file", "start_sec"), starts)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def training(original, config: str = EXPERIMENT) -> list[str]:
    """The command of the README, and what makes it small."""
    return [
        f"config={config}",
        "dataloader.data_dir=videos",
        "trainer.num_nodes=1",
        "trainer.devices=[0]",
        f"model.feature_extractor_config.params.ckpt_path={original.avclip}",
        f"model.audio_encoder_config.params.ckpt_path={original.dac}",
        *SMALL.split(),
    ]


def experiments(place: Path) -> list[Path]:
    return sorted(path.parent for path in place.glob("logs/*/*/config.yaml"))


def test_train_resume_test_and_generate(place, original, capsys):
    assert run(training(original)) == 0
    (folder,) = experiments(place)
    config = load_config(folder / "config.yaml")
    assert config.task.hide_last
    assert config.conditioner.alignment == "repeat"
    best = best_checkpoint(folder)
    state = read_checkpoint(folder / "checkpoints/last.ckpt")
    assert state["global_step"] == 2
    assert state["state_dict"]["conditioner.null"].shape == (32, 64)
    # the checkpoint is tested as the training ends
    ended = json.loads((folder / "test.json").read_text())
    assert ended["clips"] == 2
    assert 0 < ended["loss"] < 10

    # resumed from the config it saved, with the path as V-AURA's README writes it: one folder too high
    resume = [
        f"config={folder}/config.yaml",
        *training(original)[1:],
        f"trainer.ckpt_path={folder}/last.ckpt",
        "trainer.max_steps=3",
    ]
    assert run(resume) == 0
    assert experiments(place) == [folder]
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == 3

    (folder / "test.json").unlink()
    test = [*training(original), "action=test", f"trainer.ckpt_path={best}"]
    assert run(test) == 0
    assert json.loads((folder / "test.json").read_text())["loss"] == pytest.approx(ended["loss"], abs=1e-4)
    capsys.readouterr()

    asked = [f"experiment_path={folder}", "duration=0.64", "dataloader.data_dir=videos", "device=cpu"]
    weights = f"overridden_hparams.feature_extractor_config.params.ckpt_path={original.avclip}"
    assert run(["config=configs/generate_visualsound.yaml", *asked, weights]) == 0
    (out,) = (folder / "visualsound").glob("*")
    assert len(list(out.glob("*.wav"))) == 2


@pytest.mark.parametrize("name", ["vgg", "vgg_sparse", "visualsound"])
def test_generation_with_a_published_experiment(place, original, name):
    folder = place / "published"
    shutil.copytree(original.folder, folder)
    before = set(folder.rglob("*"))
    command = [
        f"config=configs/generate_{name}.yaml",
        f"experiment_path={folder}",
        f"overridden_hparams.feature_extractor_config.params.ckpt_path={original.avclip}",
        "duration=1.28",
        "dataloader.data_dir=videos",
    ]
    assert run([*command, "device=cpu", "save_original_files=true"]) == 0
    made = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path not in before}
    out = {"vgg": "vggsound_test", "vgg_sparse": "vggsound_sparse", "visualsound": "visualsound"}[name]
    assert {path.parts[0] for path in made} == {out}
    with (place / f"data/test_sets/{out}.csv").open() as file:
        listed = {row["file"]: float(row["start_sec"]) for row in csv.DictReader(file)}
    wavs = {path.stem: folder / path for path in made if path.suffix == ".wav"}
    assert set(wavs) == set(listed) | {f"{name}_original" for name in listed}
    for wav in wavs.values():
        assert soundfile.info(wav).frames == 1.28 * 44100
        with av.open(str(wav.with_suffix(".mp4"))) as file:
            assert {stream.type for stream in file.streams} == {"audio", "video"}


def test_generation_for_vas(place, original):
    videos = sorted((MEDIA / "specvqgan/vas/videos").rglob("*.mp4"))[:2]
    (place / "data/vas/test").mkdir(parents=True)
    lines = []
    for video in videos:
        with av.open(str(video)) as file:
            lines.append({"filepath": str(video), "duration": file.duration / av.time_base, "video_fps": 25.0})
    (place / "data/vas/test/data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [
        "config=configs/generate_vas.yaml",
        f"experiment_path={original.folder}",
        f"overridden_hparams.feature_extractor_config.params.ckpt_path={original.avclip}",
        "duration=1.92",
        f"dataloader.data_dir={MEDIA}/specvqgan/vas/videos",
        "out=out",
        "device=cpu",
    ]
    assert run(command) == 0
    assert {path.stem for path in (place / "out").glob("*.wav")} == {video.stem for video in videos}
    for wav in (place / "out").glob("*.wav"):
        assert soundfile.info(wav).frames == count(1.92, 44100)


def count(seconds: float, rate: int) -> int:
    return round(seconds * rate)


@pytest.mark.parametrize(("variant", "kept"), [("", 2), ("-ib_00", 2), ("-ib_01", 2), ("-ib_02", 1), ("-ib_03", 1)])
def test_the_filtering_study(place, original, variant, kept, monkeypatch):
    """Scores of the two training clips: 0.15 and 0.35."""
    names = (place / "data/splits/vggsound/vggsound_train.txt").read_text().split()
    others = (place / "data/splits/vggsound/vggsound_test.txt").read_text().split()
    scores = {f"x/{names[0]}.mp4": 0.15, f"x/{names[1]}.mp4": 0.35} | {f"x/{name}.mp4": 0.9 for name in others}
    excluded = place / "data/excluded_files/filtered_examples_vggsound"
    excluded.mkdir(parents=True)
    (excluded / "none.txt").write_text("")
    (excluded / "imagebind_scores_norm.json").write_text(json.dumps(scores))
    seen = []
    monkeypatch.setattr("vaura.train.learn", lambda config, task, data, folder: seen.append(len(data.clips["train"])))
    assert run([*training(original, f"{STUDY}{variant}.yaml"), "test_at_end=false"]) == 0
    assert seen == [kept]


@pytest.mark.parametrize("corpus", ["greatesthit", "audioset"])
def test_other_corpora_train(place, original, corpus):
    names = sorted(path.name for path in (place / "videos").iterdir())
    folder = place / "data/splits" / corpus
    folder.mkdir(parents=True)
    other = place / "others"
    other.mkdir()
    splits = {"train": names[:2], "validation": names[2:3], "test": names[3:], "predict": []}
    if corpus == "greatesthit":
        table = []
        for split, files in splits.items():
            bases = [f"2015-0{index}-{split}" for index, _ in enumerate(files, 1)]
            (folder / f"greatesthit_{split}.txt").write_text("".join(f"{base}\n" for base in bases))
            for base, file in zip(bases, files, strict=True):
                (other / f"{base}_denoised_50.mp4").symlink_to((place / "videos" / file).resolve())
                table.append((f"{base}_denoised_50.mp4", 1.0, 2.0, 3.0, "wood", "hit", "static"))
        header = ("filename", "start_time", "occurring_time", "end_time", "material", "action_type", "effect")
        write_csv(place / "data/meta/greatesthit/greatesthit.csv", header, table)
    else:
        (other / "eval_segments").mkdir()
        for split, files in splits.items():
            (folder / f"audioset_{split}.txt").write_text("".join(f"eval_segments/{Path(file).stem}\n" for file in files))
            for file in files:
                (other / "eval_segments" / file).symlink_to((place / "videos" / file).resolve())
    config = f"configs/experiments/{corpus}/avclip/9cb-viscond-avclip-channel_concat-llama.yaml"
    command = [word.replace("=videos", f"={other}") for word in training(original, config)]
    assert run(command) == 0
    (experiment,) = experiments(place)
    assert read_checkpoint(experiment / "checkpoints/last.ckpt")["global_step"] == 2


def test_encodec_by_one_config_group(place, original, monkeypatch, tmp_path):
    """EnCodec's weights by chance; each feature then stands beside 6 token frames, not 7."""
    from vaura.tokenizer import encodec

    torch.manual_seed(0)
    torch.save(encodec.build("24khz").state_dict(), tmp_path / "encodec.th")
    command = [word for word in training(original) if "audio_encoder_config" not in word]
    mine = [
        "tokenizer=encodec_24khz",
        f"tokenizer.weights={tmp_path}/encodec.th",
        "tokenizer.bandwidth=1.5",
    ]
    assert run([*command, *mine, "test_at_end=false"]) == 0
    (folder,) = experiments(place)
    video = next((place / "videos").iterdir())
    assert (
        run(["config=generate", f"experiment_path={folder}", f"video={video}", "duration=1", f"out={place}/out", "device=cpu"])
        == 0
    )
    assert soundfile.info(place / f"out/{video.stem}.wav").frames == 24_000
