"""Sound from stored mels and features, and for videos by models that learnt from these: the whole way, on a tiny corpus."""

import json
import pickle

import numpy as np
import pytest
import soundfile
import torch

from vaura.components import instantiate
from vaura.config import compose
from vaura.data.stored import MEL
from vaura.drawing import VideoToAudio
from vaura.encoder.resnet50 import Network
from vaura.evaluate import find_pairs, open_originals
from vaura.launch import run
from vaura.lm.llama import TokenLM
from vaura.media.audio import write_wav
from vaura.media.mux import write_video
from vaura.task.token_prediction import TokenPrediction
from vaura.vocoder.melgan import MelGAN

KIND, WIDTH = "feature_resnet50_dim2048_21.5fps", 2048
RATE, HOP, COLUMNS, FRAMES = 22_050, 256, 160, 10  # of a mel; 16 columns are a token frame
SECONDS = COLUMNS * HOP / RATE
CLASSES = ("bell", "dog", "drum")
VAL = ["dog/clip_1", "drum/clip_1"]
SMALL = """
    tokenizer.n_mels=32 tokenizer.width=8 tokenizer.latent_dim=8 tokenizer.codebook_dim=8 tokenizer.codebook_size=16
    tokenizer.blocks=1 tokenizer.window=10 tokenizer.overlap=3 tokenizer.vocoder.n_mels=32 tokenizer.vocoder.iterations=0
"""
TINY = f"""
    {SMALL} encoder=stored_resnet50 conditioner.features=40 conditioner.window={SECONDS}
    lm.max_positions=61 lm.num_layers=1 lm.dim=32 lm.num_heads=2
    data.mel_frames={COLUMNS} data.feature_frames=43 data.feature_crop=40 data.batch_size=2 data.workers=0
    task.optimizer.lr=0.03 trainer.max_epochs=null trainer.max_steps=6 trainer.val_check_interval=3 trainer.accelerator=cpu
    logging.preview_clips=0
"""


class World:
    """A corpus of arrays, and a codebook."""

    def __init__(self, folder):
        self.folder, rng = folder, np.random.default_rng(0)
        clips = {"train": [f"{name}/clip_{n}" for name in CLASSES for n in (2, 3)], "valid": VAL}
        for clip in (clip for listed in clips.values() for clip in listed):
            name, _, stem = clip.partition("/")
            place = folder / "features" / name
            for kind in (MEL, KIND):
                (place / kind).mkdir(parents=True, exist_ok=True)
            shape = np.abs(np.sin(np.arange(172) * rng.uniform(0.05, 0.5)))[None] * rng.uniform(0.2, 1, (32, 1))
            np.save(place / MEL / f"{stem}_mel.npy", shape.astype(np.float32))
            (place / KIND / f"{stem}.pkl").write_bytes(pickle.dumps(rng.random((43, WIDTH), np.float32)))
        for split, listed in clips.items():
            (folder / f"{split}.txt").write_text("\n".join(listed))
        torch.manual_seed(1)
        tokenizer = instantiate(compose("experiments/specvqgan/vas_transformer.yaml", SMALL.split()).tokenizer)
        with torch.no_grad():  # entries are where latents are, so that mels differ in their codes
            mels = torch.stack([torch.from_numpy(np.load(path)) for path in sorted(folder.rglob("*.npy"))])[..., :COLUMNS]
            latents = tokenizer.network.latents(2 * mels[:, None] - 1).movedim(1, -1).reshape(-1, 8)
            tokenizer.network.quantize.embedding.weight.copy_(latents[torch.linspace(0, len(latents) - 1, 16).long()])
        tokenizer.learnt.fill_(True)
        tokenizer.save(folder / "codebook.safetensors")

    @property
    def corpus(self):
        return [f"data.data_dir={self.folder}/features", f"data.lists.val={self.folder}/valid.txt"]

    def train(self, name, *more):
        given = [
            *self.corpus,
            f"data.lists.train={self.folder}/train.txt",
            f"tokenizer.weights={self.folder}/codebook.safetensors",
        ]
        path = self.folder / name
        asked = ["config=configs/experiments/specvqgan/vas_transformer.yaml", f"hydra.run.dir={path}"]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert run([*asked, *TINY.split(), *given, *more]) == 0
        torch.set_num_threads(threads)
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("arrays"))


@pytest.fixture(scope="module")
def plain(world):
    return world.train("plain")


@pytest.mark.usefixtures("alone")
def test_other_classes_than_the_lists_name_are_not_learnt(world, tmp_path, capsys):
    given = [f"data.lists.train={world.folder}/train.txt", f"tokenizer.weights={world.folder}/codebook.safetensors"]
    asked = ["config=configs/experiments/specvqgan/vas_transformer.yaml", f"hydra.run.dir={tmp_path}/eight"]
    more = ["conditioner.classes=8", "lm.max_positions=62"]
    assert run([*asked, *TINY.split(), *world.corpus, *given, *more]) == 2
    assert "conditioner.classes is 8, and the clips of data are of 3 classes; set conditioner.classes=3" in refused(capsys)


@pytest.fixture(scope="module")
def classed(world):
    return world.train("classed", "conditioner.classes=3", "lm.max_positions=62")


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch):
    """The codes of every batch, and what was asked for."""
    calls, sample = [], TokenPrediction.sample

    def noted(task, *args, **how):
        calls.append((sample(task, *args, **how), how))
        return calls[-1][0]

    monkeypatch.setattr(TokenPrediction, "sample", noted)
    return calls


def command(folder, *more):
    return run(["config=generate", f"experiment_path={folder}", "device=cpu", "precision=float32", *more])


def from_arrays(world, folder, *more):
    return command(folder, "data=vas_stored", *world.corpus, *more)


def refused(capsys):
    error = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in error) == 1, error
    return error[-1].removeprefix("error: ")


def mel_of(world, clip):
    name, _, stem = clip.partition("/")
    return torch.from_numpy(np.load(world.folder / "features" / name / MEL / f"{stem}_mel.npy"))[None, :, 6 : 6 + COLUMNS]


# --- stored clips ---


def test_stored_clips_get_sounds_and_mels_as_long_as_their_own(world, plain, tmp_path):
    assert from_arrays(world, plain, "samples_per_video=2", f"out={tmp_path}/out") == 0
    names = [f"{clip}_sample_{number}" for clip in VAL for number in (0, 1)]
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"config.yaml", *(f"{name}.wav" for name in names), *(f"mels/{name}.npy" for name in names)}
    mels = [np.load(tmp_path / f"out/mels/{name}.npy") for name in names]
    for name, mel in zip(names, mels, strict=True):
        wav, rate = soundfile.read(tmp_path / f"out/{name}.wav")
        assert (len(wav), rate) == (COLUMNS * HOP, RATE)
        assert mel.shape == (32, COLUMNS)
        assert mel.dtype == np.float32
        assert mel.min() >= 0
        assert mel.max() <= 1
    assert len({mel.tobytes() for mel in mels}) == 4


def test_the_samples_are_found_with_their_originals(world, plain, tmp_path):
    assert from_arrays(world, plain, "samples_per_video=2", f"out={tmp_path}/out") == 0
    originals, _ = open_originals(str(world.folder / "features"))
    pairs = find_pairs(tmp_path / "out/mels", originals, list(CLASSES))
    found = sorted((sample.stem, clip.id) for sample, clip in pairs)
    assert found == [(f"clip_1_sample_{n}", f"{name}/{MEL}/clip_1_mel") for n in (0, 1) for name in ("dog", "drum")]


def test_a_sound_is_that_of_the_mel_beside_it(world, plain, tmp_path):
    """And a clip's own do not depend on what is drawn with it."""
    assert from_arrays(world, plain, f"out={tmp_path}/all") == 0
    assert from_arrays(world, plain, "batch_size=1", "data.only_class=drum", f"out={tmp_path}/one") == 0
    for path in ("drum/clip_1_sample_0.wav", "mels/drum/clip_1_sample_0.npy"):
        assert (tmp_path / "all" / path).read_bytes() == (tmp_path / "one" / path).read_bytes()
    mel = torch.from_numpy(np.load(tmp_path / "all/mels/drum/clip_1_sample_0.npy"))
    wav, _ = soundfile.read(tmp_path / "all/drum/clip_1_sample_0.wav", dtype="float32")
    again = VideoToAudio(plain, device="cpu").task.tokenizer.vocoder(mel[None])[0, 0]
    assert np.abs(wav - (again / again.abs().max().clamp(min=1)).numpy()).max() < 1e-4


def test_features_and_mels_are_cut_as_in_training(world, plain, drawn, monkeypatch):
    """What the experiment learnt from decides, whatever the config of the corpus says, whose other lists need not be there."""
    looked, sample = [], TokenPrediction.codes
    monkeypatch.setattr(
        TokenPrediction,
        "codes",
        lambda task, features, *args, **how: looked.append(features) or sample(task, features, *args, **how),
    )
    assert from_arrays(world, plain, "out=out", "data.features=9", "data.lists.train=nowhere.txt") == 0
    assert [part.shape for part in looked[0]] == [(1, 40, WIDTH)] * 2
    assert drawn[0][0].shape == (2, 2, FRAMES)
    assert drawn[0][1]["window"] == pytest.approx(SECONDS)


@pytest.mark.parametrize("loop", ["windows", "centred"])
def test_a_long_sound_lasts_exactly_as_long_as_asked(world, plain, tmp_path, loop):
    assert from_arrays(world, plain, "duration=4.3", f"loop={loop}", f"out={tmp_path}/out") == 0
    for clip in VAL:
        assert len(soundfile.read(tmp_path / f"out/{clip}_sample_0.wav")[0]) == 94_815
        assert np.load(tmp_path / f"out/mels/{clip}_sample_0.npy").shape == (32, 371)


def test_half_primed_the_codes_begin_with_those_of_the_clips_own_mel(world, plain, drawn, tmp_path):
    tokenizer = VideoToAudio(plain, device="cpu").task.tokenizer
    own = torch.cat([tokenizer.encode_mel(mel_of(world, clip)) for clip in VAL])
    assert len(own.unique()) > 2
    half = ["prepend_gt_audio=true", "prompt_duration=1.0"]  # 5.4 token frames
    assert from_arrays(world, plain, *half, f"out={tmp_path}/half") == 0
    assert torch.equal(drawn[0][0][..., :5], own[..., :5])
    assert not torch.equal(drawn[0][0], own)
    assert from_arrays(world, plain, *half, "remove_prompts=true", f"out={tmp_path}/removed") == 0
    whole, left = (np.load(tmp_path / f"{name}/mels/dog/clip_1_sample_0.npy") for name in ("half", "removed"))
    assert np.array_equal(left, whole[:, 80:])
    assert len(soundfile.read(tmp_path / "removed/dog/clip_1_sample_0.wav")[0]) == 80 * HOP


def test_a_sound_of_ones_own_is_continued(world, plain, drawn, tmp_path):
    prompt = 0.3 * torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / "prompt.wav", prompt[0, 0].numpy(), RATE, subtype="FLOAT")
    assert from_arrays(world, plain, "prompt=prompt.wav", "out=out") == 0
    own = VideoToAudio(plain, device="cpu").task.tokenizer.encode(prompt)
    assert torch.equal(drawn[0][0][..., :5], own[..., :5].expand(2, -1, -1))


def test_originals_are_heard_beside_the_samples(world, plain, tmp_path):
    given = ["save_original_files=true", "compress_original_audio=false"]
    assert from_arrays(world, plain, *given, f"out={tmp_path}/out") == 0
    assert np.array_equal(np.load(tmp_path / "out/mels/dog/clip_1_original.npy"), mel_of(world, "dog/clip_1")[0].numpy())
    assert (tmp_path / "out/dog/clip_1_original.wav").is_file()


def test_a_file_that_is_broken_is_told_and_the_rest_goes_on(world, plain, tmp_path, capsys):
    features = tmp_path / "features"
    for clip in VAL:
        name, _, stem = clip.partition("/")
        for kind, file in ((MEL, f"{stem}_mel.npy"), (KIND, f"{stem}.pkl")):
            (features / name / kind).mkdir(parents=True)
            content = (world.folder / "features" / name / kind / file).read_bytes()
            (features / name / kind / file).write_bytes(content[: 900 if (name, kind) == ("dog", KIND) else None])
    assert from_arrays(world, plain, f"data.data_dir={features}", "out=out") == 2
    assert "dog/feature_resnet50_dim2048_21.5fps/clip_1.pkl" in refused(capsys)
    assert (tmp_path / "out/drum/clip_1_sample_0.wav").is_file()
    assert not (tmp_path / "out/dog").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["start=1"], "start=1 is for videos"),
        (["duration=-1"], "longer than 0 s"),
        (["duration=0.001"], "less than 0.01 s"),
        (["data_split=tests"], "data_split=tests is no split; one is train, val, test. Did you mean 'test'?"),
        (["data_split=test"], "give data.lists.test=FILE"),
        (["data.data_dir=nowhere"], "nowhere"),
        (["video=clip.mp4"], "give video=FILE_OR_FOLDER, or a corpus by data, one of the two"),
        (["label=dog"], "label=dog is for models that are told a class, and this one is not"),
        (["prepend_gt_audio=true", "prompt_duration=0.1"], "prompt_duration=0.1 fills no token frame, which lasts 0.186 s"),
        (["prepend_gt_audio=true", "prompt_duration=2"], "nothing is left to generate"),
        (["loop=rolling"], "set loop=windows"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_a_person_got_wrong_is_one_sentence(world, plain, capsys, more, said):
    assert from_arrays(world, plain, "out=out", *more) == 2
    assert said in refused(capsys)


def test_a_stream_that_cannot_be_is_refused_before_anything_is_drawn(world, plain, tmp_path, capsys):
    assert from_arrays(world, plain, "loop=rolling", "out=out") == 2
    assert refused(capsys).startswith("loop=rolling")
    assert not (tmp_path / "out").exists()


def test_a_model_of_videos_takes_no_stored_features(world, tiny, capsys):
    assert from_arrays(world, tiny.folder, "out=out") == 2
    assert "this model's encoder looks at videos; give video=FILE_OR_FOLDER" in refused(capsys)


# --- classes ---


def test_clips_are_of_their_own_class_unless_another_is_asked_for(world, classed, drawn):
    """The list of validation lacks the first class, so its own count would be another."""
    for more in ([], ["label=bell"], ["label=2"]):
        assert from_arrays(world, classed, *more, "out=out") == 0
    assert [how["label"].tolist() for _, how in drawn] == [[1, 2], [0, 0], [2, 2]]


@pytest.mark.parametrize(
    ("label", "said"),
    [("dogs", "label=dogs is no class that this model knows. Did you mean 'dog'?"), ("3", "this model knows 0 to 2")],
)
def test_a_class_that_is_none_is_told_once(world, classed, capsys, label, said):
    assert from_arrays(world, classed, f"label={label}", "out=out") == 2
    assert refused(capsys).count(said) == 1


def test_classes_whose_lists_are_gone_have_numbers(world, classed, capsys):
    gone = "overridden_hparams.data.lists.train=gone.txt"
    assert from_arrays(world, classed, gone, "out=out", "label=1") == 0
    assert from_arrays(world, classed, gone, "out=out") == 2
    said = refused(capsys)
    assert "gone.txt" in said
    assert "give label=NUMBER, or the file by overridden_hparams.data.lists.train=FILE" in said


# --- videos ---


@pytest.fixture(scope="module")
def video(world):
    frames = torch.randint(0, 256, (70, 3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(world.folder / "own.mp4", frames, 25.0)
    return world.folder / "own.mp4"


@pytest.fixture(scope="module")
def eyes(world):
    """Weights of a ResNet50, of chance."""
    torch.manual_seed(0)
    torch.save(Network().state_dict(), world.folder / "resnet50.pth")
    return ["encoder=resnet50", f"encoder.weights={world.folder}/resnet50.pth"]


def test_a_video_of_ones_own_is_seen_by_the_encoder_that_is_given(plain, video, eyes, tmp_path):
    assert command(plain, f"video={video}", *eyes, "duration=0.5", f"out={tmp_path}/out") == 0
    assert len(soundfile.read(tmp_path / "out/own.wav")[0]) == round(0.5 * RATE)
    assert (tmp_path / "out/own.mp4").is_file()


@pytest.fixture
def shown(monkeypatch):
    """The prefixes that the LM reads, of pictures whose features are their brightness."""
    read, prefix_of = [], TokenLM.prefix_of
    monkeypatch.setattr(Network, "forward", lambda self, pictures: pictures.mean((1, 2, 3))[:, None].expand(-1, WIDTH))
    monkeypatch.setattr(
        TokenLM, "prefix_of", lambda lm, condition: read.append(condition.prefix.clone()) or prefix_of(lm, condition)
    )
    return read


def test_over_a_long_video_windows_move_with_the_picture_and_centred_ones_do_not(plain, video, eyes, shown, tmp_path):
    for loop, many in (("windows", True), ("centred", False)):
        shown.clear()
        given = [f"video={video}", *eyes, f"loop={loop}", "guidance=1", f"out={tmp_path}/{loop}"]
        assert command(plain, *given) == 0
        assert len(soundfile.read(tmp_path / f"{loop}/own.wav")[0]) == round(2.8 * RATE)
        assert (len({prefix.numpy().tobytes() for prefix in shown}) > 1) == many


def test_a_model_without_eyes_says_which_to_give_it(world, plain, video, capsys):
    assert command(plain, f"video={video}", "out=out") == 2
    assert "set encoder=resnet50 and encoder.weights=FILE" in refused(capsys)


def test_a_class_has_to_be_told_where_there_is_no_list(world, classed, video, eyes, capsys):
    assert command(classed, f"video={video}", *eyes, "out=out") == 2
    assert "give label=NUMBER or label=NAME" in refused(capsys)


def test_a_model_of_a_class_alone_needs_no_eyes(world, video, drawn, tmp_path):
    folder = world.train("alone", "conditioner.classes=3", "conditioner.features=0", "lm.max_positions=21")
    sound = VideoToAudio(folder, device="cpu").generate(video, 1.0, label="drum")
    assert sound.wav.shape == (1, RATE)


def test_a_model_that_learnt_from_chance_is_shown_chance(world, video):
    folder = world.train("blind", "conditioner.features=1", "data.random_features=true", "lm.max_positions=21")
    model = VideoToAudio(folder, device="cpu", precision="float32")
    first, second = (model.generate(video, 1.0).wav for _ in range(2))
    assert torch.equal(first, second)
    assert not (first == 0).all()


# --- other vocoders ---


def test_another_vocoder_makes_other_sound_of_the_same_mels(world, plain, tmp_path):
    torch.manual_seed(0)
    MelGAN(n_mels=32, width=4, residual_layers=1).save(tmp_path / "melgan.safetensors")
    given = [f"vocoder.weights={tmp_path}/melgan.safetensors", "vocoder.n_mels=32", "vocoder.width=4"]
    given += ["vocoder.residual_layers=1", "normalize=peak"]
    tree = "overridden_hparams.tokenizer.vocoder"
    same = [f"{tree}._target_=vaura.vocoder.melgan.MelGAN", *(f"{tree}.{word.partition('.')[2]}" for word in given[:-1])]
    assert from_arrays(world, plain, "normalize=peak", "out=plain") == 0
    assert from_arrays(world, plain, "vocoder=melgan", *given, "out=group") == 0
    assert from_arrays(world, plain, *same, "normalize=peak", "out=tree") == 0
    mels, wavs = (
        [(tmp_path / run / path).read_bytes() for run in ("plain", "group", "tree")]
        for path in ("mels/dog/clip_1_sample_0.npy", "dog/clip_1_sample_0.wav")
    )
    assert mels[0] == mels[1] == mels[2]
    assert wavs[0] != wavs[1] == wavs[2]


def test_a_vocoder_that_has_learnt_nothing_is_refused_before_anything_is_drawn(world, plain, tmp_path, capsys):
    sizes = ["vocoder=melgan", "vocoder.n_mels=32", "vocoder.width=4", "vocoder.residual_layers=1"]
    assert from_arrays(world, plain, *sizes, "out=out") == 2
    assert "the melgan vocoder has learnt nothing and would make noise of every mel; give vocoder.weights=FILE" in refused(
        capsys
    )
    assert not (tmp_path / "out").exists()
    sizes = [f"tokenizer.{size}" for size in sizes[1:]]
    sizes += ["tokenizer=specvqgan_vas", "vocoder@tokenizer.vocoder=melgan", "tokenizer.n_mels=32", "tokenizer.width=8"]
    sizes += ["tokenizer.latent_dim=8", "tokenizer.codebook_dim=8", "tokenizer.codebook_size=16", "tokenizer.blocks=1"]
    write_wav(tmp_path / "own.wav", torch.zeros(1, RATE), RATE)
    given = [f"tokenizer.weights={world.folder}/codebook.safetensors", f"audio={tmp_path}/own.wav", "out=coded"]
    assert run(["config=codec", *sizes, *given]) == 2
    assert refused(capsys).endswith("give tokenizer.vocoder.weights=FILE")
    assert not (tmp_path / "coded").exists()


# --- another experiment begins with it ---

FEW = (
    "measures.clips=2 trainer.max_steps=2 trainer.val_check_interval=2 trainer.accelerator=cpu data.batch_size=2 data.workers=0"
)


def tune(world, folder, *more):
    given = [
        *world.corpus,
        f"data.lists.train={world.folder}/train.txt",
        f"experiment_path={folder}",
        *FEW.split(),
        "data.workers=0",
    ]
    return run(["config=finetune", "data=vas_stored", *given, *more])


def test_a_model_of_arrays_goes_on_with_arrays(world, plain, tmp_path, alone):
    assert tune(world, plain, "adapt=lora", "adapt.layers=[qkv,up]", f"hydra.run.dir={tmp_path}/new") == 0
    result = json.loads((tmp_path / "new/finetune.json").read_text())
    assert {"validation_loss", "mel_distance_db", "envelope_correlation"} <= result["before"].keys() & result["after"].keys()
    content = torch.load(tmp_path / "new/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {".".join(key.split(".")[:2]) for key in content} <= {"conditioner.embed", "conditioner.null", "lm.blocks"}
    assert (tmp_path / "new/tokenizer.safetensors").is_file()  # which its base named by a path
    before = VideoToAudio(plain, device="cpu", precision="float32").task
    begun = VideoToAudio(tmp_path / "new", tmp_path / "new/start.safetensors", device="cpu", precision="float32").task
    assert all(value.equal(before.state_dict()[key]) for key, value in begun.state_dict().items())
    assert from_arrays(world, tmp_path / "new", "out=drawn") == 0


def test_a_model_of_other_classes_is_refused(world, classed, tmp_path, capsys, alone):
    (tmp_path / "less.txt").write_text("dog/clip_2\ndog/clip_3\n")
    (tmp_path / "val.txt").write_text("dog/clip_1\n")
    lists = [f"data.lists.train={tmp_path}/less.txt", f"data.lists.val={tmp_path}/val.txt"]
    assert tune(world, classed, *lists, f"hydra.run.dir={tmp_path}/new") == 2
    assert "told one of its 3 classes, and the clips of data name one of 1" in capsys.readouterr().err
