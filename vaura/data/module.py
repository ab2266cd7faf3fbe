"""The data of a run: a folder of videos, a manifest or a corpus, its clips by split, and their loaders."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from vaura.data.clips import Batch, ClipDataset, ClipLoader, EpochOrder
from vaura.data.corpus import Reader
from vaura.data.manifest import PREDICT, SPLITS, Clip, in_split, read_manifest, scan_folder, usable
from vaura.data.shards import NUMBERS, KeptClips, Tokenise
from vaura.errors import InputError
from vaura.files import make_folder
from vaura.media.content import Contents
from vaura.media.torchcodec_door import check_usable
from vaura.media.video import READERS
from vaura.progress import Bar, bar

SHORT = ("leave_out", "loop", "pad")
"""What may become of clips that are too short."""

TELL = 10
"""Sentences about what was left out that are shown; of more only this many, and how many there are."""


PATIENCE = 90
"""Seconds after which a file that one machine has written is seen by the others, where they share a folder."""


class Source(Mapping[str, list[Clip]]):
    """Split -> its clips: `source["test"]`.

    What cannot be used is warned about, and told in `left_out`; what the rules of a corpus leave out, in `unwanted`.
    A corpus is asked for a split when the split is asked for, so that lists and tables of others need not be there. Looking
    costs a listing of each folder; files are opened where nothing says how long they are, as in a plain folder.

    Args:
        data_dir: a folder of videos, of any size, frame rate, length and codec; or where those of `corpus` are.
        manifest: a JSONL file, see `manifest.py`, in place of a folder or a corpus.
        corpus: a reader of `corpus.py`.
        duration: seconds that a clip has to last; None takes any.
        val_share: share of a folder's videos kept for validation.
        needs_sound: leave out videos of a folder that have no sound.
        workers: files opened at once.
    """

    def __init__(
        self,
        *,
        data_dir: str | None = None,
        manifest: str | None = None,
        corpus: Reader | None = None,
        duration: float | None = None,
        val_share: float = 0.0,
        needs_sound: bool = True,
        workers: int = 1,
    ) -> None:
        if (manifest is not None and data_dir is not None) or manifest is data_dir is corpus:
            raise InputError("give data.data_dir=FOLDER of videos, or data.manifest=FILE.jsonl, one of the two")
        corpus = corpus if manifest is None else None
        self.name = str(manifest or data_dir or getattr(corpus, "keywords", {}).get("path_to_metadata", "the corpus"))
        self.left_out: list[str] = []
        self.unwanted: list[str] = []
        self._data_dir, self._corpus, self._duration = data_dir, corpus, duration
        self._splits: dict[str, list[Clip]] = {}
        if corpus is None:
            if manifest is not None:
                clips, left_out = usable(read_manifest(manifest), duration, workers)
            else:
                clips, left_out = scan_folder(str(data_dir), duration or 0.0, val_share, needs_sound, workers)
            self._splits = {split: in_split(clips, split) for split in (*SPLITS, PREDICT)}
            self._tell(left_out)

    def __getitem__(self, split: str) -> list[Clip]:
        in_split((), split)  # refuses what is no split
        if split not in self._splits and self._corpus is not None:
            self._splits[split] = self._read((split,))
        return self._splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter((*SPLITS, PREDICT))

    def __len__(self) -> int:
        return len(SPLITS) + 1

    def everything(self) -> list[Clip]:
        """The clips of all splits that there are, each once: one that is marked for predict too is of its own split."""
        if self._corpus is None:
            return [clip for split in self for clip in self[split] if clip.split == split]
        return self._read(None)

    def reasons(self) -> str:
        """Why there may be too few clips, in one sentence."""
        return "; ".join(_shortened([*self.unwanted, *self.left_out]))

    def _read(self, splits: tuple[str, ...] | None) -> list[Clip]:
        assert self._corpus is not None
        found = self._corpus(data_dir=self._data_dir, splits=splits, duration=self._duration)
        self.unwanted += found.unwanted
        self._tell(found.left_out)
        return found.clips

    def _tell(self, left_out: Sequence[str]) -> None:
        self.left_out += left_out
        for sentence in _shortened(left_out):
            warnings.warn(f"left out: {sentence}", stacklevel=4)


def _shortened(sentences: Sequence[str]) -> list[str]:
    if len(sentences) <= TELL:
        return list(sentences)
    return [*sentences[:TELL], f"and {len(sentences) - TELL} more; scripts/make_manifest.py lists them all"]


class Selection:
    """The clips of one split of a data config, to generate for or to test on.

    Args:
        data_dir, manifest, corpus: as of `Source`.
        split: train, val, test or predict; None takes all.
        duration: seconds that a clip has to last; None takes any.
        needs_sound: leave out videos of a folder that have no sound.

    `clips` are in order, `left_out` tells of those that cannot be used. Raises InputError where no clip is left.
    """

    def __init__(
        self,
        *,
        data_dir: str | None = None,
        manifest: str | None = None,
        corpus: Reader | None = None,
        split: str | None = "test",
        duration: float | None = None,
        needs_sound: bool = False,
    ) -> None:
        source = Source(data_dir=data_dir, manifest=manifest, corpus=corpus, duration=duration, needs_sound=needs_sound)
        self.clips = source.everything() if split is None else source[split]
        self.left_out = source.left_out
        if not self.clips:
            reasons = source.reasons() or f"no clip has the split {split}; split=null takes those of all splits"
            raise InputError(f"{source.name} has no clip for this: {reasons}")


class VideoData:
    """Clips of `duration` seconds from `manifest`, from every video below `data_dir`, or from `corpus`.

    Args:
        data_dir: a folder of videos, of any size, frame rate, length and codec; or where those of `corpus` are.
        manifest: a JSONL file in place of a folder, see `manifest.py`.
        corpus: a reader of `corpus.py`, to which `data_dir` is given.
        duration: seconds of a training clip.
        short: what becomes of shorter ones: "leave_out", or where sound alone is learnt "loop" or "pad" with silence.
        batch_size: clips a step, per process.
        workers: processes that decode; 0: the main one.
        random_start: cut training clips at another instant every epoch.
        random_crop: cut the square picture of training clips elsewhere every epoch; the middle otherwise.
        flip: share of training clips that are mirrored, drawn anew every epoch.
        keep_in_memory: read every clip once; needs random_start=False, random_crop=False and flip=0.
        cache: a folder that keeps codes and features, see `shards.py`; None: they are made anew in every step.
        takes: spans and views of each training clip kept there; epoch e shows number e % takes.
        cache_format: float32 or bfloat16, how features are kept.
        reader: "pyav" or "torchcodec", what decodes pictures.
        val_share: share of a folder's videos kept for validation.
        seed: of the order and the cuts.
        fps, size, sample_rate, channels: what the encoder and the tokenizer want; fps None: sound alone.
        resize: short side, in pixels, of the picture from which `size` is cut; None: `size` itself.
        needs: splits without whose clips nothing can be done.
    """

    def __init__(
        self,
        *,
        data_dir: str | None = None,
        manifest: str | None = None,
        corpus: Reader | None = None,
        duration: float,
        short: str = "leave_out",
        batch_size: int,
        workers: int,
        random_start: bool,
        random_crop: bool = False,
        flip: float = 0.0,
        keep_in_memory: bool,
        cache: str | None = None,
        takes: int = 1,
        cache_format: str = "float32",
        reader: str = "pyav",
        val_share: float,
        seed: int,
        fps: float | None,
        size: int | None,
        sample_rate: int,
        channels: int,
        resize: int | tuple[int, int] | None = None,
        needs: Sequence[str] = ("train",),
    ) -> None:
        if keep_in_memory and (random_start or random_crop or flip):
            raise InputError(
                "data.keep_in_memory=true needs the same span and picture every epoch: set data.random_start=false, "
                "data.random_crop=false and data.flip=0"
            )
        if short not in SHORT:
            raise InputError(f"data.short is '{short}'; choose from {', '.join(SHORT)}")
        loops = None if short == SHORT[0] else short
        if loops and fps is not None:
            raise InputError(
                f"data.short={short} makes sound longer, not pictures, and this run looks at them: config=configs/prepare.yaml "
                "makes clips that are long enough"
            )
        if reader not in READERS:
            raise InputError(f"data.reader is '{reader}'; choose from {', '.join(READERS)}")
        if reader == "torchcodec":
            check_usable()
        if cache_format not in NUMBERS:
            raise InputError(f"data.cache_format is '{cache_format}'; choose from {', '.join(NUMBERS)}")
        if takes < 1:
            raise InputError(f"data.takes is {takes}; keep at least 1 of each clip")
        if takes > 1 and cache is None and "train" in needs:
            raise InputError(f"data.takes={takes} is what a cache keeps of each clip: name its folder by data.cache=FOLDER")
        if cache is not None:
            cache = str(Path(cache).expanduser())
            if not any(Path(cache).glob("*/*.safetensors")):  # one that others have filled may be closed to this user
                make_folder(cache)
            if takes == 1 and (random_start or random_crop or flip):
                warnings.warn(
                    "data.takes=1 keeps one span and view of each training clip, which every epoch shows; "
                    "data.takes=8 would keep eight",
                    stacklevel=2,
                )
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.cache, self.takes, self.cache_format = cache, takes, cache_format
        self.clips = Source(
            data_dir=data_dir,
            manifest=manifest,
            corpus=corpus,
            duration=None if loops else duration,
            val_share=val_share,
            workers=workers,
        )
        for split in needs:
            if not self.clips[split]:
                reasons = self.clips.reasons() or f"no clip has the split {split}"
                what = "trained on" if split == "train" else f"used for the split {split}"
                raise InputError(f"no video of {self.clips.name} can be {what}: {reasons}")
        if "train" in needs:
            self.clips["val"]  # whose list, where it is missing, is missed now and not after the first stages
        self._reading = {"duration": duration, "fps": fps, "size": size, "sample_rate": sample_rate, "channels": channels}
        self._reading |= {"resize": resize, "reader": reader, "seed": seed, "short": loops}
        self._training = {"random_start": random_start, "random_crop": random_crop, "flip": flip}
        self._keep = keep_in_memory
        self._datasets: dict[str, ClipDataset] = {}
        self.tokens: dict[str, KeptClips] = {}  # splits whose codes and features are kept

    @property
    def left_out(self) -> list[str]:
        """A sentence for whatever was left out of the splits asked for so far."""
        return self.clips.left_out

    def dataset(self, split: str) -> ClipDataset:
        """The clips of a split, read from the files; those of training at random where that is asked for."""
        dataset = self._unread(split)
        if self._keep and dataset.kept is None:
            dataset.keep_all(self.workers)
        return dataset

    def _unread(self, split: str) -> ClipDataset:
        if split not in self._datasets:
            training = self._training if split == "train" else {}
            self._datasets[split] = ClipDataset(self.clips[split], **self._reading, **training)
        return self._datasets[split]

    def keep_tokens(self, folder: str | Path, makers: Mapping[str, str]) -> None:
        """From now on training and validation clips come as codes and features, which `make_tokens` makes and `folder` keeps.

        `makers` is a name and a fingerprint of what makes them.
        """
        self.cache = str(folder)
        for split in ("train", "val"):
            if self.clips[split]:
                self.tokens[split] = KeptClips(self._unread(split), folder, makers, self.takes, self.cache_format)

    def make_tokens(
        self,
        tokenise: Tokenise,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        agree: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """Make the codes and features that are not kept yet, of the media that `tokenise` is given on `device`.

        Each of `world_size` processes makes its share; `agree` waits for all of them, and says whether they gave the same
        number. Raises InputError where the folder cannot be written, or is not one for all processes.
        """
        if not self.tokens:
            return
        assert self.cache is not None
        files = list(dict.fromkeys(clip.video for split in self.tokens for clip in self.clips[split]))
        contents = Contents(Path(self.cache) / "contents", str(rank))
        contents.of(files[rank::world_size], self.workers, "" if rank else "recognise the videos")
        agree(0)
        known = contents.of(files, self.workers)
        for split, kept in self.tokens.items():
            kept.name_all(known)
            kept.find()
            missing, there = kept.share(rank, world_size)
            if missing:
                self.dataset(split)  # in memory, where that is asked for
                workers = 0 if self._keep else self.workers
                task = f"tokenise {split}", len(missing) + there, there
                with nullcontext(Bar(*task)) if rank else bar(*task) as shown:
                    kept.make(tokenise, missing, device, self.batch_size, workers, shown)
        for _ in range(PATIENCE):
            seen = 0
            for kept in self.tokens.values():
                kept.find()
                seen = zlib.crc32(kept.found, seen)
            if agree(seen):
                return
            time.sleep(1)
        raise InputError(f"data.cache={self.cache} is not the same to all processes; name a folder that they share")

    def check_tokens(self) -> None:
        """Raise InputError where of a split nothing is kept: a training would go on with empty batches."""
        for split, kept in self.tokens.items():
            if not kept.any_there:
                raise InputError(f"none of the {split} clips of {self.clips.name} can be read; see the warnings above")

    def items(self, split: str) -> Iterator[Batch]:
        """Every readable clip of a split once, in order."""
        order = [(0, index) for index in range(len(self.clips[split]))]
        workers = 0 if self._keep else self.workers
        loader = DataLoader(self.dataset(split), None, sampler=order, num_workers=workers)
        return (item for item in loader if item is not None)

    def loader(self, split: str, rank: int = 0, world_size: int = 1, batch_size: int | None = None) -> ClipLoader:
        """Batches of a split for process `rank` of `world_size`: train is shuffled anew every epoch.

        Codes and features are read by the process itself: a worker would take longer to send them.
        """
        dataset = self.tokens[split] if split in self.tokens else self.dataset(split)
        workers = 0 if self._keep or split in self.tokens else self.workers
        order = EpochOrder(len(dataset), shuffle=split == "train", seed=self.seed, rank=rank, world_size=world_size)
        return ClipLoader(dataset, order, min(batch_size or self.batch_size, len(order)), workers)
