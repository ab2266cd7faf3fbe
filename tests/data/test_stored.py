import os
import pickle
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from vaura.command import CONFIGS
from vaura.components import instantiate
from vaura.config import load_config
from vaura.data.stored import MEL, StoredData, centre_crop, class_names, read_mel, resample_indices
from vaura.errors import InputError

RGB, FLOW = "feature_rgb_bninception_dim1024_21.5fps", "feature_flow_bninception_dim1024_21.5fps"
RESNET = "feature_resnet50_dim2048_21.5fps"
TRAIN = [f"{kind}/video_{n:05}" for kind in ("baby", "dog", "drum") for n in range(3)]
VAL = ["dog/video_00007", "hammer/video_00001"]
ROWS = {RGB: 216, FLOW: 214, RESNET: 215}
WIDTH = 6

SHARED = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[3] / "shared"))
MEDIA = SHARED / "media" / "specvqgan"
real = pytest.mark.skipif(not MEDIA.is_dir(), reason="no stored clips: the folder `shared` is not beside the repository")


def mel_of(clip: str) -> np.ndarray:
    """Its own for every clip, each value its own too."""
    return (np.arange(80 * 860).reshape(80, 860) + (TRAIN + VAL).index(clip)) / 1e5


def rows_of(clip: str, kind: str) -> np.ndarray:
    number = 1000 * (TRAIN + VAL).index(clip) + 100_000 * list(ROWS).index(kind)
    return (number + np.arange(ROWS[kind])[:, None] + np.zeros((1, WIDTH))).astype(np.float32)


def write(place: Path, clip: str, folders: bool) -> None:
    folder, _, name = clip.rpartition("/")
    for kind in (MEL, *ROWS):
        at = (place / folder if folders else place) / kind
        at.mkdir(parents=True, exist_ok=True)
        if kind == MEL:
            np.save(at / f"{name}_mel.npy", mel_of(clip))
        else:
            (at / f"{name}.pkl").write_bytes(pickle.dumps(rows_of(clip, kind), 4 if kind == RESNET else 3))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("vas")
    for clip in TRAIN + VAL:
        write(place / "features", clip, folders=True)
    (place / "train.txt").write_text("\n".join(TRAIN) + "\n")
    (place / "valid.txt").write_text("\n".join(VAL))
    return place


def data(corpus: Path, **changes) -> StoredData:
    settings = {
        "data_dir": str(corpus / "features"),
        "lists": {"train": str(corpus / "train.txt"), "val": str(corpus / "valid.txt"), "test": None},
        "features": 5,
        "batch_size": 2,
        "workers": 0,
        "kinds": [RGB, FLOW],
        "dim": 2 * WIDTH,
        "seed": 3,
    }
    return StoredData(**{**settings, **changes})


# --- items ---


def test_a_batch(corpus):
    read = data(corpus)
    batch = next(iter(read.loader("val")))
    assert batch is not None
    assert set(batch) == {"id", "start", "mel", "features", "label"}
    assert batch["id"] == VAL
    assert (batch["mel"].shape, batch["mel"].dtype) == ((2, 80, 848), torch.float32)
    assert (batch["features"].shape, batch["features"].dtype) == ((2, 5, 2 * WIDTH), torch.float32)
    assert (batch["label"].tolist(), batch["label"].dtype) == ([1, 3], torch.int64)
    assert read.classes == ["baby", "dog", "drum", "hammer"]


def test_mel_and_features_are_the_middle_of_what_is_stored(corpus):
    for split, clips in (("train", TRAIN), ("val", VAL)):
        for clip, item in zip(clips, data(corpus).items(split), strict=True):
            np.testing.assert_array_equal(item["mel"], mel_of(clip).astype(np.float32)[:, 6:854])
            rows = [1 + index for index in (35, 77, 119, 162, 204)]
            np.testing.assert_array_equal(item["features"][:, :WIDTH], rows_of(clip, RGB)[rows])
            np.testing.assert_array_equal(item["features"][:, WIDTH:], rows_of(clip, FLOW)[rows])


def test_short_features_are_filled_up_and_long_ones_cut(corpus):
    for frames, crop in ((230, 230), (100, 97)):
        features = next(
            data(corpus, kinds=[RESNET], dim=WIDTH, features=crop, feature_frames=frames, feature_crop=crop).items("val")
        )["features"]
        stored = np.zeros((frames, WIDTH), np.float32)
        stored[: ROWS[RESNET]] = rows_of(VAL[0], RESNET)[:frames]
        np.testing.assert_array_equal(features, stored[(frames - crop) // 2 :][:crop])


def test_flow_has_a_picture_less_and_both_end_with_it(corpus):
    item = next(data(corpus, features=212).items("val"))
    assert (item["features"][:, 0] > 0).all()
    whole = next(data(corpus, features=215, feature_crop=215).items("val"))["features"]
    assert (whole[:214] > 0).all()
    assert (whole[214] == 0).all()


def test_without_kinds_there_are_mels_alone(corpus):
    batch = next(iter(data(corpus, kinds=(), dim=None).loader("val")))
    assert batch is not None
    assert set(batch) == {"id", "start", "mel", "label"}


def test_a_random_crop_moves_with_clip_and_epoch_in_training_alone(corpus):
    read = data(corpus, random_crop=True)
    train, val = read.dataset("train"), read.dataset("val")
    whole = {clip: mel_of(clip).astype(np.float32) for clip in TRAIN}
    starts = {}
    for index, clip in enumerate(TRAIN):
        for epoch in range(20):
            mel = train.read(epoch, index)["mel"].numpy()  # type: ignore[index]
            (start,) = [first for first in range(13) if np.array_equal(mel, whole[clip][:, first : first + 848])]
            starts[clip, epoch] = start
    assert set(starts.values()) == set(range(13))
    assert {key: start for key, start in starts.items() if key[1] == 4} == {(clip, 4): starts[clip, 4] for clip in TRAIN}
    again = data(corpus, random_crop=True).dataset("train")
    assert torch.equal(again.read(7, 2)["mel"], train.read(7, 2)["mel"])  # type: ignore[index]
    other = data(corpus, random_crop=True, seed=4).dataset("train")
    assert any(not torch.equal(other.read(0, i)["mel"], train.read(0, i)["mel"]) for i in range(4))  # type: ignore[index]
    assert torch.equal(val.read(0, 0)["mel"], val.read(9, 0)["mel"])  # type: ignore[index]


def test_features_of_chance_are_of_seed_epoch_and_clip(corpus):
    chance = {"random_features": True, "dim": 2048, "features": 1}
    read = data(corpus, **chance).dataset("train")
    drawn = {(epoch, index): read[epoch, index]["features"] for epoch in range(3) for index in range(3)}  # type: ignore[index]
    assert all(features.shape == (1, 2048) for features in drawn.values())
    assert len({float(features.sum()) for features in drawn.values()}) == 9
    together = torch.cat(list(drawn.values())).flatten().sort().values
    assert (together - torch.linspace(0, 1, len(together))).abs().max() < 1.63 / len(together) ** 0.5  # uniform, at 1 %
    again = data(corpus, **chance).dataset("train")
    assert torch.equal(again.read(2, 1)["features"], drawn[2, 1])  # type: ignore[index]
    assert not torch.equal(data(corpus, **chance, seed=9).dataset("train").read(2, 1)["features"], drawn[2, 1])  # type: ignore[index]


def test_features_of_chance_need_no_files(corpus, tmp_path):
    (tmp_path / MEL).mkdir()
    np.save(tmp_path / MEL / "a_mel.npy", mel_of(TRAIN[0]))
    (tmp_path / "list.txt").write_text("a")
    read = data(corpus, data_dir=str(tmp_path), lists={"train": str(tmp_path / "list.txt")}, random_features=True)
    assert next(read.items("train"))["features"].shape == (5, 2 * WIDTH)


# --- indices ---


@pytest.mark.parametrize(("features", "indices"), [(1, [106]), (5, [35, 77, 119, 162, 204]), (53, list(range(3, 212, 4)))])
def test_which_features_are_taken(features, indices):
    assert resample_indices(features, 212).tolist() == indices


def test_every_number_of_features_lies_within_in_order():
    for length in (5, 53, 211, 212, 215):
        assert resample_indices(length, length).tolist() == list(range(length))
        for features in range(1, length + 1):
            indices = resample_indices(features, length)
            assert len(indices) == features
            assert indices[0] >= 0
            assert indices[-1] < length
            assert (np.diff(indices) > 0).all()
            assert resample_indices(features, length, 3).tolist() == [index for index in indices for _ in range(3)]


@pytest.mark.parametrize("features", [0, -1, 213])
def test_more_features_than_there_are_is_refused(corpus, features):
    with pytest.raises(InputError, match=rf"data\.features is {features}; a clip has 1 to 212 .* conditioner\.features"):
        data(corpus, features=features)


def test_the_middle():
    assert list(range(9))[centre_crop(9, 4)] == [2, 3, 4, 5]
    assert list(range(4))[centre_crop(4, 4)] == [0, 1, 2, 3]


# --- order ---


def ids(read: StoredData, epochs: int, **settings) -> list[list[str]]:
    loader = read.loader("train", **settings)
    return [[name for batch in loader if batch for name in batch["id"]] for _ in range(epochs)]


def test_the_order_is_of_seed_and_epoch(corpus):
    one, other = ids(data(corpus), 3, batch_size=1), ids(data(corpus, seed=4), 3, batch_size=1)
    assert all(sorted(epoch) == sorted(TRAIN) for epoch in one)
    assert one[0] != one[1]
    assert ids(data(corpus), 3, batch_size=1) == one != other
    assert ids(data(corpus, workers=2), 1, batch_size=1) == one[:1]


def test_processes_share_an_epoch(corpus):
    parts = [ids(data(corpus), 1, rank=rank, world_size=3, batch_size=1)[0] for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert sorted(name for part in parts for name in part) == sorted(TRAIN)


def test_a_loader_goes_on_within_an_epoch(corpus):
    loader = data(corpus).loader("train", batch_size=1)
    whole = [batch["id"] for batch in loader if batch]
    again = data(corpus).loader("train", batch_size=1)
    begun = iter(again)
    before = [next(begun)["id"] for _ in range(4)]  # type: ignore[index]
    further = data(corpus).loader("train", batch_size=1)
    further.load_state_dict(again.state_dict())
    assert before + [batch["id"] for batch in further if batch] == whole


# --- what is there ---


def flat(corpus: Path, place: Path, clips: dict[str, str], lacking: tuple[str, ...] = ()) -> dict:
    """A corpus without folders of classes: new name -> a clip of the other one; those `lacking` have no mel."""
    for name, clip in clips.items():
        folder, _, old = clip.rpartition("/")
        for kind in (MEL, RGB, FLOW):
            end = "_mel.npy" if kind == MEL else ".pkl"
            (place / kind).mkdir(parents=True, exist_ok=True)
            if kind != MEL or name not in lacking:
                (place / kind / f"{name}{end}").symlink_to(corpus / "features" / folder / kind / f"{old}{end}")
    (place / "list.txt").write_text("\n".join(clips))
    return {"data_dir": str(place), "lists": {"train": str(place / "list.txt")}}


YOUTUBE = {"--0PQM4-hqg_30000_40000": TRAIN[0], "-1pRmoJIGQc_10000_20000": TRAIN[4], "a_b_c_d_e_f_0_10000": TRAIN[8]}


def test_a_flat_corpus_and_its_table(corpus, tmp_path):
    table = tmp_path / "vggsound.csv"
    table.write_text(
        '-1pRmoJIGQc,10,"people, talking",test\n--0PQM4-hqg,30,dog barking,train\n'
        "a_b_c_d_e_f,0,zither,train\nxxxxxxxxxxx,0,airplane,test\n"
    )
    read = data(corpus, **flat(corpus, tmp_path, YOUTUBE), labels_file=str(table))
    assert read.classes == ["airplane", "dog barking", "people, talking", "zither"]
    assert {item["id"]: int(item["label"]) for item in read.items("train")} == dict(zip(YOUTUBE, (1, 2, 3), strict=True))
    np.testing.assert_array_equal(next(read.items("train"))["mel"], mel_of(TRAIN[0]).astype(np.float32)[:, 6:854])


def test_without_a_table_a_flat_corpus_has_no_labels(corpus, tmp_path):
    read = data(corpus, **flat(corpus, tmp_path, YOUTUBE))
    assert read.classes == []
    assert {int(item["label"]) for item in read.items("train")} == {-1}


def test_a_clip_that_the_table_does_not_know_is_told(corpus, tmp_path):
    (tmp_path / "t.csv").write_text("-1pRmoJIGQc,10,talking,test\n")
    with pytest.raises(InputError, match=r"t\.csv has no row for the clip --0PQM4-hqg_30000_40000: no video --0PQM4-hqg"):
        data(corpus, **flat(corpus, tmp_path, YOUTUBE), labels_file=str(tmp_path / "t.csv"))


def test_missing_files_are_one_warning(corpus, tmp_path):
    settings = flat(corpus, tmp_path, YOUTUBE, lacking=tuple(YOUTUBE)[:2])
    (tmp_path / "other.txt").write_text("nothing\n" * 2 + "nobody")
    settings["lists"]["val"] = str(tmp_path / "other.txt")
    with pytest.warns(UserWarning, match="left out") as told:
        read = data(corpus, **settings)
    assert [str(warning.message) for warning in told] == [
        f"left out: 2 of 3 train clips and 2 of 2 val clips, which have not all of {MEL}, {RGB}, {FLOW} below {tmp_path}"
    ]
    assert read.left_out == [str(told[0].message).removeprefix("left out: ")]
    assert [clip.id for clip in read.clips["train"]] == [tuple(YOUTUBE)[2]]
    assert read.clips["val"] == read.clips["test"] == []


@pytest.mark.filterwarnings("ignore:left out")
def test_none_at_all_is_an_error_that_names_a_file(corpus, tmp_path):
    settings = flat(corpus, tmp_path, YOUTUBE, lacking=tuple(YOUTUBE))
    with pytest.raises(
        InputError, match=r"none of the 3 clips of .*list\.txt .*: there is no .*hqg_30000_40000_mel\.npy; check"
    ):
        data(corpus, **settings)
    with pytest.raises(InputError, match=r"there is no list of test clips; give data\.lists\.test=FILE"):
        data(corpus, needs=("test",))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="lists no train clip"):
        data(corpus, lists={"train": str(tmp_path / "empty.txt")})


def test_one_class_alone_keeps_its_number(corpus):
    read = data(corpus, only_class="dog")
    assert [clip.id for split in ("train", "val") for clip in read.clips[split]] == [*TRAIN[3:6], VAL[0]]
    assert {int(item["label"]) for item in read.items("train")} == {1}
    with pytest.raises(InputError, match=r"data\.only_class=dgo is no class of the lists\. Did you mean 'dog'"):
        data(corpus, only_class="dgo")


def test_one_class_alone_among_clips_that_have_none(corpus, tmp_path):
    (tmp_path / "mixed.txt").write_text("\n".join([*TRAIN, "video_of_no_class"]))
    read = data(corpus, only_class="dog", lists={"train": str(tmp_path / "mixed.txt")})
    assert [clip.id for clip in read.clips["train"]] == TRAIN[3:6]


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_mel_of_other_bands_is_left_out_of_its_batch(corpus, tmp_path, odd):
    settings = flat(corpus, tmp_path, YOUTUBE)
    path = tmp_path / MEL / f"{tuple(YOUTUBE)[odd]}_mel.npy"
    path.unlink()
    np.save(path, np.zeros((64, 860), np.float32))
    loader = data(corpus, **settings).loader("train", batch_size=3)
    with pytest.warns(UserWarning, match=r"left out of this batch: .*_mel\.npy holds no mel of 80 bands but an array of"):
        batch = next(iter(loader))
    assert batch is not None
    assert batch["mel"].shape == (2, 80, 848)


def test_a_damaged_mel_is_left_out_of_its_batch(corpus, tmp_path):
    settings = flat(corpus, tmp_path, YOUTUBE)
    path = tmp_path / MEL / f"{next(iter(YOUTUBE))}_mel.npy"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b"}", b"{", 1))
    with pytest.warns(UserWarning, match=r"left out of this batch: .*_mel\.npy cannot be read as an array"):
        batch = next(iter(data(corpus, **settings).loader("train", batch_size=3)))
    assert batch is not None
    assert len(batch["id"]) == 2


def test_a_broken_file_is_left_out_of_its_batch_and_told(corpus, tmp_path):
    settings = flat(corpus, tmp_path, YOUTUBE)
    broken = tmp_path / RGB / "a_b_c_d_e_f_0_10000.pkl"
    broken.unlink()
    broken.write_bytes(pickle.dumps(rows_of(TRAIN[0], RGB), 4)[:1000])
    loader = data(corpus, **settings).loader("train", batch_size=3)
    with pytest.warns(UserWarning, match=r"left out of this batch: .*a_b_c_d_e_f_0_10000\.pkl is no pickle of an array"):
        batch = next(iter(loader))
    assert batch is not None
    assert sorted(batch["id"]) == sorted(YOUTUBE)[:2]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((80, 860), -11.5), "reaches from -11.5 to -11.5"),
        (np.full((80, 860), np.nan), "reaches from nan"),
        (np.zeros(860), "holds no mel"),
        (np.zeros((80, 860), np.int16), "holds no mel"),
        (np.array([None]), "cannot be read as an array"),
    ],
)
def test_what_is_no_mel_is_refused(tmp_path, array, said):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=said):
        read_mel(tmp_path / "a.npy")


@pytest.mark.filterwarnings("ignore:Reading .*Python 2")
def test_a_mel_with_one_wrong_byte_is_read_or_refused(tmp_path):
    """Whatever the byte: NumPy itself raises half a dozen kinds of errors."""
    np.save(path := tmp_path / "a.npy", np.random.default_rng(0).random((80, 12), np.float32))
    whole, said = path.read_bytes(), []
    for place in range(130):
        for byte in b"\x00 \"'(,0{\xff":
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                assert read_mel(path).dtype == torch.float32
            except InputError as error:
                said.append(str(error))
    assert len(said) > 500
    assert not any("\n" in sentence for sentence in said)


def test_what_a_mel_holds_can_be_asked_for(tmp_path):
    np.save(path := tmp_path / "a.npy", np.full((80, 12), -0.5, np.float32))
    assert read_mel(path, 80, (-1.0, 2.0)).shape == (80, 12)
    with pytest.raises(InputError, match=r"reaches from -0\.5 to -0\.5; mels here lie in"):
        read_mel(path, 80)
    with pytest.raises(InputError, match=r"holds no mel of 64 bands but an array of float32 \(80, 12\)"):
        read_mel(path, 64, (-1.0, 2.0))


def test_a_mel_that_is_cut_off_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((80, 860)))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.npy cannot be read"):
        read_mel(tmp_path / "a.npy")
    with pytest.raises(InputError, match="there is no file"):
        read_mel(tmp_path / "b.npy")


def test_settings_that_do_not_fit_are_told(corpus):
    with pytest.raises(InputError, match=r"the train clips cannot be used: .* are 12 wide together, not encoder\.dim=2048"):
        data(corpus, dim=2048)
    with pytest.raises(InputError, match=r"holds 860 columns, fewer than data\.mel_frames=864; lower that"):
        data(corpus, mel_frames=864)
    with pytest.raises(InputError, match=r"data\.feature_crop is 216; choose 1 to data\.feature_frames=215"):
        data(corpus, feature_crop=216)
    for change in ({"mel_frames": 0}, {"mel_frames": -3}, {"batch_size": 0}, {"batch_size": -1}):
        ((name, number),) = change.items()
        with pytest.raises(InputError, match=rf"data\.{name} is {number}; give 1 or more"):
            data(corpus, **change)
    with pytest.raises(InputError, match=r"set encoder\.dim"):
        data(corpus, random_features=True, dim=None)
    with pytest.raises(InputError, match=r"data\.lists\.valid is no split.* Did you mean 'val'"):
        data(corpus, lists={"valid": str(corpus / "valid.txt")})
    with pytest.raises(InputError, match="the folder nowhere of stored mels and features does not exist"):
        data(corpus, data_dir="nowhere")
    for split in ("train", "val"):
        with pytest.raises(InputError, match=rf"^data\.lists\.{split}: there is no file nowhere\.txt"):
            data(corpus, lists={"train": str(corpus / "train.txt"), split: "nowhere.txt"})


def test_a_list_of_test_clips_is_read_only_where_it_is_there_or_needed(corpus):
    lists = {"train": str(corpus / "train.txt"), "val": str(corpus / "valid.txt"), "test": "nowhere.txt"}
    with pytest.warns(UserWarning, match=r"there are no test clips: data\.lists\.test=nowhere\.txt is no file"):
        read = data(corpus, lists=lists)
    assert not read.clips["test"]
    assert read.clips["train"]
    assert class_names(lists) == read.classes
    with pytest.raises(InputError, match=r"^data\.lists\.test: there is no file nowhere\.txt"):
        data(corpus, lists=lists, needs=("test",))


# --- as the configs say ---


def configured(name: str, **changes) -> StoredData:
    node = load_config(CONFIGS / "data" / f"{name}.yaml")
    node.update({"seed": 0, **changes})
    encoder = instantiate(load_config(CONFIGS / "encoder" / "stored_bn_inception.yaml"))
    return instantiate(node, kinds=encoder.kinds, dim=encoder.dim, needs=("val",))


@real
def test_the_shipped_clips_of_vas():
    lists = {"train": str(MEDIA / "vas_train.txt"), "val": str(MEDIA / "vas_valid.txt"), "test": None}
    with pytest.warns(UserWarning, match="left out: 11,773 of 11,773 train clips and 764 of 768 val clips"):
        read = configured("vas_stored", data_dir=str(MEDIA / "vas/features"), lists=lists, workers=0)
    assert read.classes == ["baby", "cough", "dog", "drum", "fireworks", "gun", "hammer", "sneeze"]
    batch = next(iter(read.loader("val")))
    assert batch is not None
    assert batch["id"] == ["baby/video_01951", "cough/video_00331", "dog/video_02677", "drum/video_02480"]
    assert batch["label"].tolist() == [0, 1, 2, 3]
    assert batch["mel"].shape == (4, 80, 848)
    assert batch["features"].shape == (4, 212, 2048)
    assert 0 <= batch["mel"].min() < 0.2 < 0.8 < batch["mel"].max() <= 1
    assert (batch["features"] >= 0).all()
    assert not torch.equal(batch["features"][..., :1024], batch["features"][..., 1024:])


@real
def test_the_shipped_clips_of_vggsound_among_all_its_lists():
    lists = {
        split: str(MEDIA / f"vggsound_{word}.txt") for split, word in (("train", "train"), ("val", "valid"), ("test", "test"))
    }
    node = load_config(CONFIGS / "data" / "vggsound_stored.yaml")
    node.update({"seed": 0, "data_dir": str(MEDIA / "vggsound"), "lists": lists, "features": 5, "workers": 0})
    encoder = instantiate(load_config(CONFIGS / "encoder" / "stored_resnet50.yaml"))
    start = time.process_time()
    with pytest.warns(
        UserWarning, match="156,487 of 156,487 train clips and 19,056 of 19,056 val clips and 14,510 of 14,512 test"
    ):
        read = instantiate(node, kinds=encoder.kinds, dim=encoder.dim, needs=("test",))
    assert time.process_time() - start < 10
    batch = next(iter(read.loader("test")))
    assert batch is not None
    assert batch["id"] == ["0nib7bMm8BA_15000_25000", "1aDnyPubxdY_118000_128000"]
    assert batch["features"].shape == (2, 5, 2048)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mels = instantiate(node, needs=("test",))
    assert len(list(mels.items("test"))) == 8
    assert isinstance(mels.dataset("test"), Dataset)
