"""What does not belong in a prepared folder: what killed runs had begun, and what runs with other videos or settings left."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from vaura.data.manifest import Clip
from vaura.data.prepared import CLIPS, PARTS
from vaura.files import MARK
from vaura.media.stills import FACTS
from vaura.prepare.cut import RECORDS
from vaura.prepare.sources import Source

CONTENTS = "contents"


def old_files(out: Path, sources: Sequence[Source], clips: Sequence[Clip]) -> list[Path]:
    """Clips, records, parts and folders of jpegs of videos that are not there now, or of longer ones cut otherwise."""
    ids, names = {clip.id for clip in clips}, {source.id for source in sources}
    found = []
    for kind in (CLIPS, RECORDS, PARTS):
        for home, folders, files in os.walk(out / kind):
            stills = [name for name in folders if Path(home, name, FACTS).exists()]
            for name in [*stills, *files]:
                below = Path(home, name).relative_to(out / kind).as_posix()
                below = below.partition("/")[2] if kind == PARTS else below
                called = below if name in stills else below.rpartition(".")[0]
                if called not in (names if kind == RECORDS else ids):
                    found.append(Path(home, name))
            folders[:] = [name for name in folders if name not in stills]
    return sorted(found)


def of_earlier_runs(out: Path, sources: Sequence[Source], clips: Sequence[Clip], remove: bool) -> list[str]:
    """What is to be told of files that are not wanted now; they are removed where that is asked for."""
    old = old_files(out, sources, clips)
    if not old:
        return []
    if not remove:
        return [f"Of videos or settings of earlier runs there are {len(old)} more files; remove_old=true removes them."]
    for path in old:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [f"Of videos or settings of earlier runs {len(old)} files were removed."]


def remove_unfinished(out: Path, share: set[str] | None) -> None:
    """Remove what killed runs had begun to write; of a shard only what belongs to its videos, for others may be writing."""
    for kind in (CLIPS, RECORDS, PARTS, CONTENTS, ""):
        root = out / kind
        for home, folders, names in os.walk(root):
            for name in [*folders, *names]:
                match = re.fullmatch(rf"\.(.+)\.{MARK.pattern}(\.[^.]+)?", name)
                if not match:
                    continue
                # of a folder, jpegs of a clip, what looks like a suffix belongs to its name
                whole = match[1] + (match[2] or "") if name in folders else match[1]
                below = Path(home, whole).relative_to(root).as_posix()
                below = below.partition("/")[2] if kind == PARTS else below
                source = below if kind == RECORDS else re.sub(r"_[0-9]{4,}$", "", below)
                if share is None or (source in share and kind in (CLIPS, RECORDS, PARTS)):
                    if name in folders:
                        shutil.rmtree(Path(home, name), ignore_errors=True)
                    else:
                        Path(home, name).unlink(missing_ok=True)
            # nothing is begun in the folder itself but what has its own name, nor within the jpegs of a clip
            folders[:] = [] if not kind else [name for name in folders if not Path(home, name, FACTS).exists()]
