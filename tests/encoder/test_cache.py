import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vaura.encoder.cache
from vaura.data.manifest import Clip
from vaura.encoder.cache import FeatureCache, content_hash, fingerprint
from vaura.encoder.tiny_avclip import TinyAVCLIP
from vaura.errors import InputError
from vaura.protocols import Encoder, Tokenizer

FEATURES = torch.arange(24, dtype=torch.float32).view(1, 4, 6)


def encoder(**settings) -> TinyAVCLIP:
    torch.manual_seed(0)
    return TinyAVCLIP(**{"dim": 6, "width": 4, "size": 16, "mean_frames": 3, **settings})


@pytest.fixture
def clip(tmp_path) -> Clip:
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"a picture " * 1000)
    return Clip("clip", video, 2.56, 1.0)


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "features")


def computed(cache: FeatureCache, by: nn.Module, span: Clip, gives: Tensor = FEATURES) -> bool:
    """Whether the features had to be computed; they are right in any case."""
    calls = []
    found = cache.features(by, span, lambda: calls.append(1) or gives)
    assert torch.equal(found, gives)
    assert found.dtype == gives.dtype
    return bool(calls)


def files(cache: FeatureCache) -> list[Path]:
    return [path for path in cache.folder.rglob("*") if path.is_file()]


def test_features_are_computed_once(cache, clip):
    assert computed(cache, encoder(), clip)
    assert not computed(cache, encoder(), clip)
    assert not computed(FeatureCache(cache.folder), encoder(), clip)
    assert len(files(cache)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_as_they_were(cache, clip, dtype):
    features = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)
    assert computed(cache, encoder(), clip, features)
    assert not computed(cache, encoder(), clip, features)


def test_every_span_has_its_own(cache, clip):
    spans = [clip, replace(clip, start=1.04), replace(clip, duration=2.6)]
    for number, span in enumerate(spans):
        assert computed(cache, encoder(), span, FEATURES + number)
    for number, span in enumerate(spans):
        assert not computed(cache, encoder(), span, FEATURES + number)


def test_a_video_is_known_by_its_content(cache, clip, tmp_path):
    assert computed(cache, encoder(), clip)
    moved = tmp_path / "elsewhere.mp4"
    moved.write_bytes(clip.video.read_bytes())
    assert not computed(cache, encoder(), replace(clip, id="other", video=moved))
    changed = bytearray(clip.video.read_bytes())
    changed[5000] ^= 1
    clip.video.write_bytes(changed)
    os.utime(clip.video, ns=(0, clip.video.stat().st_mtime_ns + 1_000_000))
    assert computed(cache, encoder(), clip, FEATURES + 1)
    assert not computed(cache, encoder(), replace(clip, video=moved))
    with pytest.raises(InputError, match=r"nowhere\.mp4 cannot be read \(No such file"):
        cache.features(encoder(), replace(clip, video=tmp_path / "nowhere.mp4"), lambda: FEATURES)


def test_a_file_is_hashed_once_until_it_changes(clip, monkeypatch):
    known = content_hash(clip.video)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("the file is read again"))
    assert content_hash(clip.video) == known


class Halved(TinyAVCLIP):
    """Another class with the same settings and weights."""


def written_to() -> nn.Module:
    changed = encoder()
    with torch.no_grad():
        changed.pool.bias[3] += 1e-6
    return changed


OTHERS = {
    "setting": lambda: encoder(fps=30.0),
    "setting without a weight": lambda: encoder(mean_frames=5),
    "weight": written_to,
    "precision": lambda: encoder().half(),
    "class": lambda: Halved(**encoder().settings),
}


@pytest.mark.parametrize("other", OTHERS)
def test_every_encoder_has_its_own(cache, clip, other):
    assert fingerprint(encoder()) == fingerprint(encoder())
    changed = OTHERS[other]()
    if other == "class":
        changed.load_state_dict(encoder().state_dict())
    assert fingerprint(changed) != fingerprint(encoder())
    assert computed(cache, encoder(), clip)
    assert computed(cache, changed, clip, FEATURES + 1)
    assert not computed(cache, encoder(), clip)


def test_an_encoder_that_is_taught_meanwhile_is_another(cache, clip):
    one = encoder()
    assert computed(cache, one, clip)
    with torch.no_grad():
        one.pool.weight.mul_(1.01)
    assert computed(cache, one, clip, FEATURES + 1)
    one.load_state_dict(encoder().state_dict())
    assert not computed(cache, one, clip)


def test_the_weights_are_read_once(cache, clip, monkeypatch):
    one = encoder()
    assert computed(cache, one, clip)
    monkeypatch.setattr(vaura.encoder.cache, "fingerprint", lambda _: pytest.fail("the weights are read again"))
    assert not computed(cache, one, clip)
    assert computed(cache, one, replace(clip, start=0.0))


def test_a_setting_of_the_contract_counts_where_nothing_else_tells():
    class Plain(nn.Module):
        resize = 256

    assert "resize" in Encoder.__annotations__
    before = fingerprint(Plain())
    Plain.resize = 240
    assert fingerprint(Plain()) != before


def test_a_tokenizer_has_a_fingerprint_too():
    class Plain(nn.Module):
        sample_rate, num_codebooks = 16000, 4

    one, other = Plain(), Plain()
    assert fingerprint(one, Tokenizer) == fingerprint(other, Tokenizer) != fingerprint(one)
    other.num_codebooks = 5
    assert fingerprint(one, Tokenizer) != fingerprint(other, Tokenizer)
    one.register_buffer("codebooks", torch.zeros(3))
    before = fingerprint(one, Tokenizer)
    one.get_buffer("codebooks").add_(1)
    assert fingerprint(one, Tokenizer) != before


def test_what_only_decodes_does_not_count():
    class Codec(nn.Module):
        decoding = ("decoder",)

        def __init__(self, width: int = 2, decoded: int = 2) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Conv1d(1, width, 2), nn.Conv1d(decoded, 1, 2)
            self.decoder_of_all = nn.Parameter(torch.zeros(2))
            for parameter in self.parameters():
                nn.init.zeros_(parameter)

    before = fingerprint(Codec(), Tokenizer)
    assert fingerprint(Codec(decoded=3), Tokenizer) == before
    louder = Codec()
    nn.init.ones_(louder.decoder.weight)
    louder.decoder.half()
    assert fingerprint(louder, Tokenizer) == before
    nn.init.ones_(louder.decoder_of_all)
    assert fingerprint(louder, Tokenizer) != before
    assert fingerprint(Codec(width=3), Tokenizer) != before


def test_what_is_no_module_is_known_by_its_settings():
    class Plain:
        def __init__(self, levels: int) -> None:
            self.settings = {"levels": levels}

    assert fingerprint(Plain(2), Tokenizer) == fingerprint(Plain(2), Tokenizer) != fingerprint(Plain(3), Tokenizer)


BROKEN = {
    "empty": lambda data: b"",
    "cut in its header": lambda data: data[:20],
    "cut in its tensor": lambda data: data[:-8],
    "one bit": lambda data: data[:-5] + bytes([data[-5] ^ 4]) + data[-4:],
    "another file": lambda data: b"no tensors" * 50,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_computed_again_and_mended(cache, clip, how):
    assert computed(cache, encoder(), clip)
    (path,) = files(cache)
    path.write_bytes(BROKEN[how](path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"{path.name} are broken .* computed again"):
        assert computed(cache, encoder(), clip)
    assert not computed(cache, encoder(), clip)


def test_what_fails_leaves_nothing(cache, clip):
    with pytest.raises(InputError, match="damaged"):
        cache.features(encoder(), clip, lambda: (_ for _ in ()).throw(InputError("damaged")))
    assert files(cache) == []


def test_a_full_disk_is_told(cache, clip, full_disk):
    with full_disk(), pytest.raises(InputError, match=r"cannot write .*\.safetensors: .*make room"):
        cache.features(encoder(), clip, lambda: FEATURES)
    assert files(cache) == []


def _killed_while_writing(cache: FeatureCache, clip: Clip) -> None:
    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = half
    cache.features(encoder(), clip, lambda: FEATURES)


def _used_by_many(cache: FeatureCache, clip: Clip, begin) -> None:
    begin.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(25):
            span = replace(clip, start=float(number))
            assert torch.equal(cache.features(encoder(), span, lambda n=number: FEATURES + n), FEATURES + number)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_nothing_half_written_is_found_after_a_kill(cache, clip, forked):
    assert forked(_killed_while_writing, [(cache, clip)]) == [-signal.SIGKILL]
    assert not cache.path(encoder(), clip).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert computed(cache, encoder(), clip)
    assert not computed(cache, encoder(), clip)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_share_a_folder(cache, clip, forked):
    begin = multiprocessing.get_context("fork").Barrier(4)
    assert forked(_used_by_many, [(cache, clip, begin)] * 4) == [0] * 4
    assert len(list(cache.folder.rglob("*.safetensors"))) == 25
