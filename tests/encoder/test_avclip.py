import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import vaura.encoder.avclip
from vaura.components import instantiate
from vaura.encoder.avclip import AVCLIP, Sizes, Tower
from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.precision import has_compiler, multiplies_bfloat16
from vaura.protocols import Encoder

# Three steps of two video frames, and four patches of 4 x 4 pixels.
TINY = Sizes(width=16, depth=2, hidden=24, pooled_hidden=40, patch=4, patch_frames=2, patches=4, steps=3, head_width=8)
FRAMES, SIDE = 6, 8


def weights(sizes: Sizes = TINY, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {key: torch.randn(value.shape) * 0.3 for key, value in Tower(sizes).state_dict().items()}


def put(path: Path, state: dict[str, Tensor], prefix: str = "", **beside) -> str:
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}, **beside}, path)
    return str(path)


@pytest.fixture
def file(tmp_path) -> str:
    return put(tmp_path / "epoch_best.pt", weights(), "module.v_encoder.")


def make(file: str, **settings) -> AVCLIP:
    return AVCLIP(file, **{"head_width": 8, **settings})


def pictures(segments: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, segments * FRAMES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def slow(state: dict[str, Tensor], segment: Tensor) -> Tensor:
    """Features (T, D) of one segment (F, 3, H, W) by a plain reading of the definition: masks, Conv3d, torch's own layer."""
    state = {key: value.double() for key, value in state.items()}
    pixels = (segment.double() / 255 - 0.5) / 0.5
    stride = tuple(state["patch_embed_3d.proj.weight"].shape[2:])
    cubes = F.conv3d(
        pixels.transpose(0, 1)[None], state["patch_embed_3d.proj.weight"], state["patch_embed_3d.proj.bias"], stride
    )
    tokens = [state["cls_token"][0, 0] + state["pos_embed"][0, 0]]
    at = [(-1, -1)]
    for t in range(TINY.steps):
        for p in range(TINY.patches):
            where = cubes[0, :, t, p // 2, p % 2]
            tokens.append(where + state["pos_embed"][0, 1 + p] + state["temp_embed"][0, t])
            at.append((t, p))
    x = torch.stack(tokens)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def attention(x: Tensor, name: str, axis: int) -> Tensor:
        seen = torch.tensor([[q == -1 or k == -1 or q == k for k in (a[axis] for a in at)] for q in (a[axis] for a in at)])
        out = []
        for query, key, value in zip(*(part.split(8, 1) for part in linear(x, f"{name}.qkv").chunk(3, 1)), strict=True):
            scores = (query @ key.T / 8**0.5).masked_fill(~seen, -torch.inf)
            out.append(scores.softmax(1) @ value)
        return linear(torch.cat(out, 1), f"{name}.proj")

    for number in range(TINY.depth):
        block = f"blocks.{number}"
        x = x + attention(norm(x, f"{block}.norm3"), f"{block}.timeattn", axis=1)
        x = x + attention(norm(x, f"{block}.norm1"), f"{block}.attn", axis=0)
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    x = norm(x[1:], "norm").view(TINY.steps, TINY.patches, -1)
    layer = nn.TransformerEncoderLayer(16, 2, 40, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True, dtype=torch.float64)
    pooling = {key.removeprefix("spatial_attn_agg."): value for key, value in state.items() if key.startswith("spatial_attn")}
    cls = pooling.pop("cls_token").expand(TINY.steps, -1, -1)
    layer.load_state_dict(pooling)
    return layer(torch.cat([cls, x], dim=1))[:, 0].detach()


@torch.no_grad()
def test_features_are_those_of_the_definition(file):
    video = pictures(segments=3, batch=2)
    features = make(file)(video)
    assert features.shape == (2, 9, 16)
    for clip, got in zip(video, features, strict=True):
        want = torch.cat([slow(weights(), segment) for segment in clip.split(FRAMES)])
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def test_the_contract_follows_from_the_weights(file, tmp_path):
    encoder = make(file)
    assert isinstance(encoder, Encoder)
    assert (encoder.dim, encoder.size, encoder.segment, encoder.fps, encoder.context) == (16, 8, 6, 25.0, 0.0)
    assert (encoder.frame_rate, encoder.resize) == (12.5, round(8 * 256 / 224))
    assert make(file, resize=30).resize == 30
    big = Sizes(width=8, depth=1, hidden=8, pooled_hidden=8, head_width=8)
    published = make(put(tmp_path / "big.pt", weights(big)))
    assert (published.size, published.resize, published.segment, published.frame_rate) == (224, 256, 16, 12.5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@torch.no_grad()
def test_segments_run_in_batches_each_once(file, batch_size):
    encoder, video = make(file, batch_size=batch_size), pictures(segments=5, batch=2)
    sizes = []
    encoder.tower.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    features = encoder(video)
    assert sum(sizes) == 10
    assert max(sizes) == min(batch_size, 10)
    torch.testing.assert_close(features, make(file)(video), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_segment_sees_all_of_itself_and_nothing_else(file):
    encoder, video = make(file), pictures(segments=3)
    before = encoder(video).view(3, 3, 16)
    for frame in range(FRAMES, 2 * FRAMES):
        changed = video.clone()
        changed[:, frame] = 255 - changed[:, frame]
        moved = (encoder(changed).view(3, 3, 16) - before).abs().amax(2)
        assert (moved[1] > 0).all()
        assert (moved[[0, 2]] == 0).all()


def test_half_segments_and_other_pictures_are_refused(file):
    encoder = make(file)
    for frames in (0, 1, FRAMES - 1, FRAMES + 1):
        with pytest.raises(ValueError, match=rf"whole segments of 6 video frames; {frames} were given"):
            encoder(torch.zeros(1, frames, 3, SIDE, SIDE, dtype=torch.uint8))
    with pytest.raises(ValueError, match="3 x 8 x 8; they are 3 x 8 x 9"):
        encoder(torch.zeros(1, FRAMES, 3, SIDE, SIDE + 1, dtype=torch.uint8))


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.05), ("float16", 0.006)])
@torch.no_grad()
def test_half_precision_is_close(file, precision, error):
    video = pictures(segments=4)
    exact, encoder = make(file)(video), make(file, precision=precision)
    half = encoder(video)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).norm() / exact.norm() < error
    kinds = {value.dtype for value in encoder.state_dict().values()}
    assert kinds == {torch.float32, getattr(torch, precision)}


@torch.no_grad()
def test_compiled_is_the_same_at_every_length(file):
    if not has_compiler():
        pytest.skip("no C++ compiler here")
    plain, compiled = make(file), make(file, compile=True, batch_size=4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    given = []
    compiled.tower.register_forward_pre_hook(lambda _, given_: given.append(given_[0].shape))
    for segments in (1, 4, 9):
        video = pictures(segments, batch=2)
        torch.testing.assert_close(compiled(video), plain(video), atol=2e-5, rtol=1e-5)
    assert {shape[0] for shape in given} == {4}  # one length, one compilation


@torch.no_grad()
def test_without_a_compiler_it_runs_as_it_is(file, monkeypatch):
    monkeypatch.setattr("vaura.precision.has_compiler", lambda: False)
    with pytest.warns(UserWarning, match=r"encoder\.compile is true, but there is no C\+\+ compiler here"):
        encoder = make(file, compile=True)
    assert torch.equal(encoder(pictures(3)), make(file)(pictures(3)))


@torch.no_grad()
def test_autocast_around_it_changes_nothing(file):
    encoder, video = make(file), pictures(segments=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = encoder(video)
    assert torch.equal(inside, encoder(video))


def test_it_is_frozen(file):
    encoder = make(file)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.tower.training


@torch.no_grad()
def test_the_tower_is_found_in_every_file_that_holds_it(tmp_path, file):
    """Synchformer's own, before and after data parallel training; V-AURA's; ours."""
    state, video = weights(), pictures(segments=2)
    want = make(file)(video)
    other = {"module.a_encoder.cls_token": torch.ones(3), "module.logit_scale": torch.ones(())}
    published = {"module.v_encoder." + key: value for key, value in state.items()} | other
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    args = OmegaConf.create({"model": {"params": {"sizes": [1, 2.5, None], "name": "x"}}})
    synchformer = {"epoch": 3, "name": "n", "state_dict": published, "optimizer": optimizer.state_dict(), "args": args}
    torch.save(synchformer | {"metrics": {"sync_w_shifts": 0.5}}, tmp_path / "a.pt")
    put(tmp_path / "b.pt", {"v_encoder." + key: value for key, value in state.items()} | {"a_encoder.x": torch.ones(1)})
    vaura_own = {"visual_feature_extractor." + key: value for key, value in state.items()}
    beside = {"sampler.norm.weight": torch.ones(1), "audio_encoder.model.x": torch.ones(1, dtype=torch.float16)}
    put(tmp_path / "c.ckpt", vaura_own | beside, hyper_parameters={"optimizer": optimizer, "config": args})
    make(file).save(tmp_path / "d.safetensors")
    assert load_file(tmp_path / "d.safetensors").keys() == state.keys()
    for name in ("a.pt", "b.pt", "c.ckpt", "d.safetensors"):
        assert torch.equal(make(str(tmp_path / name))(video), want), name


@torch.no_grad()
def test_load_takes_other_weights_of_another_size(tmp_path, file):
    encoder, video = make(file), pictures(segments=1)
    encoder.load(put(tmp_path / "other.pt", weights(seed=1)))
    assert torch.equal(encoder(video), make(str(tmp_path / "other.pt"))(video))
    assert not torch.equal(encoder(video), make(file)(video))


def test_a_full_disk_is_told(tmp_path, file, full_disk):
    with full_disk(), pytest.raises(InputError, match=r"cannot write .*tower\.safetensors: .*make room"):
        make(file).save(tmp_path / "tower.safetensors")
    assert not list(tmp_path.glob("*tower*"))


@torch.no_grad()
def test_what_is_never_used_may_be_absent(tmp_path, file):
    state = {key: value for key, value in weights().items() if not key.startswith("patch_embed.")}
    assert len(state) == len(weights()) - 2
    encoder = make(put(tmp_path / "less.pt", state, "v_encoder."))
    assert torch.equal(encoder(pictures(1)), make(file)(pictures(1)))
    assert encoder.tower.state_dict().keys() == weights().keys()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), r"lacks blocks\.1\.mlp\.fc2\.bias"),
        (lambda s: s.pop("pos_embed"), r"pos_embed is missing"),
        (lambda s: s.update(pos_embed=torch.ones(3)), r"pos_embed has another shape"),
        (lambda s: s.update(pos_embed=torch.ones(1, 4, 16)), r"3 patches, which are no square"),
        (lambda s: s.update(extra=torch.ones(1)), r"holds extra"),
        (lambda s: s.update({"norm.bias": torch.ones(5)}), r"norm\.bias has the shape \(5,\)"),
        (lambda s: s.update({"patch_embed_3d.proj.weight": torch.zeros(16, 3, 2, 4, 4)}), r"was never trained"),
    ],
)
def test_a_file_that_does_not_fit_is_told(tmp_path, change, told):
    state = weights()
    change(state)
    path = put(tmp_path / "odd.pt", state, "v_encoder.")
    with pytest.raises(InputError, match=rf"^encoder\.weights: {re.escape(path)}.*{told}"):
        make(path)


def test_what_cannot_be_read_or_run_is_told(tmp_path, file):
    with pytest.raises(InputError, match=r"nowhere\.pt does not exist"):
        make(str(tmp_path / "nowhere.pt"))
    (tmp_path / "cut.pt").write_bytes(Path(file).read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.pt cannot be read"):
        make(str(tmp_path / "cut.pt"))
    with pytest.raises(InputError, match=r"width 16 is no multiple of encoder\.head_width=64"):
        AVCLIP(file)
    with pytest.raises(InputError, match=r"encoder\.precision is 'half'"):
        make(file, precision="half")
    with pytest.raises(InputError, match=r"encoder\.batch_size is 0"):
        make(file, batch_size=0)
    with pytest.raises(InputError, match=r"encoder\.resize is 7, less than the 8 pixels"):
        make(file, resize=7)


def test_cached_features_depend_on_what_changes_them(tmp_path, file):
    other = put(tmp_path / "other.pt", weights(seed=1))
    encoders = [make(file), make(other), make(file, precision="bfloat16"), make(file, head_width=4), make(file, resize=12)]
    assert len({fingerprint(encoder) for encoder in encoders}) == 5
    assert fingerprint(make(file, batch_size=1)) == fingerprint(make(file, compile=True)) == fingerprint(encoders[0])
    alike = "bfloat16" if multiplies_bfloat16() else "float32"
    assert fingerprint(make(file, precision="auto")) == fingerprint(make(file, precision=alike))


def test_without_weights_the_published_ones_are_fetched(monkeypatch, file):
    asked = []
    monkeypatch.setattr(vaura.encoder.avclip, "fetch", lambda *what: asked.append(what) or Path(file))
    config = OmegaConf.load(Path(__file__).parents[2] / "configs/encoder/avclip.yaml")
    assert config.weights is None
    config.head_width = 8
    assert instantiate(config).dim == 16
    ((url, digest, folder),) = asked
    assert url.endswith("/23-12-22T16-10-50/checkpoints/epoch_best.pt")
    assert digest == "md5:a9979df"
    assert folder.name == "avclip"  # every checkpoint of Synchformer is called epoch_best.pt
