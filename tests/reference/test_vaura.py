"""Numbers recorded from the original V-AURA, where the house's LM can express what it did.

Sizes, case names and settings are read from the files: another folder of the same layout must pass as well.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vaura.conditioner import ChannelConditioner
from vaura.lm.generation import generate, generate_slow
from vaura.lm.llama import TokenLM
from vaura.lm.pattern import delay, delays_of, undelay
from vaura.lm.sampling import Sampler
from vaura.protocols import ABSENT, Condition

ROOT = Path(os.environ.get("VAURA_REFERENCE", Path(__file__).parents[2].parent / "shared" / "reference")) / "vaura"
TOKENS_PER_FEATURE = 7  # the original repeats each visual token so often, whatever the rates
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
            parts[kind][rest] = file.get_tensor(key)
        return Case(json.loads(file.metadata()["config"]), **parts)


def folded(state: dict[str, Tensor], k: int) -> Tensor:
    """The token embedding (V + 1, e): the table through its weight-normalised projection."""
    part = f"sampler.tok_embeddings.{k}."
    table, direction = state[part + "emb.weight"], state[part + "out_proj.weight_v"].squeeze(-1)
    weight = state[part + "out_proj.weight_g"].squeeze(-1) * direction / direction.norm(dim=1, keepdim=True)
    return table @ weight.T + state[part + "out_proj.bias"]


def renamed(key: str) -> str:
    """The house's name of a parameter that is the same in both."""
    for old, new in [
        (r"^sampler\.layers\.", "blocks."),
        (r"attention\.wqkv", "attention.qkv"),
        (r"attention\.wo", "attention.out"),
        (r"feed_forward\.w1", "ffn.gate"),
        (r"feed_forward\.w3", "ffn.up"),
        (r"feed_forward\.w2", "ffn.down"),
        (r"^sampler\.lm_heads", "heads"),
        (r"^sampler\.norm", "norm"),
        (r"^sampler\.empty_video_emb", "after_end"),
        (r"^sampler\.cls_embeddings\.projection", "conditioner"),
    ]:
        key = re.sub(old, new, key)
    return key


def models(case: Case) -> tuple[TokenLM, ChannelConditioner]:
    """TokenLM and conditioner with the weights of the case."""
    state, settings = case.state, case.config["sampler_config"]
    num_codebooks, dim = settings["num_codebooks"], settings["d_model"]
    channels = state["sampler.empty_video_emb"].shape[-1]
    lm = TokenLM(
        num_codebooks,
        state["sampler.lm_heads.0.weight"].shape[0],
        num_layers=settings["num_layers"],
        dim=dim,
        num_heads=settings["nhead"],
        channels=channels,
        norm_eps=settings["layer_norm_eps"],
    )
    width = state["sampler.cls_embeddings.projection.fc1.weight"].shape[1]
    conditioner = ChannelConditioner(width, channels, feature_rate=1.0, frame_rate=TOKENS_PER_FEATURE)
    same = {renamed(key): value for key, value in state.items() if renamed(key) != key}
    ours = {key: value for key, value in same.items() if not key.startswith("conditioner.")}
    ours["after_end"] = ours["after_end"].flatten()
    ours |= {f"embeddings.{k}.weight": folded(state, k) for k in range(num_codebooks)}
    lm.load_state_dict(ours)
    projection = {key.removeprefix("conditioner."): value for key, value in same.items() if key.startswith("conditioner.")}
    assert conditioner.load_state_dict(projection, strict=False).missing_keys == ["null"]
    return lm.eval(), conditioner


def condition_of(conditioner: ChannelConditioner, features: Tensor, repeat: int = TOKENS_PER_FEATURE) -> Condition:
    """Every feature `repeat` times; features (B, M, E) or, as segments, (B, S, M, E)."""
    features = features.flatten(1, -2)
    conditioner.frame_rate = repeat
    return conditioner(features, features.shape[1] * repeat)


def with_nulls(case: Case, conditioner: ChannelConditioner, features: Tensor) -> Condition:
    """The condition and then the original's null, of which it holds one row a feature; rows repeat where there are more."""
    features = features.flatten(1, -2)
    null = case.state["sampler.cls_embeddings.uncond_embedding"]
    rows = null[torch.arange(features.shape[1]) % len(null)].expand(len(features), -1, -1)
    return condition_of(conditioner, torch.cat([features, rows]))


def steps_of(case: Case, sequence: Tensor) -> Tensor:
    """The original's special token is ours for what is not there."""
    return sequence.masked_fill(sequence == case.state["sampler.lm_heads.0.weight"].shape[0], ABSENT)


def numbers_in(names: Iterable[str], form: str) -> list[int]:
    """The numbers of the names that have this form."""
    return [int(found[1]) for name in names if (found := re.fullmatch(form, name))]


def number_in(names: Iterable[str], form: str) -> int:
    (number,) = numbers_in(names, form)
    return number


def test_delay_pattern():
    case = read("delay_pattern")
    special = case.config["special_token"]
    for name in case.config["cases"]:
        kind, num_codebooks, frames = name.split("_")
        delays = delays_of({"delayed": "delay", "parallel": "parallel"}[kind], int(num_codebooks))
        codes = case.input[f"codes_{name}"]
        assert codes.shape[1:] == (int(num_codebooks), int(frames))
        # theirs begins with an empty step
        built = torch.nn.functional.pad(delay(codes, delays, special), (1, 0), value=special)
        assert torch.equal(built, case.output[f"built_{name}"])
        assert built.shape[2] == case.config["cases"][name]["sequence_steps_including_start"]
        assert max(delays) == case.config["cases"][name]["max_delay"]
        known = torch.nn.functional.pad(delay(torch.ones_like(codes), delays, 0), (1, 0))[0]
        assert torch.equal(known, case.output[f"built_mask_{name}"].long())
        assert torch.equal(undelay(case.input[f"seq_{name}"][:, :, 1:], delays), case.output[f"reverted_{name}"])
        if f"train_input_{name}" in case.output:
            hidden = codes.clone()
            hidden[:, :, -1] = special
            read_by_lm = torch.nn.functional.pad(delay(hidden, delays, special), (1, 0), value=special)
            assert torch.equal(read_by_lm, case.output[f"train_input_{name}"])
        if f"logits_{name}" in case.input:
            logits = case.input[f"logits_{name}"].permute(0, 2, 3, 1)[:, :, :-1]  # (B, K, S, V); theirs has one step more
            want = case.output[f"reverted_logits_{name}"].permute(0, 2, 3, 1)
            assert torch.equal(undelay(logits, delays), want)


def test_sampling_filters():
    case = read("sampling_filters")
    logits = case.input["logits"]
    seen = set()
    for name, want in case.output.items():
        form = r"(softmax|topk|topp)([\d.]*)_t([\d.]+)(_sorted)?(_probs)?"
        rule, number, temperature, *_ = re.fullmatch(form, name).groups()
        seen.add(rule)
        how = {"topk": {"top_k": int(float(number or 0))}, "topp": {"top_p": float(number or 0)}, "softmax": {}}[rule]
        got = Sampler(float(temperature), **how).probabilities(logits)
        if rule == "topp":
            got = got.sort(dim=-1, descending=True).values
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert seen == {"softmax", "topk", "topp"}


@torch.no_grad()
def test_sampler_forward():
    case = read("sampler_forward")
    lm, conditioner = models(case)
    close = {"atol": 2e-5, "rtol": 0.0}
    size = number_in(case.output, r"logits_(\d+)")
    few = number_in(case.output, r"logits_short(\d+)")
    fewest, most = sorted({number for number in numbers_in(case.input, r"feats_(\d+)") if number != few})
    longest, short = (case.input[f"seq_{n}"] for n in sorted(numbers_in(case.input, r"seq_(\d+)"), key=lambda n: n != size))

    condition = condition_of(conditioner, case.input[f"feats_{most}"])
    torch.testing.assert_close(lm.step(steps_of(case, longest), condition), case.output[f"logits_{size}"], **close)
    for length in numbers_in(case.output, r"logits_prefix(\d+)"):
        piece = lm.step(steps_of(case, longest[:, :, :length]), condition)
        torch.testing.assert_close(piece, case.output[f"logits_prefix{length}"], **close)
    ends_early = condition_of(conditioner, case.input[f"feats_{few}"])
    torch.testing.assert_close(lm.step(steps_of(case, short), ends_early), case.output[f"logits_short{few}"], **close)
    auto = condition_of(conditioner, case.input[f"feats_{fewest}"], case.config["tokens_per_frame_auto"])
    torch.testing.assert_close(lm.step(steps_of(case, case.input["seq_auto"]), auto), case.output["logits_auto"], **close)

    both = with_nulls(case, conditioner, case.input[f"feats_{most}"])
    given, null = lm.step(steps_of(case, torch.cat([longest, longest])), both)[:, :, -1].chunk(2)
    torch.testing.assert_close(null + 6.0 * (given - null), case.output["logits_cfg6_last"], atol=6 * 2e-5, rtol=0.0)


@pytest.mark.parametrize("loop", [generate, generate_slow])
def test_generate(loop):
    case = read("generate")
    lm, conditioner = models(case)
    for name, settings in case.config["cases"].items():
        frames, guidance = settings["max_new_tokens"], settings["cfg_scale"]
        if loop is generate_slow and frames > 100:
            continue
        prompt = case.input["prompt"] if settings.get("prompt_is_encoded") else None
        features = case.input["features"]
        seen = condition_of(conditioner, features) if guidance == 1 else with_nulls(case, conditioner, features)
        seeds = [0] * len(features)
        codes = loop(lm, seen, frames, seeds=seeds, sampler=GREEDY, guidance=guidance, prompt=prompt)
        if settings.get("remove_prompts"):
            codes = codes[:, :, prompt.shape[2] :]
        assert torch.equal(codes, case.output[f"codes_{name}"]), name


def test_long_generate():
    """The original's loop over chunks, with its 86 frames a second, around the house's LM."""
    case = read("long_generate")
    lm, conditioner = models(case)
    features = case.input["features"]
    for name, settings in case.config["cases"].items():
        guidance, stride = settings["cfg_scale"], int(86 * settings["stride"])
        pieces, prompt = [], None
        for number, chunk in enumerate(settings["chunks"]):
            assert (0 if prompt is None else prompt.shape[2]) == chunk["prompt"]
            first = math.ceil(number * stride / 86 * 25) // 16
            here = features[:, [s % features.shape[1] for s in range(first, first + chunk["segments"])]]
            seen = condition_of(conditioner, here) if guidance == 1 else with_nulls(case, conditioner, here)
            codes = generate(lm, seen, chunk["T"], seeds=[0], sampler=GREEDY, guidance=guidance, prompt=prompt)
            pieces.append(codes[:, :, chunk["prompt"] :])
            prompt = codes[:, :, stride:]
        assert torch.equal(torch.cat(pieces, dim=2), case.output[f"codes_{name}"]), name


def test_train_loss():
    case = read("train_loss")
    lm, conditioner = models(case)
    codes = case.input["codes"]
    given = codes.clone()
    given[:, :, -1] = ABSENT  # the original hides the last frame from its training
    condition = condition_of(conditioner, case.input["features"], case.config["tokens_per_frame"])
    torch.testing.assert_close(lm(given, condition), case.output["logits"], atol=2e-5, rtol=0.0)
    losses = lm.loss(codes, condition, given)
    torch.testing.assert_close(losses, case.output["loss_per_codebook"], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(losses.mean(), case.output["loss"], atol=1e-5, rtol=0.0)

    losses.mean().backward()
    ours = dict(lm.named_parameters()) | {f"conditioner.{key}": value for key, value in conditioner.named_parameters()}
    got = {key: ours[renamed(key)].grad for key in case.state if renamed(key) in ours}
    leaves = {key: value.clone().requires_grad_() for key, value in case.state.items() if ".tok_embeddings." in key}
    tables = [folded(leaves, k) for k in range(lm.num_codebooks)]
    torch.autograd.backward(tables, [embedding.weight.grad for embedding in lm.embeddings])
    got |= {key: leaf.grad for key, leaf in leaves.items()}
    wanted = {key.removeprefix("grad."): value for key, value in case.output.items() if key.startswith("grad.")}
    assert set(got) == set(wanted)
    for key, want in wanted.items():
        difference = (got[key].view_as(want) - want).abs().max()
        assert difference <= 1e-4 * want.abs().max(), key
