"""Corpora of arrays: mels, and features of the picture, that somebody has made and stored, as SpecVQGAN's VAS and VGGSound are.

A list names the clips of a split, one a line, as CLASS/NAME or NAME. Below the corpus's folder each has one array a kind:

    [CLASS/]melspec_10s_22050hz/NAME_mel.npy                       mel (80, 860) in [0, 1]
    [CLASS/]feature_rgb_bninception_dim1024_21.5fps/NAME.pkl       features (about 215, 1024), 21.5 a second
    [CLASS/]feature_flow_bninception_dim1024_21.5fps/NAME.pkl
    [CLASS/]feature_resnet50_dim2048_21.5fps/NAME.pkl              features (215, 2048)
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vaura.data.clips import Batch, ClipLoader, EpochOrder
from vaura.data.manifest import PREDICT, SPLITS, names_in
from vaura.data.pickled import read_array
from vaura.data.tables import read_rows, read_text
from vaura.errors import InputError, nearest
from vaura.protocols import ABSENT
from vaura.seeds import seed_of, share_of
from vaura.timing import spread

MEL = "melspec_10s_22050hz"
YOUTUBE = 11  # characters of a video's id there, with which VGGSound's clips are called first
TRIED = 3  # clips read before anything begins


class StoredClip(NamedTuple):
    """A clip whose arrays lie in folders of `place`, as `name` and what each kind ends with."""

    id: str  # the line of its list
    split: str
    place: Path
    name: str
    label: int = ABSENT

    def path(self, kind: str) -> Path:
        """Where its array of this kind lies."""
        return self.place / kind / _file(self.name, kind)


def _file(name: str, kind: str) -> str:
    return f"{name}_mel.npy" if kind == MEL else f"{name}.pkl"


class StoredDataset(Dataset):
    """The arrays of clips, cut to one size.

    An item is asked for as (epoch, index); it depends on these and the seed alone. It holds `id`, `start` (0, for what counts
    seconds), `mel` (80, M) in [0, 1], `label`, and `features` (F, E) where `kinds` names some or they are random.

    Args:
        clips: what to read.
        kinds: folders of the features, whose vectors are laid end to end; none: items have no features.
        dim: width of the features; None takes any.
        features: F, vectors of an item.
        mel_frames: columns of an item's mel, M.
        n_mels: its bands; None takes any.
        random_crop: cut the mel elsewhere every epoch, the features not; otherwise its middle.
        random_features: chance in place of features, uniform in [0, 1), drawn anew every epoch; nothing of `kinds` is read.
        feature_frames: vectors to which stored features are cut, or filled up with 0.
        feature_crop: how many of these, from their middle, are chosen from.
        seed: of the cuts, and of features of chance.
    """

    def __init__(
        self,
        clips: Sequence[StoredClip],
        *,
        kinds: Sequence[str] = (),
        dim: int | None = None,
        features: int = 212,
        mel_frames: int = 848,
        n_mels: int | None = None,
        random_crop: bool = False,
        random_features: bool = False,
        feature_frames: int = 215,
        feature_crop: int = 212,
        seed: int = 0,
    ) -> None:
        self.clips, self.kinds, self.dim, self.seed = clips, kinds, dim, seed
        self.mel_frames, self.n_mels = mel_frames, n_mels
        self.random_crop, self.random_features = random_crop, random_features
        self.features, self.feature_frames, self.feature_crop = features, feature_frames, feature_crop
        self._chosen = torch.from_numpy(resample_indices(features, feature_crop))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> Batch | None:
        """The item, or None (with a warning that names the file) where it cannot be read."""
        item = self.read(*key)
        if isinstance(item, str):
            warnings.warn(f"left out of this batch: {item}", stacklevel=2)
            return None
        return item

    def read(self, epoch: int, index: int) -> Batch | str:
        """The item, or the sentence that says why there is none."""
        clip = self.clips[index]
        item: Batch = {"id": clip.id, "start": 0.0, "label": torch.tensor(clip.label)}
        try:
            item["mel"] = self._mel(clip, epoch)
            if self.random_features:
                item["features"] = self.chance(epoch, clip.id)
            elif self.kinds:
                item["features"] = self._features(clip)
        except InputError as error:
            return str(error)
        return item

    def _mel(self, clip: StoredClip, epoch: int) -> Tensor:
        path = clip.path(MEL)
        return self.cut_mel(read_mel(path, self.n_mels), epoch, clip.id, path)

    def cut_mel(self, mel: Tensor, epoch: int, name: str, where: str | Path) -> Tensor:
        """The columns of the mel (80, M) of clip `name`, which lies at `where`, that an item of this epoch shows."""
        if mel.shape[1] < self.mel_frames:
            raise InputError(f"{where} holds {mel.shape[1]} columns, fewer than data.mel_frames={self.mel_frames}; lower that")
        slack = mel.shape[1] - self.mel_frames
        first = int((slack + 1) * share_of(self.seed, name, epoch, "crop")) if self.random_crop else slack // 2
        return mel[:, first : first + self.mel_frames].contiguous()

    def _features(self, clip: StoredClip) -> Tensor:
        return self.cut_features([_vectors(clip.path(kind)) for kind in self.kinds], clip.id)

    def chance(self, epoch: int, name: str) -> Tensor:
        """What an item of clip `name` has in place of features where they are random."""
        draw = torch.Generator().manual_seed(seed_of(self.seed, "features", epoch, name))
        return torch.rand(self.features, self.dim or 0, generator=draw)

    def cut_features(self, arrays: Sequence[np.ndarray], name: str) -> Tensor:
        """The vectors that an item shows of the features (M, E) of each kind of clip `name`: (F, E)."""
        shared = min(map(len, arrays))  # flow has a picture less
        vectors = torch.from_numpy(np.concatenate([array[:shared] for array in arrays], axis=1).astype(np.float32))
        if self.dim not in (None, vectors.shape[1]):
            told = " and ".join(self.kinds)
            raise InputError(f"{told} of {name} are {vectors.shape[1]} wide together, not encoder.dim={self.dim}; set that")
        even = F.pad(vectors, (0, 0, 0, self.feature_frames - shared))  # of less than 0 it cuts
        return even[centre_crop(self.feature_frames, self.feature_crop)][self._chosen]


def resample_indices(features: int, length: int, repeat: int = 1) -> np.ndarray:
    """Which of `length` vectors stand for all of them where only `features` are wanted: (features * repeat,) int64.

    Those that `spread` picks, every one named `repeat` times.
    Raises InputError where more are wanted than there are.

    >>> resample_indices(5, 212).tolist()
    [35, 77, 119, 162, 204]
    """
    if not 1 <= features <= length:
        raise InputError(
            f"data.features is {features}; a clip has 1 to {length} of them (data.feature_crop): choose as many, by "
            "conditioner.features where data.features follows that"
        )
    return np.repeat(spread(features, length).numpy(), repeat)


def centre_crop(length: int, wanted: int) -> slice:
    """The middle `wanted` of `length`; the odd one over lies behind.

    >>> centre_crop(860, 848), centre_crop(215, 212)
    (slice(6, 854, None), slice(1, 213, None))
    """
    first = (length - wanted) // 2
    return slice(first, first + wanted)


def read_mel(path: str | Path, n_mels: int | None = None, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """A stored mel (n_mels, M) float32 with its values within `bounds`; where `n_mels` is None, of any number of bands.

    Raises InputError where the file is missing or broken, or no such mel.
    """
    try:
        with Path(path).open("rb") as file:
            mel = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; check the path") from error
    except Exception as error:  # NumPy reads the header as Python: a damaged one raises SyntaxError, TokenError, TypeError, ...
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} cannot be read as an array ({reason}); replace the file") from error
    return checked_mel(mel, path, n_mels, bounds)


def checked_mel(
    mel: np.ndarray, path: str | Path, n_mels: int | None = None, bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """An array that lies at `path` as a mel (n_mels, M) float32; InputError where it is none."""
    if mel.ndim != 2 or mel.dtype.kind != "f" or not mel.size or n_mels not in (None, len(mel)):
        wanted = "mel, a table of bands and columns," if n_mels is None else f"mel of {n_mels} bands"
        raise InputError(f"{path} holds no {wanted} but an array of {mel.dtype} {mel.shape}; replace or remove the file")
    if not (mel.min() >= bounds[0] and mel.max() <= bounds[1]):  # so written, what is no number is refused too
        raise InputError(f"{path} reaches from {mel.min():.3g} to {mel.max():.3g}; mels here lie in [0, 1]: make it anew")
    return torch.from_numpy(mel.astype(np.float32))


def _vectors(path: Path) -> np.ndarray:
    return checked_vectors(read_array(path), path)


def checked_vectors(array: np.ndarray, path: str | Path) -> np.ndarray:
    """An array that lies at `path`, if it is features (M, E); InputError where it is not."""
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size or not np.isfinite(array).all():
        raise InputError(f"{path} holds no features, a table of numbers with a row for each; replace the file")
    return array


class StoredData:
    """The clips of a corpus of arrays, by split, and their loaders.

    Clips of a list whose files are missing are left out, and one warning says how many. Mels have the bands of the first ones
    read: a clip of others is left out of its batch. `classes` are what labels stand for,
    folders in the lists, sorted, or the words of `labels_file`; where there are neither, it is empty and labels are -1.

    Args:
        data_dir: folder of the corpus.
        lists: split -> the file that lists its clips; null: there is none. Of test clips, where these are not needed, the file
            can be absent too, which a warning tells.
        features: vectors of a clip, F: 1 to `feature_crop`.
        batch_size: clips a step, per process.
        workers: processes that read; 0: the main one.
        labels_file: VGGSound's csv `id,start,label,split`; null: classes are folders.
        only_class: leave out the clips of all other classes; null: none.
        kinds, dim: what the encoder calls its features, and how wide they are together.
        needs: splits without whose clips nothing can be done.
        mel_frames, random_crop, random_features, feature_frames, feature_crop, seed: as of `StoredDataset`; only training is
            cut at random.
    """

    cache = None  # there are no videos to spare

    def __init__(
        self,
        *,
        data_dir: str,
        lists: Mapping[str, str | None],
        features: int,
        batch_size: int,
        workers: int,
        mel_frames: int = 848,
        random_crop: bool = False,
        random_features: bool = False,
        feature_frames: int = 215,
        feature_crop: int = 212,
        labels_file: str | None = None,
        only_class: str | None = None,
        seed: int = 0,
        kinds: Sequence[str] = (),
        dim: int | None = None,
        needs: Sequence[str] = ("train",),
    ) -> None:
        for name, number in (("batch_size", batch_size), ("mel_frames", mel_frames)):
            if number < 1:
                raise InputError(f"data.{name} is {number}; give 1 or more")
        if not 1 <= feature_crop <= feature_frames:
            raise InputError(f"data.feature_crop is {feature_crop}; choose 1 to data.feature_frames={feature_frames}")
        resample_indices(features, feature_crop)  # refuses now
        if random_features and not dim:
            raise InputError("data.random_features=true needs an encoder that says how wide features are: set encoder.dim")
        if unknown := [split for split in lists if split not in (*SPLITS, PREDICT)]:
            raise InputError(f"data.lists.{unknown[0]} is no split; one is {', '.join(SPLITS)}." + nearest(unknown[0], SPLITS))
        if not Path(data_dir).is_dir():
            raise InputError(f"the folder {data_dir} of stored mels and features does not exist; check data.data_dir")
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.data_dir, self.left_out = Path(data_dir), []
        self._reading: dict[str, Any] = {"dim": dim, "features": features, "mel_frames": mel_frames, "seed": seed}
        self._reading |= {"feature_frames": feature_frames, "feature_crop": feature_crop, "random_features": random_features}
        self._kinds, self._random_crop = () if random_features else tuple(kinds), random_crop
        self._datasets: dict[str, StoredDataset] = {}
        lists = {split: path for split, path in lists.items() if path and not _spared(split, path, needs)}
        lines = {split: _listed(split, lists.get(split)) for split in (*SPLITS, PREDICT)}
        self.classes, labels = _labels(lines, labels_file)
        if only_class is not None:
            if only_class not in self.classes:
                raise InputError(f"data.only_class={only_class} is no class of the lists." + nearest(only_class, self.classes))
            wanted = self.classes.index(only_class)
            lines = {split: [line for line in listed if labels.get(line) == wanted] for split, listed in lines.items()}
        self.clips = self._there(lines, labels)
        self._tell(lines)
        for split in needs:
            if not self.clips[split]:
                raise InputError(self._why_none(split, lines[split], lists.get(split)))
            self._try(split)

    def _there(self, lines: Mapping[str, list[str]], labels: Mapping[str, int]) -> dict[str, list[StoredClip]]:
        """Split -> its clips that have all files. Every folder is listed once, no file is looked for by itself."""

        @functools.cache
        def look(folder: str) -> tuple[Path, list[tuple[str, frozenset[str]]]]:
            place = self.data_dir / folder
            return place, [(kind, names_in(place / kind)) for kind in (MEL, *self._kinds)]

        def clips(split: str) -> Iterator[StoredClip]:
            for line in lines[split]:
                folder, _, name = line.rpartition("/")
                place, kinds = look(folder)
                if all(_file(name, kind) in there for kind, there in kinds):
                    yield StoredClip(line, split, place, name, labels.get(line, ABSENT))

        return {split: list(clips(split)) for split in lines}

    def _tell(self, lines: Mapping[str, list[str]]) -> None:
        counts = {split: (len(listed) - len(self.clips[split]), len(listed)) for split, listed in lines.items()}
        told = [f"{lacking:,} of {listed:,} {split} clips" for split, (lacking, listed) in counts.items() if lacking]
        if told:
            kinds = ", ".join((MEL, *self._kinds))
            self.left_out = [f"{' and '.join(told)}, which have not all of {kinds} below {self.data_dir}"]
            warnings.warn(f"left out: {self.left_out[0]}", stacklevel=3)

    def _why_none(self, split: str, listed: list[str], path: str | None) -> str:
        if not path:
            return f"there is no list of {split} clips; give data.lists.{split}=FILE"
        if not listed:
            return f"{path} lists no {split} clip; give another by data.lists.{split}=FILE"
        folder, _, name = listed[0].rpartition("/")
        paths = (StoredClip(listed[0], split, self.data_dir / folder, name).path(kind) for kind in (MEL, *self._kinds))
        lacking = next((path for path in paths if not path.is_file()), None)
        example = f": there is no {lacking}" if lacking else ""
        return (
            f"none of the {len(listed):,} clips of {path} has all its files below {self.data_dir}{example}; "
            f"check data.data_dir and encoder.kinds, or give data.lists.{split} another list"
        )

    def _try(self, split: str) -> None:
        """Learn the bands of mels from the first clips; InputError where none can be used: then no broken file is to blame."""
        dataset = self.dataset(split)
        tried = [dataset.read(0, index) for index in range(min(TRIED, len(dataset)))]
        bands = Counter(len(item["mel"]) for item in tried if not isinstance(item, str))
        if not bands:
            raise InputError(f"the {split} clips cannot be used: {tried[0]}")
        dataset.n_mels = self._reading["n_mels"] = bands.most_common(1)[0][0]

    def dataset(self, split: str) -> StoredDataset:
        """The clips of a split, read from the files; those of training at random where that is asked for."""
        if split not in self._datasets:
            crop = self._random_crop and split == "train"
            self._datasets[split] = StoredDataset(self.clips[split], kinds=self._kinds, random_crop=crop, **self._reading)
        return self._datasets[split]

    def items(self, split: str) -> Iterator[Batch]:
        """Every readable clip of a split once, in order."""
        order = [(0, index) for index in range(len(self.clips[split]))]
        loader = DataLoader(self.dataset(split), None, sampler=order, num_workers=self.workers)
        return (item for item in loader if item is not None)

    def loader(self, split: str, rank: int = 0, world_size: int = 1, batch_size: int | None = None) -> ClipLoader:
        """Batches of a split for process `rank` of `world_size`: train is shuffled anew every epoch."""
        dataset = self.dataset(split)
        order = EpochOrder(len(dataset), shuffle=split == "train", seed=self.seed, rank=rank, world_size=world_size)
        return ClipLoader(dataset, order, min(batch_size or self.batch_size, len(order)), self.workers)


def class_names(lists: Mapping[str, str | None], labels_file: str | None = None) -> list[str]:
    """What labels stand for, in order: the words of `labels_file`, or else the folders in `lists`."""
    paths = lists.items() if labels_file is None else ()
    return _labels(
        {split: _lines(path) for split, path in paths if path and (split != "test" or Path(path).exists())}, labels_file
    )[0]


def _spared(split: str, path: str, needs: Sequence[str]) -> bool:
    """Whether a list is not there that is of use only behind a training."""
    if split in ("train", "val", *needs) or Path(path).exists():
        return False
    warnings.warn(f"there are no {split} clips: data.lists.{split}={path} is no file", stacklevel=3)
    return True


def _listed(split: str, path: str | None) -> list[str]:
    try:
        return _lines(path) if path else []
    except InputError as error:
        raise InputError(f"data.lists.{split}: {error}") from error


def _lines(path: str) -> list[str]:
    """The clips that a list names, each once."""
    return list(dict.fromkeys(line.strip() for line in read_text(path).splitlines() if line.strip()))


def _labels(lines: Mapping[str, list[str]], labels_file: str | None) -> tuple[list[str], dict[str, int]]:
    """The classes in order, and the number of its class for every line that has one."""
    if labels_file is None:
        words = {line: line.partition("/")[0] for listed in lines.values() for line in listed if "/" in line}
        classes = sorted(set(words.values()))
    else:
        table = dict(read_rows(labels_file, ("id", "start", "label", "split"), lambda row: (row[0], row[2])))
        words = {}
        for listed in lines.values():
            for line in listed:
                key = line.rpartition("/")[2][:YOUTUBE]
                if key not in table:
                    raise InputError(
                        f"{labels_file} has no row for the clip {line}: no video {key}; give the corpus's own table"
                    )
                words[line] = table[key]
        classes = sorted(set(table.values()))
    numbers = {word: number for number, word in enumerate(classes)}
    return classes, {line: numbers[word] for line, word in words.items()}
