import gc
import weakref

import pytest
import torch
from torch import Tensor

from vaura.lm import generation
from vaura.lm.engine import NativeEngine, TorchEngine
from vaura.lm.generation import (
    generate,
    generate_rolling,
    generate_slow,
    generate_windows,
    stream_rolling,
    stream_windows,
)
from vaura.lm.llama import TokenLM
from vaura.lm.native import NoLibrary, library
from vaura.lm.sampling import Guidance, Sampler, draw_uniform
from vaura.protocols import ABSENT, Condition
from vaura.timing import Window, windows

K, V, C, T = 3, 13, 8, 7
SAMPLED, GREEDY = Sampler(1.0, top_k=8), Sampler(0.0)


def make(pattern: str = "delay") -> TokenLM:
    torch.manual_seed(0)
    lm = TokenLM(K, V, num_layers=2, dim=16, num_heads=2, channels=C, pattern=pattern, ffn_multiple=8)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.5)
    return lm.eval()


def native(lm: TokenLM) -> NativeEngine:
    try:
        library()
    except NoLibrary as reason:
        pytest.skip(f"no CPU kernel: {reason}")
    return NativeEngine(lm)


ENGINES = pytest.mark.parametrize("engine", [TorchEngine, native], ids=["torch", "native"])


def condition_of(rows: int, frames: int = T) -> Condition:
    return Condition(torch.randn(rows, frames, C, generator=torch.Generator().manual_seed(1)))


def part(condition: Condition, span: Window) -> Condition:
    return Condition(condition.channel[:, span.start : span.stop], span.start)


def generate_long(lm: TokenLM, condition: Condition, frames: int, *, window: int, stride: int, **how) -> Tensor:
    """By windows of token frames, which each see their own slice of one condition."""
    spans = windows(frames, 1, window, stride)

    def seen(span: Window) -> Condition:
        return Condition(condition.channel[:, span.start : span.stop])

    return generate_windows(lm, seen, spans, **how)


def prompt_of(batch: int, frames: int) -> Tensor:
    return torch.randint(0, V, (batch, K, frames), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prompted", [0, 4, T - 1, T])
@pytest.mark.parametrize("sampler", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("batch", [1, 3])
@ENGINES
def test_the_fast_loop_gives_the_tokens_of_the_slow_one(engine, pattern, guidance, prompted, sampler, batch):
    lm, condition = make(pattern), condition_of(batch if guidance == 1.0 else 2 * batch)
    prompt = prompt_of(batch, prompted) if prompted else None
    how = {"seeds": list(range(batch)), "sampler": sampler, "guidance": guidance, "prompt": prompt}
    codes = generate(engine(lm), condition, T, **how)
    assert torch.equal(codes, generate_slow(lm, condition, T, **how))
    assert codes.shape == (batch, K, T)
    assert 0 <= codes.min() <= codes.max() < V
    if prompt is not None:
        assert torch.equal(codes[:, :, :prompted], prompt)


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@torch.no_grad()
def test_greedy_codes_are_the_most_likely_ones_given_those_before(pattern):
    lm, condition = make(pattern), condition_of(2)
    codes = generate(lm, condition, T, seeds=[0, 0], sampler=GREEDY)
    assert torch.equal(codes, lm(codes, condition).argmax(-1))


@torch.no_grad()
def test_guidance_goes_from_the_null_towards_and_past_the_condition():
    lm, both = make(), condition_of(4)
    given, null = Condition(both.channel[:2]), Condition(both.channel[2:])
    codes = generate(lm, both, T, seeds=[0, 0], sampler=GREEDY, guidance=2.5)
    logits = lm(codes, null) + 2.5 * (lm(codes, given) - lm(codes, null))
    assert torch.equal(codes, logits.argmax(-1))
    nulls = generate(lm, both, T, seeds=[0, 0], sampler=GREEDY, guidance=0.0)
    assert torch.equal(nulls, generate(lm, null, T, seeds=[0, 0], sampler=GREEDY))


@torch.no_grad()
def test_codes_follow_the_draws_of_their_steps():
    lm, condition = make(), condition_of(1)
    draws = draw_uniform([7], lm.num_steps(T), K)
    codes = generate(lm, condition, T, seeds=[7], sampler=SAMPLED)
    assert torch.equal(generate(lm, condition, T, seeds=[0], sampler=SAMPLED, draws=draws), codes)
    logits = lm(codes, condition)
    for k in range(K):
        assert torch.equal(codes[0, k], SAMPLED(logits[0, k], draws[0, k : k + T, k]))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_seed_gives_its_codes_in_any_batch(guidance):
    lm, frames = make(), 14
    given, null = condition_of(1, frames).channel, 0 * condition_of(1, frames).channel
    others = torch.randn(2, frames, C)

    def codes(channel: Tensor, seeds: list[int]) -> Tensor:
        rows = channel if guidance == 1.0 else torch.cat([channel, null.expand_as(channel)])
        how = {"window": 8, "stride": 5, "sampler": SAMPLED, "guidance": guidance}
        return generate_long(lm, Condition(rows), frames, seeds=seeds, **how)

    alone = codes(given, [5])
    crowd = codes(torch.cat([others[:1], given, given, others[1:]]), [1, 5, 6, 5])
    assert torch.equal(crowd[1:2], alone)
    assert not torch.equal(crowd[2:3], alone)
    assert not torch.equal(crowd[3:], alone)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prompted", [0, 4])
@pytest.mark.parametrize("window", [T, T + 5])
def test_a_window_that_holds_the_clip_is_plain_generation(guidance, prompted, window):
    lm, condition = make(), condition_of(2 if guidance == 1.0 else 4)
    prompt = prompt_of(2, prompted) if prompted else None
    how = {"seeds": [3, 4], "sampler": SAMPLED, "guidance": guidance, "prompt": prompt}
    codes = generate_long(lm, condition, T, window=window, stride=2, **how)
    assert torch.equal(codes, generate(lm, condition, T, **how))


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (5, 3), (1, 1)])
@pytest.mark.parametrize("prompted", [0, 3, 13, 20])
def test_long_codes_keep_the_prompt_and_have_no_gap(pattern, window, stride, prompted):
    lm, frames = make(pattern), 20
    prompt = prompt_of(2, prompted) if prompted else None
    how = {"window": window, "stride": stride, "seeds": [0, 1], "sampler": SAMPLED, "prompt": prompt}
    codes = generate_long(lm, condition_of(2, frames), frames, **how)
    assert codes.shape == (2, K, frames)
    assert 0 <= codes.min() <= codes.max() < V
    if prompt is not None:
        assert torch.equal(codes[:, :, :prompted], prompt)


def test_a_later_window_goes_on_from_the_codes_before_it():
    lm, frames = make(), 14
    condition = condition_of(2, frames)
    codes = generate_long(lm, condition, frames, window=8, stride=6, seeds=[0, 1], sampler=GREEDY)
    for start, stop, known in [(0, 8, 0), (6, 14, 2)]:
        prompt = codes[:, :, start : start + known] if known else None
        here = Condition(condition.channel[:, start:stop])
        piece = generate(lm, here, stop - start, seeds=[0, 0], sampler=GREEDY, prompt=prompt)
        assert torch.equal(codes[:, :, start:stop], piece)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_window_sees_its_own_slice_of_the_condition(guidance):
    """An LM without layers that says the label it sees: the channel is a label, one hot."""
    frames, labels, end = 23, V - 1, V - 1
    lm = TokenLM(K, V, num_layers=0, dim=2 * V, num_heads=1, channels=V)
    for k in range(K):
        torch.nn.init.zeros_(lm.embeddings[k].weight)
        lm.heads[k].weight.data = torch.eye(V, 2 * V)
    lm.after_end.data = torch.eye(V)[end].view(1, 1, V)
    seen = torch.randint(0, labels, (frames,), generator=torch.Generator().manual_seed(3))
    channel = torch.eye(V)[seen].unsqueeze(0)
    condition = Condition(channel if guidance == 1.0 else torch.cat([channel, torch.zeros_like(channel)]))
    how = {"seeds": [0], "sampler": GREEDY, "guidance": guidance}
    for window, stride in [(23, 5), (8, 4), (7, 7), (6, 1)]:
        codes = generate_long(lm, condition, frames, window=window, stride=stride, **how)[0]
        for span in windows(frames, 1, window, stride):
            for t in range(span.start + span.prompt, span.stop):
                for k in range(K):
                    assert codes[k, t] == (seen[t + k] if t + k < span.stop else end)


@pytest.mark.parametrize(("window", "stride"), [(20, 20), (8, 4), (5, 5)])
def test_a_step_has_its_draw_whatever_window_it_falls_into(window, stride):
    """Before it has learnt, an LM holds every code for equally likely."""
    lm, frames = TokenLM(K, V, num_layers=1, dim=16, num_heads=2, channels=C, ffn_multiple=8), 20
    codes = generate_long(lm, condition_of(1, frames), frames, window=window, stride=stride, seeds=[3], sampler=Sampler())
    draws = draw_uniform([3], frames + K - 1, K)[0]
    for k in range(K):
        assert torch.equal(codes[0, k], (draws[k : k + frames, k] * V).long())


def test_progress_ends_with_all_steps():
    lm, calls = make(), []
    how = {"seeds": [0], "sampler": GREEDY, "progress": lambda *call: calls.append(call)}
    generate(lm, condition_of(1), T, prompt=prompt_of(1, 4), **how)
    assert calls == [(s, T + K - 1) for s in range(5, T + K)]
    calls.clear()
    generate_long(lm, condition_of(1, 20), 20, window=8, stride=4, **how)
    assert {total for _, total in calls} == {20 + K - 1}
    assert calls[-1] == (20 + K - 1, 20 + K - 1)
    assert max(done for done, _ in calls) == 20 + K - 1


@ENGINES
def test_what_was_drawn_with_is_forgotten_at_once(engine, monkeypatch):
    """Keys and values of a batch take hundreds of megabytes; they must not wait for the collector of cycles."""
    lm, held = make(), []

    class Watched(generation.Run):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            held.append(weakref.ref(self.stream))

    monkeypatch.setattr(generation, "Run", Watched)
    used = engine(lm)
    gc.disable()
    try:
        generate_long(used, condition_of(1, 20), 20, window=8, stride=4, seeds=[0], sampler=GREEDY)
        generate_rolling(used, lambda _: condition_of(1), [Window(0, T, 0)], seeds=[0], sampler=GREEDY)
        assert [stream() for stream in held] == [None, None]
    finally:
        gc.enable()


def test_a_prompt_longer_than_the_clip_is_refused():
    with pytest.raises(ValueError, match="8 frames does not fit into 7"):
        generate(make(), condition_of(1), T, seeds=[0], sampler=GREEDY, prompt=prompt_of(1, 8))


def test_nothing_is_left_to_the_global_random_numbers():
    lm, condition = make(), condition_of(1)
    torch.manual_seed(0)
    first = generate(lm, condition, T, seeds=[3], sampler=SAMPLED)
    torch.manual_seed(1)
    assert torch.equal(generate(lm, condition, T, seeds=[3], sampler=SAMPLED), first)
    assert (first != ABSENT).all()


def slow_stream(lm: TokenLM, condition: Condition, frames: int, reach: int, seeds: list[int], guidance, prompt) -> Tensor:
    """One full pass for every step, in which a step looks at `reach` steps and at step 0."""
    given = 0 if prompt is None else prompt.shape[2]
    codes = torch.full((len(seeds), K, frames), ABSENT)
    codes[:, :, :given] = prompt if prompt is not None else 0
    draws = draw_uniform(seeds, lm.num_steps(frames), K)
    rows = 2 if guidance != 1.0 else 1
    for s in range(given, lm.num_steps(frames)):
        so_far = torch.full((len(seeds), K, lm.num_steps(frames)), ABSENT)
        for k, late in enumerate(lm.delays):
            so_far[:, k, late : late + frames] = codes[:, k]
        so_far = torch.nn.functional.pad(so_far[:, :, :s], (1, 0), value=ABSENT)
        logits = lm.step(torch.cat([so_far] * rows), condition, reach=reach)[:, :, -1]
        tokens = SAMPLED(Guidance(guidance)(logits, 0.0), draws[:, s])
        for k, late in enumerate(lm.delays):
            if late <= s < late + frames and codes[0, k, s - late] == ABSENT:
                codes[:, k, s - late] = tokens[:, k]
    return codes


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@pytest.mark.parametrize(("guidance", "prompted"), [(1.0, 0), (3.0, 0), (1.0, 3), (1.0, 17), (3.0, 9)])
@ENGINES
@torch.no_grad()
def test_a_stream_through_a_cache_that_forgets_is_attention_of_that_reach(engine, pattern, guidance, prompted):
    lm, frames, window = make(pattern), 40, 6
    condition = condition_of(2 if guidance == 1.0 else 4, frames)
    prompt = prompt_of(2, prompted) if prompted else None
    spans = windows(frames, 1, window, 4)
    how = {"seeds": [1, 2], "sampler": SAMPLED, "guidance": guidance, "prompt": prompt}
    codes = generate_rolling(engine(lm), lambda span: part(condition, span), spans, **how)
    assert torch.equal(codes, slow_stream(lm, condition, frames, lm.num_steps(window), [1, 2], guidance, prompt))


def test_a_stream_no_longer_than_its_reach_is_plain_generation():
    lm, condition = make(), condition_of(2)
    how = {"seeds": [3, 4], "sampler": SAMPLED}
    codes = generate_rolling(lm, lambda _: condition, [Window(0, T, 0)], **how)
    assert torch.equal(codes, generate(lm, condition, T, **how))


@torch.no_grad()
def test_a_course_of_guidance_has_its_scale_at_every_step():
    lm, both = make(), condition_of(4)
    course = Guidance(4.0, end=1.5, shape="cosine")
    codes = generate(lm, both, T, seeds=[0, 0], sampler=GREEDY, guidance=course)
    assert torch.equal(codes, generate_slow(lm, both, T, seeds=[0, 0], sampler=GREEDY, guidance=course))
    given, null = Condition(both.channel[:2]), Condition(both.channel[2:])
    last = lm.num_steps(T) - 1
    scale = torch.tensor([[course.at((t + k) / last) for t in range(T)] for k in range(K)]).unsqueeze(-1)
    logits = lm(codes, null) + scale * (lm(codes, given) - lm(codes, null))
    assert torch.equal(codes, logits.argmax(-1))
    assert [course.at(done) for done in (0.0, 0.5, 1.0)] == [4.0, 2.75, 1.5]


@pytest.mark.parametrize("guidance", [1.0, Guidance(3.0, end=1.5)], ids=["plain", "guided"])
@pytest.mark.parametrize("prompted", [0, 2])
@pytest.mark.parametrize("loop", [generate_windows, generate_rolling])
@ENGINES
def test_clips_of_different_lengths_have_the_codes_they_have_alone(engine, loop, prompted, guidance):
    if loop is generate_rolling and guidance != 1.0:
        guidance = Guidance(3.0)
    lm, lengths, seeds = make(), [5, 19, 12, 12, 3], [1, 2, 3, 4, 5]
    channel = torch.randn(len(lengths), max(lengths), C)
    prompt = prompt_of(len(lengths), prompted) if prompted else None
    both = 2 if Guidance.of(guidance).on else 1

    def seen(rows: list[int], span: Window) -> Condition:
        ends = torch.tensor([lengths[b] - span.start for b in rows]).clamp(min=0)
        given = channel[rows, span.start : span.stop]
        start = span.start if loop is generate_rolling else 0
        return Condition(torch.cat([given, 0 * given][:both]), start, ends.repeat(both))

    def codes(rows: list[int]) -> Tensor:
        frames = [lengths[b] for b in rows]
        return loop(
            engine(lm),
            lambda span: seen(rows, span),
            windows(max(frames), 1, 8, 5),
            seeds=[seeds[b] for b in rows],
            sampler=SAMPLED,
            guidance=guidance,
            prompt=None if prompt is None else prompt[rows],
            lengths=frames,
        )

    together = codes([0, 1, 2, 3, 4])
    for b, length in enumerate(lengths):
        assert torch.equal(together[b : b + 1, :, :length], codes([b]))
        assert (together[b, :, length:] == ABSENT).all()


@pytest.mark.parametrize("loop", [stream_windows, stream_rolling])
def test_codes_come_before_the_later_condition_is_asked_for(loop):
    lm, frames, asked = make(), 300, []
    condition = condition_of(1, frames)

    def seen(span: Window) -> Condition:
        asked.append(span.stop)
        return part(condition, span) if loop is stream_rolling else Condition(part(condition, span).channel)

    pieces, given = [], 0
    for piece in loop(lm, seen, windows(frames, 1, 40, 20), seeds=[0], sampler=SAMPLED):
        pieces.append(piece)
        given += piece.shape[2]
        assert asked[-1] <= given + 40 + K
    whole = generate_windows if loop is stream_windows else generate_rolling
    assert torch.equal(torch.cat(pieces, dim=2), whole(lm, seen, windows(frames, 1, 40, 20), seeds=[0], sampler=SAMPLED))
    assert given == frames
    assert len(pieces) > 3
