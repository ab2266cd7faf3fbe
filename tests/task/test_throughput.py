"""What is written of a training's pace, against arithmetic done by hand."""

import time
import types

import pytest
import torch

from vaura.errors import InputError
from vaura.task import throughput
from vaura.task.throughput import FetchClock, Throughput, measured_peak


def setting(every: int = 2, processes: int = 1):
    logged, shown = {}, {}
    module = types.SimpleNamespace(
        device=torch.device("cpu"),
        learnt_from=(3, 10),
        before=0,
        lm=types.SimpleNamespace(training_flops=lambda frames, before: 100 * (frames + before)),
        log=lambda name, value, **_: shown.update({name: value}),
    )
    trainer = types.SimpleNamespace(
        global_step=0,
        log_every_n_steps=every,
        world_size=processes,
        precision="32-true",
        strategy=types.SimpleNamespace(reduce=lambda tensor, reduce_op: tensor * processes),
        logger=types.SimpleNamespace(log_metrics=lambda figures, step: logged.update({step: figures})),
    )
    return trainer, module, logged, shown


@pytest.mark.parametrize("processes", [1, 2])
def test_figures_are_those_done_by_hand(monkeypatch, processes):
    """Two steps of two batches of 3 x 10 frames in 8 s, of which a validation took 3 and the data 1."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    trainer, module, logged, shown = setting(processes=processes)
    monkeypatch.setattr(throughput, "TokenPrediction", types.SimpleNamespace)
    clock = FetchClock()
    watch = Throughput(peak_flops=1000.0, clock=clock)
    watch.on_train_start(trainer, module)
    for index in range(4):
        clock.start("[_TrainingEpochLoop].train_dataloader_next")
        now[0] += 0.25
        clock.stop("[_TrainingEpochLoop].train_dataloader_next")
        now[0] += 1.0
        trainer.global_step = (index + 1) // 2
        watch.on_train_batch_end(trainer, module, None, None, index)
        if index == 1:
            watch.on_validation_start(trainer, module)
            now[0] += 3.0
            watch.on_validation_end(trainer, module)
    (figures,) = logged.values()
    assert list(logged) == [1]
    assert figures["throughput/frames_per_second"] == pytest.approx(processes * 120 / 5)
    assert figures["throughput/mfu"] == pytest.approx(12 * 1000 / 5 / 1000)
    assert figures["throughput/waiting"] == pytest.approx(1 / 5)
    assert shown["frames/s"] == pytest.approx(processes * 24)


@pytest.mark.parametrize("peak", [0, -1.0, "fast"])
def test_a_peak_that_is_none_is_refused(peak):
    with pytest.raises(InputError, match=rf"logging\.peak_flops={peak} is no rate"):
        Throughput(peak)


def test_the_peak_is_found_within_its_time():
    begin = time.perf_counter()
    peak = measured_peak(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begin < 5
    a = torch.ones(1024, 1024)
    a @ a
    begin = time.perf_counter()
    a @ a
    assert 0.05 < peak / (2 * 1024**3 / (time.perf_counter() - begin)) < 50
