"""Numbers recorded from the original SpecVQGAN: the transformer, its sampling and its training.

Sizes, case names and settings are read from the files: another folder of the same layout must pass as well.
"""

import json
import os
import pickle
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vaura.conditioner import PrefixConditioner
from vaura.lm.attention import KVCache
from vaura.lm.generation import generate, generate_slow, generate_windows
from vaura.lm.llama import TokenLM
from vaura.lm.pattern import delay, delays_of, undelay
from vaura.lm.sampling import Sampler
from vaura.protocols import ABSENT, Condition
from vaura.published.specvqgan import rename
from vaura.timing import centred_windows

ROOT = Path(os.environ.get("VAURA_REFERENCE", Path(__file__).parents[2].parent / "shared" / "reference")) / "specvqgan"
GREEDY = Sampler(temperature=0.0)


class Case(NamedTuple):
    config: dict
    state: dict[str, Tensor]
    input: dict[str, Tensor]
    output: dict[str, Tensor]


def read(name: str) -> Case:
    path = ROOT / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference case {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition(".")
            parts.setdefault(kind, {})[rest] = file.get_tensor(key)
        config = json.loads((file.metadata() or {}).get("config", "{}"))
    case = Case(config, parts.pop("state"), parts.pop("input"), parts.pop("output"))
    case.config["states"] = {kind.removeprefix("state_"): state for kind, state in parts.items()}
    return case


class GPT(NamedTuple):
    lm: TokenLM
    conditioner: PrefixConditioner

    def condition(self, feats: Tensor | None, label: Tensor | None = None) -> Condition:
        features = torch.zeros(len(label), 0, 0) if feats is None else feats.transpose(1, 2)  # recorded as (B, E, F)
        return self.conditioner(features, 1, label=label)


def gpt_of(gpt_config: dict, tensors: dict[str, Tensor], rows: int, embed: str = "linear") -> GPT:
    """The model of tensors by their published names, read by what reads published ones."""
    state, _, dropped = rename(tensors)
    assert all(reason != "unknown to the house" for reason in dropped.values())
    dim, block = gpt_config["n_embd"], gpt_config["block_size"]
    lm = TokenLM(
        rows,
        gpt_config["vocab_size"],
        gpt_config["n_layer"],
        dim,
        gpt_config["n_head"],
        pattern="flatten",
        style="gpt",
        max_positions=block,
        shared_codebook=True,
    ).eval()
    weight = state.get("conditioner.embed.weight", state.get("conditioner.embed.weight_ih_l0"))
    classes = state.get("conditioner.class_embed.weight")
    conditioner = PrefixConditioner(
        dim=0 if weight is None else weight.shape[1],
        width=dim,
        feature_rate=21.5,
        frame_rate=22050 / 4096,
        features=0 if weight is None else 1,
        classes=0 if classes is None else len(classes),
        embed=embed,
        learn_null=False,
    )
    for part, module in (("lm.", lm), ("conditioner.", conditioner)):
        module.load_state_dict({key.removeprefix(part): value.float() for key, value in state.items() if key.startswith(part)})
    return GPT(lm, conditioner)


def gpt_see(gpt: GPT, features: int) -> GPT:
    gpt.conditioner.features = features
    return gpt


def gpt_logits(gpt: GPT, codes: Tensor, condition: Condition) -> Tensor:
    """The original's: of every position of condition and codes, (B, P + n, V); here those from the condition's last on."""
    steps = torch.full((len(codes), gpt.lm.num_codebooks, codes.shape[1] + 1), ABSENT)
    for number in range(codes.shape[1]):
        steps[:, number % gpt.lm.num_codebooks, number + 1] = codes[:, number]
    return gpt.lm.step(steps, condition)[:, 0]


@pytest.mark.parametrize("kind", ["feats", "feats_linear", "feats_gru", "class", "feats_class"])
@torch.no_grad()
def test_gpt_variants(kind):
    case = read("gpt_variants")
    codes, feats = case.input["idx"], case.input["feats"]
    label = case.input["class"][:, 0] if "class" in kind else None
    gpt = gpt_of(case.config["GPT_config"], case.config["states"][kind], 1, "gru" if "gru" in kind else "linear")
    seen = None if kind == "class" else feats
    condition = gpt_see(gpt, 0 if seen is None else feats.shape[2]).condition(seen, label)
    logits = gpt_logits(gpt, codes, condition)
    want = case.output[f"{kind}_logits"]
    assert torch.allclose(logits, want[:, want.shape[1] - logits.shape[1] :], atol=1e-4)
    if f"{kind}_last_layer_att" in case.output:
        flat = torch.cat([codes.unsqueeze(1), codes[:, None, -1:]], 2)  # the last code is predicted and not read
        seen_by = gpt.lm.attention(flat, condition)
        assert torch.allclose(seen_by, case.output[f"{kind}_last_layer_att"], atol=1e-5)


def recipe_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights by the recipe of the reference's README."""
    state = {}
    for key, shape in shapes.items():
        x = torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        state[key] = 1 + x if len(shape) == 1 and key.endswith(".weight") else x
    return state


def full_shapes() -> tuple[dict, dict[str, tuple[int, ...]]]:
    path = ROOT / "keys" / "transformer_vas_212feats.json"
    if not path.is_file():
        pytest.skip(f"the list of keys {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    shapes = {one["key"]: tuple(one["shape"]) for one in json.loads(path.read_text())["tensors"]}
    own = {key.removeprefix("transformer."): shape for key, shape in shapes.items() if key.startswith("transformer.")}
    return shapes, {key: shape for key, shape in own.items() if not key.endswith("attn.mask")}


def settings_of(shapes: dict[str, tuple[int, ...]]) -> dict:
    layers = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
    vocabulary, dim = shapes["tok_emb.weight"]
    return {"n_layer": layers, "n_embd": dim, "n_head": 16, "vocab_size": vocabulary, "block_size": shapes["pos_emb"][1]}


@pytest.mark.slow
@torch.no_grad()
def test_gpt_full_recipe():
    case = read("gpt_full_recipe")
    _, shapes = full_shapes()
    media = ROOT.parent.parent / "media" / "specvqgan"
    arrays = []
    for kind in ("rgb", "flow"):
        path = media / (case.config["clip"] % kind)
        if not path.is_file():
            pytest.skip(f"the features {path} are not here")
        arrays.append(pickle.loads(path.read_bytes()))  # the reference's own, recorded beside it
    shared = min(map(len, arrays))
    features = np.zeros((215, 2048))
    both = np.concatenate([array[:shared] for array in arrays], axis=1)
    features[:shared] = both[:215]
    features = torch.from_numpy(features[1:213]).float()[None]
    count = case.config["feat_sample_size"]
    assert torch.allclose(
        features[:, ::53].transpose(1, 2)[..., : case.input["feats"].shape[2]], case.input["feats"], atol=1e-5
    )
    rows = int(case.output["z_permuted"].shape[1] / case.input["codes_rowmajor"].shape[1] * 5)
    gpt = gpt_see(gpt_of(settings_of(shapes), recipe_of(shapes), rows), count)
    codes = case.input["codes_rowmajor"].unflatten(1, (rows, -1))
    flat = case.output["z_permuted"]
    assert torch.equal(codes.transpose(1, 2).flatten(1), flat)
    condition = gpt.condition(features.transpose(1, 2))
    logits = gpt.lm(codes, condition)  # (B, K, T, V)
    assert torch.allclose(logits.transpose(1, 2).flatten(1, 2), case.output["logits"], atol=1e-3)
    assert float(gpt.lm.loss(codes, condition).mean()) == pytest.approx(float(case.output["loss"]), rel=1e-4)
    seen = gpt.lm.attention(codes, condition)
    assert torch.allclose(seen[0, 0, -1], case.output["last_att_head0_lastrow"][0], atol=1e-4) or torch.allclose(
        seen[0, :, -1], case.output["last_att_head0_lastrow"], atol=1e-4
    )


def tiny() -> tuple[Case, GPT, Condition, Tensor]:
    """The recorded stage two with its condition and the codes (B, K, T) of its spectrograms."""
    case = read("net2net_tiny")
    params = case.config["cfg"]["params"]
    rows = params["first_stage_permuter_config"]["params"]["H"]
    tensors = {key: value.float() for key, value in case.state.items() if key.startswith("transformer.")}
    gpt = gpt_of(params["transformer_config"]["params"]["GPT_config"], tensors, rows)
    feature = case.input["feature"]  # (B, F, E)
    gpt = gpt_see(gpt, feature.shape[1])
    return case, gpt, gpt.conditioner(feature, 1), case.output["z_indices_permuted"].unflatten(1, (-1, rows)).transpose(1, 2)


def flat(codes: Tensor) -> Tensor:
    """Codes (B, K, T) in the original's order, (B, T K)."""
    return codes.transpose(1, 2).flatten(1)


def first(condition: Condition, rows: int) -> Condition:
    return Condition(prefix=condition.prefix[:rows])


@torch.no_grad()
def test_net2net_logits_and_loss():
    case, gpt, condition, codes = tiny()
    assert torch.equal(case.output["target"], case.output["z_indices_permuted"])
    logits = gpt.lm(codes, condition).transpose(1, 2).flatten(1, 2)
    assert torch.allclose(logits, case.output["logits"], atol=1e-4)
    assert float(gpt.lm.loss(codes, condition).mean()) == pytest.approx(float(case.output["loss"]), abs=1e-4)


def part(codes: Tensor, known: int) -> Tensor:
    """The first `known` of the codes in the original's order; of a column that is begun the rest is ABSENT."""
    begun = -(-known // codes.shape[1])
    order = torch.arange(begun * codes.shape[1]).view(begun, codes.shape[1]).T
    return codes[:, :, :begun].masked_fill(order >= known, ABSENT)


@pytest.mark.parametrize("loop", [generate, generate_slow])
@torch.no_grad()
def test_net2net_greedy(loop):
    case, gpt, condition, codes = tiny()
    frames, rows = codes.shape[2], codes.shape[1]
    drawn = loop(gpt.lm, condition, frames, seeds=[0] * len(codes), sampler=GREEDY)
    assert torch.equal(flat(drawn), case.output["greedy_indices"])
    half = (frames * rows) // 2
    drawn = loop(gpt.lm, condition, frames, seeds=[0] * len(codes), sampler=GREEDY, prompt=part(codes, half))
    assert torch.equal(flat(drawn), case.output["greedy_half_indices"])


@torch.no_grad()
def test_net2net_seeded():
    case, gpt, condition, codes = tiny()
    want = case.output["seeded_topk5_T0.9_60steps_indices"]
    sampler, cache = Sampler(temperature=0.9, top_k=5), gpt.lm.new_cache(len(want), 400)
    torch.manual_seed(7)
    steps = torch.full((len(want), gpt.lm.num_codebooks, want.shape[1] + 1), ABSENT)
    for number in range(want.shape[1]):
        logits = gpt.lm.step(steps[:, :, number : number + 1], condition, cache, number)[:, 0, -1]
        drawn = torch.multinomial(sampler.probabilities(logits), num_samples=1)[:, 0]
        steps[:, number % gpt.lm.num_codebooks, number + 1] = drawn
    assert isinstance(cache, KVCache)
    drawn = flat(undelay(steps[:, :, 1:], gpt.lm.delays, gpt.lm.stride))
    assert torch.equal(drawn, want)


@torch.no_grad()
def test_net2net_eval_sampler():
    case, gpt, condition, codes = tiny()
    frames, rows, one = codes.shape[2], codes.shape[1], first(condition, 1)
    for name, known in (("nopix", 0), ("half", frames // 2 * rows)):
        prompt = part(codes[:1], known) if known else None
        drawn = generate(gpt.lm, one, frames, seeds=[0], sampler=GREEDY, prompt=prompt)
        assert torch.equal(flat(drawn), case.output[f"evalsampler_{name}_greedy"])


@torch.no_grad()
def test_net2net_sliding():
    case, gpt, condition, codes = tiny()
    frames, rows, one = codes.shape[2], codes.shape[1], first(condition, 1)
    for name, known in (("full", 0), ("half", frames // 2)):
        want = case.output[f"sliding_scale2_{name}_greedy"]
        spans = centred_windows(want.shape[1] // rows, frames)
        prompt = codes[:1, :, :known] if known else None
        drawn = generate_windows(gpt.lm, lambda span: one, spans, seeds=[0], sampler=GREEDY, prompt=prompt)
        assert torch.equal(flat(drawn), want)


def test_net2net_train3():
    case = read("net2net_train3")
    _, gpt, _, codes = tiny()
    feature = read("net2net_tiny").input["feature"]
    gpt.lm.train()
    named = [(name, p) for part in gpt for name, p in part.named_parameters()]
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name and name != "positions"]
    others = [p for name, p in named if all(p is not one for one in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=case.config["lr"],
        betas=tuple(case.config["betas"]),
    )
    losses = []
    for step in range(len(case.output["losses"])):
        optimizer.zero_grad()
        loss = gpt.lm.loss(codes, gpt.conditioner(feature, 1)).mean()
        loss.backward()
        if step == 0:
            norms = gradients(gpt)
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(case.output["losses"].tolist(), rel=1e-4)
    for key, want in case.output.items():
        if key.startswith("grad_norm."):
            name = key.removeprefix("grad_norm.")
            assert float(norms[name].norm()) == pytest.approx(float(want), rel=1e-3, abs=1e-6), name
    after = published_names(gpt, lambda p: p.detach())
    for key, want in case.output.items():
        if key.startswith("param_abssum_after3."):
            name = key.removeprefix("param_abssum_after3.")
            assert float(after[name].abs().sum()) == pytest.approx(float(want), rel=1e-4), name
    assert torch.allclose(after["head.weight"], case.output["head_weight_after3"], rtol=1e-3, atol=1e-5)


def gradients(gpt: GPT) -> dict[str, Tensor]:
    return published_names(gpt, lambda p: p.grad.clone())


def published_names(gpt: GPT, of) -> dict[str, Tensor]:
    """What hangs on the parameters by their published names."""
    found = {}
    ours = {"attention_norm": "ln1", "ffn_norm": "ln2", "attention.out": "attn.proj", "ffn.up": "mlp.0", "ffn.down": "mlp.2"}
    plain = {"embeddings.0.weight": "tok_emb.weight", "positions": "pos_emb", "heads.0.weight": "head.weight"}
    plain |= {"norm.weight": "ln_f.weight", "norm.bias": "ln_f.bias"}
    for name, p in gpt.lm.named_parameters():
        value = of(p)
        if name in plain:
            found[plain[name]] = value
        elif ".attention.qkv." in name:
            for kind, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace(".attention.qkv.", f".attn.{kind}.")] = third
        else:
            for old, new in ours.items():
                name = name.replace(f".{old}.", f".{new}.")
            found[name] = value
    for name, p in gpt.conditioner.named_parameters():
        found[name.replace("embed.", "embedder.")] = of(p)
    return found


def test_permuters():
    case = read("permuters")
    names = [name for name in case.output if name.startswith("cm_") and name.endswith("fwd_idx")]
    assert names
    for name in names:
        rows, columns = (int(number) for number in name.removeprefix("cm_").removesuffix("_fwd_idx").split("x"))
        place = torch.arange(rows * columns).view(1, rows, columns)
        delays = delays_of("flatten", rows)
        for suffix, scale in (("", 1), ("_scale2", 2)):
            grid = case.input.get(f"cm_{rows}x{columns}{suffix}")
            if grid is None:
                continue
            codes = grid.unflatten(1, (rows, columns * scale))
            steps = delay(codes, delays, ABSENT, rows)
            assert torch.equal(steps.amax(1), case.output[f"cm_{rows}x{columns}{suffix}"])
            assert torch.equal(undelay(steps, delays, rows), codes)
        assert torch.equal(delay(place, delays, ABSENT, rows).amax(1)[0], case.output[name])


@pytest.mark.parametrize(
    "name",
    [
        "transformer_vas_1feat_or_nofeats",
        "transformer_vas_5feats",
        "transformer_vas_212feats",
        "transformer_vas_class",
        "transformer_vas_class_vggsound_codebook",
        "transformer_vggsound_1feat_or_nofeats",
        "transformer_vggsound_5feats",
        "transformer_vggsound_212feats",
        "transformer_vggsound_class",
    ],
)
def test_every_published_transformer_has_a_place(name):
    path = ROOT / "keys" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the list of keys {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    tensors = {one["key"]: torch.empty(one["shape"], device="meta") for one in json.loads(path.read_text())["tensors"]}
    state, used, dropped = rename(tensors)
    assert set(used) | set(dropped) == set(tensors)
    assert "unknown to the house" not in dropped.values()
    shapes = {key.removeprefix("transformer."): tuple(value.shape) for key, value in tensors.items()}
    settings = settings_of({key: shape for key, shape in shapes.items() if not key.startswith("first_stage")})
    with torch.device("meta"):
        lm = TokenLM(
            5,
            settings["vocab_size"],
            settings["n_layer"],
            settings["n_embd"],
            settings["n_head"],
            pattern="flatten",
            style="gpt",
            max_positions=settings["block_size"],
            shared_codebook=True,
        )
    ours = {f"lm.{key}": tuple(value.shape) for key, value in lm.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state.items() if key.startswith("lm.")}
    assert ours == theirs
    assert any(key.startswith("conditioner.") for key in state)
