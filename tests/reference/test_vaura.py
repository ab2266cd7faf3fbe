"""Numbers recorded from the original V-AURA.

Sizes, case names and settings are read from the files: another folder of the same layout must pass as well.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from recorded import Case, Recordings, drawn, parts_of, shapes_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vaura.checkpoint import load_exactly
from vaura.components import instantiate
from vaura.conditioner import ChannelConditioner
from vaura.encoder.avclip import AVCLIP, Sizes, Tower, centred
from vaura.lm.attention import rotary_table
from vaura.lm.generation import generate, generate_slow
from vaura.lm.llama import TokenLM
from vaura.lm.pattern import delay, delays_of, undelay
from vaura.lm.sampling import Guidance, Sampler
from vaura.media.loudness import normalise
from vaura.media.video import crop, evenly_spaced, resized, segment_starts
from vaura.protocols import ABSENT, Condition
from vaura.published.vaura import Reading, read_published, rename
from vaura.task.optimizer import Constant, Cosine, InverseSquareRoot, Optimizer
from vaura.task.token_prediction import TokenPrediction
from vaura.timing import cover, published_windows
from vaura.tokenizer.dac import DAC, PUBLISHED
from vaura.tokenizer.dac_network import Codec

recordings = Recordings("vaura")
read = recordings.read
GREEDY = Sampler(temperature=0.0)


def read_as_users_do(case: Case, folder: Path) -> Reading:
    """The case's tensors as an experiment of V-AURA's own, read by what reads published ones."""
    settings = {
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "betas": [0.9, 0.95],
        "sampler_config": {"params": case.config["sampler_config"]},
        "audio_encoder_config": {"target": "models.modules.dac.model.DacModelWrapper", "params": {"model_sr": 44100}},
        "pattern_provider_config": {"target": "models.modules.misc.codebook_patterns.DelayedPatternProvider"},
    }
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "log").mkdir(exist_ok=True)
    (folder / "log/hparams.yaml").write_text(yaml.safe_dump(settings))
    torch.save({"state_dict": case.state}, folder / "checkpoints/last.ckpt")
    return read_published(folder)


def built(reading: Reading, repeat: int | None = None) -> tuple[TokenLM, ChannelConditioner]:
    """TokenLM and conditioner of a published experiment, with its weights, in evaluation mode."""
    lm_state, conditioner_state = parts_of(reading.state, "lm."), parts_of(reading.state, "conditioner.")
    num_codebooks = sum(bool(re.fullmatch(r"heads\.\d+\.weight", key)) for key in lm_state)
    lm = instantiate(reading.config.lm)(num_codebooks=num_codebooks, codebook_size=len(lm_state["heads.0.weight"]))
    if repeat is not None:
        reading.config.conditioner.repeat = repeat
    width = conditioner_state["fc1.weight"].shape[1]
    rates = {"feature_rate": 12.5, "frame_rate": 44100 / 512}
    conditioner = instantiate(reading.config.conditioner)(dim=width, channels=lm.channels, **rates)
    load_exactly(lm, lm_state, "the case")
    load_exactly(conditioner, conditioner_state, "the case")
    return lm.eval(), conditioner.eval()


def condition_of(conditioner: ChannelConditioner, features: Tensor, drop: Tensor | None = None) -> Condition:
    """All of the features (B, M, E) or, as segments, (B, S, M, E), each as often as the conditioner repeats it."""
    features = features.flatten(1, -2)
    return conditioner(features, features.shape[1] * conditioner.repeat, drop)


def with_nulls(conditioner: ChannelConditioner, features: Tensor) -> Condition:
    drop = torch.arange(2 * len(features)) >= len(features)
    return condition_of(conditioner, torch.cat([features, features]), drop)


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
def test_sampler_forward(tmp_path):
    case = read("sampler_forward")
    reading = read_as_users_do(case, tmp_path)
    assert not reading.dropped
    lm, conditioner = built(reading)
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
    conditioner.repeat = case.config["tokens_per_frame_auto"]
    auto = condition_of(conditioner, case.input[f"feats_{fewest}"])
    torch.testing.assert_close(lm.step(steps_of(case, case.input["seq_auto"]), auto), case.output["logits_auto"], **close)

    conditioner.repeat = built(reading)[1].repeat
    both = with_nulls(conditioner, case.input[f"feats_{most}"])
    given, null = lm.step(steps_of(case, torch.cat([longest, longest])), both)[:, :, -1].chunk(2)
    torch.testing.assert_close(null + 6.0 * (given - null), case.output["logits_cfg6_last"], atol=6 * 2e-5, rtol=0.0)


@torch.no_grad()
def test_sampler_parts(tmp_path):
    """Inside the forward pass: rotations, embeddings of tokens and of the picture, the null, and a guided step."""
    case = read("sampler_forward")
    lm, conditioner = built(read_as_users_do(case, tmp_path))
    close = {"atol": 2e-5, "rtol": 0.0}
    table = case.output["rope_cache_first8"]
    ours = rotary_table(torch.arange(len(table)), lm.dim // lm.num_heads, lm.rope_base)
    torch.testing.assert_close(ours, table, **close)

    size = number_in(case.output, r"logits_(\d+)")
    most = max(numbers_in(case.input, r"feats_(\d+)"))
    sequence, features = case.input[f"seq_{size}"], case.input[f"feats_{most}"]
    few = number_in(case.output, r"token_embed_sum_(\d+)")
    embedded = sum(embed(sequence[:, k, :few]) for k, embed in enumerate(lm.embeddings))
    torch.testing.assert_close(embedded, case.output[f"token_embed_sum_{few}"], **close)

    channel = condition_of(conditioner, features).channel
    missing = size - channel.shape[1]
    seen = torch.cat([channel, lm.after_end.expand(len(channel), missing, -1)], dim=1) if missing > 0 else channel[:, :size]
    torch.testing.assert_close(seen, case.output[f"video_embed_repeated_{size}"], **close)

    drop = case.input["drop_ids"].bool()
    dropped = condition_of(conditioner, features, drop).channel
    torch.testing.assert_close(dropped, condition_of(conditioner, case.output["token_drop"]).channel, **close)

    steps = steps_of(case, torch.cat([sequence, sequence]))
    logits = Guidance(6.0)(lm.step(steps, with_nulls(conditioner, features))[:, :, -1], 0.0)
    torch.testing.assert_close(logits, case.output["cfg6_logits_model_path"], atol=6 * 2e-5, rtol=0.0)
    assert torch.equal(GREEDY(logits, torch.zeros(logits.shape[:-1])), case.output["cfg6_next_token"].squeeze(-1))


@pytest.mark.parametrize("loop", [generate, generate_slow])
def test_generate(loop, tmp_path):
    case = read("generate")
    lm, conditioner = built(read_as_users_do(case, tmp_path))
    for name, settings in case.config["cases"].items():
        frames, guidance = settings["max_new_tokens"], settings["cfg_scale"]
        if loop is generate_slow and frames > 100:
            continue
        prompt = case.input["prompt"] if settings.get("prompt_is_encoded") else None
        features = case.input["features"]
        seen = condition_of(conditioner, features) if guidance == 1 else with_nulls(conditioner, features)
        seeds = [0] * len(features)
        codes = loop(lm, seen, frames, seeds=seeds, sampler=GREEDY, guidance=guidance, prompt=prompt)
        if settings.get("remove_prompts"):
            codes = codes[:, :, prompt.shape[2] :]
        assert torch.equal(codes, case.output[f"codes_{name}"]), name


def task_of(reading: Reading, tokenizer: nn.Module, **settings) -> TokenPrediction:
    """The task of a published experiment around a tokenizer, and an encoder of which only the rates are asked."""
    lm, conditioner = built(reading)
    encoder = SimpleNamespace(dim=conditioner.fc1.in_features, frame_rate=12.5, fps=25.0, segment=16, size=224, resize=256)
    task = TokenPrediction(
        tokenizer, encoder, lambda **_: conditioner, lambda **_: lm, settings.pop("optimizer", None), **settings
    )
    return task.eval()


def test_long_generate(tmp_path):
    """The published loop, by its name."""
    case = read("long_generate")
    reading = read_as_users_do(case, tmp_path)
    codebooks = SimpleNamespace(num_codebooks=case.config["sampler_config"]["num_codebooks"], codebook_size=0)
    task = task_of(reading, SimpleNamespace(**vars(codebooks), frame_rate=44100 / 512, sample_rate=44100))
    features = case.input["features"].flatten(1, 2)
    for name, settings in case.config["cases"].items():
        spans = [
            (span.stop - span.start, span.prompt, len(s))
            for span, s in published_windows(settings["duration"], settings["stride"])
        ]
        assert spans == [(chunk["T"], chunk["prompt"], chunk["segments"]) for chunk in settings["chunks"]]
        codes = task.sample(
            features,
            settings["duration"],
            seeds=[0],
            sampler=GREEDY,
            guidance=settings["cfg_scale"],
            window=2.56,
            stride=settings["stride"],
            loop="published",
        )
        assert codes.shape[2] == settings["total_tokens"]
        assert torch.equal(codes, case.output[f"codes_{name}"]), name


def as_theirs(ours: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Tensors by the house's names -> by those of the case, in its shapes."""
    _, used, _ = rename(case.state)
    return {key: ours[name].view_as(case.state[key]) for key, name in used.items() if name in ours}


def test_train_loss(tmp_path):
    case = read("train_loss")
    lm, conditioner = built(read_as_users_do(case, tmp_path), case.config["tokens_per_frame"])
    codes = case.input["codes"]
    given = codes.clone()
    given[:, :, -1] = ABSENT  # the original hides the last frame from its training
    condition = condition_of(conditioner, case.input["features"])
    torch.testing.assert_close(lm(given, condition), case.output["logits"], atol=2e-5, rtol=0.0)
    losses = lm.loss(codes, condition, given)
    torch.testing.assert_close(losses, case.output["loss_per_codebook"], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(losses.mean(), case.output["loss"], atol=1e-5, rtol=0.0)

    losses.mean().backward()
    parameters = {f"lm.{key}": p for key, p in lm.named_parameters()}
    parameters |= {f"conditioner.{key}": p for key, p in conditioner.named_parameters()}
    got = as_theirs({key: p.grad for key, p in parameters.items()}, case)
    wanted = parts_of(case.output, "grad.")
    assert set(got) == set(wanted)
    for key, want in wanted.items():
        assert (got[key] - want).abs().max() <= 1e-4 * want.abs().max(), key


@pytest.mark.filterwarnings("ignore")
def test_train_steps(tmp_path):
    """The house's task, optimizer and Lightning's clipping by value, step by step."""
    case = read("train_steps")
    how = case.config["hparams"]
    schedule = how["lr_scheduler"]
    cosine = Cosine(schedule["warmup_steps"], schedule["total_steps"], schedule["lr_min_ratio"])
    optimizer = Optimizer(how["learning_rate"], how["weight_decay"], tuple(how["betas"]), cosine)
    reading = read_as_users_do(case, tmp_path)
    reading.config.lm.dropout = 0.0
    # the original takes the ratio of the first clip it sees, rounded up
    reading.config.conditioner.repeat = -(-case.input["codes"].shape[-1] // case.input["features"][0, 0].flatten(0, 1).shape[0])
    sizes = {"num_codebooks": case.config["sampler_config"]["num_codebooks"], "codebook_size": 0, "frame_rate": 44100 / 512}
    task = task_of(reading, SimpleNamespace(**sizes), optimizer=optimizer, drop_condition=0.0, hide_last=True)
    batches = [
        {"id": ["a"] * len(codes), "codes": codes, "features": features.flatten(1, 2)}
        for codes, features in zip(case.input["codes"], case.input["features"], strict=True)
    ]
    losses, rates = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            losses.append(outputs["loss"])

        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = Trainer(
        max_steps=len(batches),
        accelerator="cpu",
        gradient_clip_val=how["gradient_clip_val"],
        gradient_clip_algorithm=how["gradient_clip_algorithm"],
        callbacks=[Watch()],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(task.train(), DataLoader(batches, batch_size=None))
    torch.testing.assert_close(torch.stack(losses), case.output["losses"], atol=1e-4, rtol=0.0)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), case.output["lrs"], rtol=1e-9, atol=0.0)
    got = as_theirs(task.state_dict(), case)
    wanted = parts_of(case.output, "final.")
    assert wanted
    for key, want in wanted.items():
        torch.testing.assert_close(got[key], want, atol=1e-4, rtol=0.0, msg=key)
    null = "sampler.cls_embeddings.uncond_embedding"
    assert torch.equal(got[null], case.output[f"final_{null.split('.')[-1]}"])

    names = {id(p): name for name, p in task.named_parameters()}
    _, used, _ = rename(case.state)
    for group, told in zip(trainer.optimizers[0].param_groups, ("decay_group", "nodecay_group"), strict=True):
        mine = {names[id(p)] for p in group["params"]}
        assert mine == {used[key] for key in case.config[told]}


@torch.no_grad()
def test_tiny_lightning():
    """A checkpoint that the original training wrote, with its pickled settings and optimizer."""
    case = read("tiny_lightning/expected")
    reading = read_published(recordings.root / "tiny_lightning")
    assert reading.checkpoint.name == case.config["checkpoint"]
    expected, _, dropped = rename(parts_of(case.output, "state."))
    assert not dropped
    assert set(reading.state) == set(expected)
    assert all(torch.equal(reading.state[key], value) for key, value in expected.items())
    tokenizer = instantiate(reading.config.tokenizer)
    task = task_of(reading, tokenizer)
    features = case.input["features"].flatten(1, 2)
    for name, want in case.output.items():
        form = re.fullmatch(r"codes_(?:nocfg|cfg(\d+))_T(\d+)", name)
        if not form:
            continue
        guidance, frames = float(form[1] or 1), int(form[2])
        condition = task.condition(features, None, Guidance(guidance))
        how = {"seeds": [0], "sampler": GREEDY, "guidance": guidance}
        sure = margin(task.lm, want, condition, guidance)
        assert (sure > -0.3).all()  # what float32 prefers elsewhere, it prefers by what rounding to bfloat16 can turn
        if torch.equal(generate(task.lm, condition, frames, **how), want):
            assert (sure > 0).all()
        elif medium_precision_is_lower():
            with medium_precision():
                assert torch.equal(generate_slow(task.lm, condition, frames, **how), want), name
        if (sound := case.output.get(name.replace("codes", "audio_fp16codec"))) is not None:
            torch.testing.assert_close(tokenizer.decode(want), sound, atol=5e-3, rtol=0.0)


def margin(lm: TokenLM, codes: Tensor, condition: Condition, guidance: float) -> Tensor:
    """By how much the logit of each code, given those before it, exceeds that of any other code."""
    if guidance == 1.0:
        logits = lm(codes, condition)
    else:
        given, null = (lm(codes, Condition(part)) for part in condition.channel.chunk(2))
        logits = null + guidance * (given - null)
    chosen = logits.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.scatter(-1, codes.unsqueeze(-1), -math.inf).amax(-1)


@contextmanager
def medium_precision() -> Iterator[None]:
    """Matrix products as the original's program sets them for all of itself: of bfloat16 where the machine has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def medium_precision_is_lower() -> bool:
    a, b = torch.randn(200, 32), torch.randn(32, 96)
    with medium_precision():
        return bool(((a @ b) - (a.double() @ b.double())).abs().max() > 1e-3)


def test_lr_schedules():
    """The rates in force, through the optimizer that trains and torch's own stepping of its scheduler."""
    case = read("lr_schedules")
    kinds = {"InverseSquareRoot": InverseSquareRoot, "WarmUpToStatic": Constant, "Cosine": Cosine}
    words = {"warmup_steps": "warmup", "warmup_init_lr": "first", "total_steps": "total", "lr_min_ratio": "final"}
    words["cycle_length"] = "cycle"
    seen = set()
    for name, want in case.output.items():
        settings = case.config[name]
        kind = kinds[settings["class"].removesuffix("LRScheduler")]
        given = {words[word]: value for word, value in settings["kwargs"].items() if value is not None}
        if kind is Cosine:
            given.pop("first", None)  # which the original takes and does not heed
        made = Optimizer(settings["base_lr"], schedule=kind(**given))(torch.nn.Linear(2, 2), math.inf)
        for step, rate in enumerate(want.tolist()):
            assert [group["lr"] for group in made["optimizer"].param_groups] == pytest.approx([rate, rate], rel=1e-9), step
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        seen.add(kind)
    assert seen == set(kinds.values())


def test_audio_normalize():
    case = read("audio_normalize")
    sample_rate, headroom = re.search(r"strategy, (\d+), db=(\d+)\)", case.config["note"]).groups()
    for name, want in case.output.items():
        strategy, kind = re.fullmatch(r"scale_audio_([a-z]+)_?([a-z]*)", name).groups()
        given = {"headroom": float(headroom)} if strategy in ("clip", "peak") else {}
        got = normalise(case.input[kind or "wav"], strategy, int(sample_rate), **given)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0.0)
    assert {name.split("_")[2] for name in case.output} == {"clip", "peak", "rms", "loudness"}


def avclip_weight(key: str, shape: torch.Size, seed: str) -> Tensor:
    """The value of a tensor of AV-CLIP's by the recipe of its case."""
    value = drawn(seed, shape, 0.05 if key.endswith(("qkv.weight", "in_proj_weight")) else 0.02)
    return 1 + value if re.search(r"(^|\.)norm\d?\.weight$", key) else value


def avclip_weights(config: dict) -> dict[str, Tensor]:
    """The weights of the AV-CLIP case. Its checksums tell where the salt stands in the seeds of a salted set."""
    with torch.device("meta"):
        shapes = shapes_of(Tower(Sizes()))
    checks = config["weight_checks[sum,abs_sum,first]"]
    for form in ("{salt}{key}", "{key}{salt}"):
        seeds = {key: form.format(salt=config["salt"], key=key) for key in shapes}
        for key, check in checks.items():
            value = avclip_weight(key, shapes[key], seeds[key]).double()
            if [value.sum().item(), value.abs().sum().item(), value.flatten()[0].item()] != pytest.approx(check, rel=1e-5):
                break
        else:
            return {key: avclip_weight(key, shape, seeds[key]) for key, shape in shapes.items()}
    raise AssertionError("no weights have the recorded checksums: this set was made by another recipe")


def avclip_video(config: dict) -> Tensor:
    """The video of the AV-CLIP case (B, F, 3, H, W)."""
    ranges = [torch.arange(length) for length in (config["B"], config["S"], 3, 16, 224, 224)]
    b, s, c, t, h, w = torch.meshgrid(*ranges, indexing="ij")
    pattern = 3 * (((t + 1) * (h // 16) * (w // 16)) % 251)
    pixels = (37 * h + 59 * w + 83 * t + 101 * c + 131 * s + 17 * b + (h * w) // 7 + pattern) % 256
    assert pixels.sum() == config["clip_sum"]
    assert pixels[0, 0, 0, 0, 0, : len(config["clip_first_row"])].tolist() == config["clip_first_row"]
    return pixels.to(torch.uint8).transpose(2, 3).flatten(1, 2)


@torch.no_grad()
def test_avclip_motionformer(tmp_path):
    case = read("avclip_motionformer")
    state = {f"module.v_encoder.{key}": value for key, value in avclip_weights(case.config).items()}
    path = tmp_path / "epoch_best.pt"
    torch.save({"state_dict": state}, path)
    encoder = AVCLIP(str(path), batch_size=case.config["B"] * case.config["S"])
    del state
    path.unlink()  # half a gigabyte

    tower, indexes, got = encoder.tower, case.config["token_indexes"], {}
    for name in case.output:
        if form := re.fullmatch(r"tokens_after_block(\d+)", name):
            part = tower.blocks[int(form[1])]
        elif form := re.fullmatch(r"block(\d+)_(time|space)_attention_out", name):
            part = getattr(tower.blocks[int(form[1])], {"time": "timeattn", "space": "attn"}[form[2]])
        else:
            continue
        part.register_forward_hook(lambda _, given, tokens, name=name: got.update({name: tokens[:, indexes]}))
    tower.blocks[0].register_forward_pre_hook(lambda _, given: got.update(tokens_after_pos_embed=given[0][:, indexes]))
    patches = [index - 1 for index in indexes if index]
    tower.norm.register_forward_hook(lambda _, given, tokens: got.update(patch_tokens_after_norm=tokens[:, patches]))
    got["features"] = encoder(avclip_video(case.config)).view_as(case.output["features"])
    assert set(got) == set(case.output)
    for name, want in case.output.items():
        torch.testing.assert_close(got[name], want, atol=1e-4, rtol=0.0, msg=lambda told, name=name: f"{name}: {told}")


def test_avclip_keys():
    published = recordings.listed("avclip_motionformer_keys")
    with torch.device("meta"):
        tower = Tower(Sizes())
    assert {key: list(value.shape) for key, value in tower.state_dict().items()} == published["state_dict"]
    assert sum(parameter.numel() for parameter in tower.parameters()) == published["num_params"]


def test_video_transforms():
    case = read("video_transforms")
    frame, want, normalised = case.input["frame_u8"], case.output["resized_u8"], case.output["normalized"]
    got = resized(frame, min(want.shape[-2:]))
    assert got.dtype == torch.uint8
    assert got.shape == want.shape
    assert (got.int() - want.int()).abs().max() <= 1
    size = normalised.shape[-1]
    torch.testing.assert_close(centred(crop(want, size)), normalised, atol=1e-6, rtol=0.0)
    for name, recorded in case.config["segments"].items():
        frames, count = re.fullmatch(r"len(\d+)_n(\d+|None)", name).groups()
        segment = recorded["shape"][1]
        starts = segment_starts(int(frames), segment, None if count == "None" else int(count))
        assert starts == recorded["first_frame_of_each"], name
    for name, recorded in case.config["uniform_temporal_subsample"].items():
        frames, duration = re.fullmatch(r"in(\d+)_dur([\d.]+)", name).groups()
        assert evenly_spaced(int(frames), cover(float(duration), 25)) == recorded, name


def test_dac_codec(tmp_path):
    """The codec out of a checkpoint of the original, under the names it has there."""
    case = read("dac_codec")
    torch.save({"state_dict": case.state}, tmp_path / "epoch.ckpt")
    codec = DAC("44khz", str(tmp_path / "epoch.ckpt"))
    assert codec.hop_length == case.config["hop"]
    assert codec.codec.sizes.latent_dim == case.config["latent_dim"]
    assert codec.num_codebooks == case.config["dac_config"]["n_codebooks"]
    want = case.output
    close = {"atol": 1e-5, "rtol": 1e-5}

    latents = codec.codec.encoder(want["padded_audio"])
    largest = float(want["encoder_out"].abs().max())  # of chance, it is large: the recording itself is only so near to float64
    torch.testing.assert_close(latents, want["encoder_out"], atol=1e-5 * max(1.0, largest), rtol=0)
    named = codec.codec.quantizer(latents, codec.num_codebooks)
    assert torch.equal(named.codes, want["codes"])
    torch.testing.assert_close(named.latents, want["latents"], atol=1e-5 * max(1.0, largest), rtol=0)
    torch.testing.assert_close(named.total, want["z_quantized"], **close)
    torch.testing.assert_close(codec.codec.quantizer.from_codes(want["codes"]), want["z_from_codes"], **close)
    assert torch.equal(codec.encode(case.input["audio"]), want["codes"])
    assert torch.equal(codec.encode(want["padded_audio"]), want["codes"])
    torch.testing.assert_close(codec.decode(want["codes"]), want["audio_from_codes"], atol=1e-5, rtol=0)

    for name in [name for name in want if name.startswith("codes_nq")]:
        few = DAC("44khz", str(tmp_path / "epoch.ckpt"), num_codebooks=want[name].shape[1])
        assert torch.equal(few.encode(case.input["audio"]), want[name])
        sound = want[name.replace("codes", "audio_from_codes")]
        torch.testing.assert_close(few.decode(want[name]), sound, atol=1e-5, rtol=0)

    half = DAC("44khz", str(tmp_path / "epoch.ckpt"), "float16")
    want_half = want["audio_from_codes_fp16"].float()
    torch.testing.assert_close(half.decode(want["codes"]), want_half, atol=5e-3, rtol=0)


def test_dac_names():
    """A full-size codec has the names and shapes of the published one, in which a weight is a length and a direction."""
    published = recordings.listed("dac_44khz_8kbps_keys")
    with torch.device("meta"):
        ours = Codec(PUBLISHED["44khz"].sizes).state_dict()
    for key in [key for key in ours if key.endswith(".weight") and "codebook" not in key]:
        ours[f"{key}_v"] = ours.pop(key)
        ours[f"{key}_g"] = ours[f"{key}_v"].flatten(1)[:, :1, None]
    assert {key: list(tensor.shape) for key, tensor in ours.items()} == published["state_dict"]
    assert sum(tensor.numel() for tensor in ours.values()) == published["num_params"]
    assert PUBLISHED["44khz"].sizes.hop_length == published["hop_length"]
