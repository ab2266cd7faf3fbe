"""The one door to torchaudio.

The native library inside torchaudio's wheels needs the CUDA build of torch it was compiled with and refuses to load on any
other, although what we use (resampling, mel, kaldi features) is pure Python. Where the plain import fails, a stand-in for the
extension is put in its place and the import is tried once more. Import torchaudio, and packages that import it, through here:

    from vaura.media.torchaudio_door import torchaudio
"""

import importlib
import sys
import types


def _open_torchaudio() -> types.ModuleType:
    try:
        return importlib.import_module("torchaudio")
    except (ImportError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
    stand_in = types.ModuleType("torchaudio._extension")
    stand_in._IS_TORCHAUDIO_EXT_AVAILABLE = False
    stand_in._IS_RIR_AVAILABLE = False
    stand_in._IS_ALIGN_AVAILABLE = False
    absent = types.SimpleNamespace(is_available=lambda: False)
    stand_in.lazy_import_sox_ext = stand_in.lazy_import_ffmpeg_ext = lambda: absent

    def needs_native(function):
        def unavailable(*args, **kwargs):
            raise RuntimeError(f"torchaudio's {function.__name__} needs its native library, which does not fit this torch")

        return unavailable

    stand_in.fail_if_no_align = stand_in.fail_if_no_rir = stand_in.fail_if_no_sox = needs_native
    sys.modules["torchaudio._extension"] = stand_in
    return importlib.import_module("torchaudio")


torchaudio = _open_torchaudio()
