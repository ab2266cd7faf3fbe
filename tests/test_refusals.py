"""Whatever is wrong with a command line or a config is told in one sentence."""

from pathlib import Path

import pytest

from vaura.refusals import unknown_key


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["trainer.max_stepss=3"], "unknown key 'trainer.max_stepss'. Did you mean 'trainer.max_steps'?"),
        (["lm=large", "lm.num_layer=3"], "unknown key 'lm.num_layer'. Did you mean 'lm.num_layers'?"),
        (["batch_sise=3"], "unknown key 'batch_sise'. Did you mean 'data.batch_size'?"),
        (["+sed=1"], "unknown key 'sed'. Did you mean 'seed'?"),
        (["++foo.bar=1"], "unknown key 'foo'. --cfg job shows every key."),
        (["hydra.runn.dir=x"], "unknown key 'hydra.runn.dir'. --cfg hydra shows every key."),
        (["seed=abc"], "seed takes a whole number, not 'abc'"),
        (["--multirun", "seed=1,abc"], "seed takes a whole number, not 'abc'"),
        (["name=null"], "name takes a value, not null"),
        (["seed"], "'seed' is no override; write seed=VALUE"),
        (["seed=1,2"], "'seed=1,2' gives several values; write seed=[1,2] for a list, or add --multirun to run each"),
        (
            ["lm.dim=${data.batch_sise}"],
            "lm.dim refers to ${data.batch_sise}, which does not exist. Did you mean 'data.batch_size'?",
        ),
        (["~lm"], "lm (predicts codes): no value given; add lm=VALUE"),
        (["name=???"], "name (the experiment's name: its folder is LOG_DIR/NAME/TIME): no value given; add name=VALUE"),
        (
            ["action=trian"],
            "unknown action 'trian'; there are train, test, finetune, train_part, generate, evaluate, codec, quickstart, "
            "prepare, serve. "
            "Did you mean 'train'?",
        ),
        (["action=generate"], "{configs}/train.yaml says how to train or test, not how to generate; remove action="),
        (
            ["tokenizer=encodek_24khz"],
            "there is no tokenizer 'encodek_24khz'; there are encodec_24khz. Did you mean 'encodec_24khz'?",
        ),
    ],
)
def test_a_wrong_word_is_refused_in_one_sentence(refusal, configs, seen, argv, sentence):
    assert refusal("config=train", *argv) == sentence.replace("{configs}", str(configs))
    assert not seen
    assert not list(Path().glob("logs/**/config.yaml"))


def test_a_key_that_another_choice_takes_away_is_not_suggested():
    known = ["tokenizer.vocoder.iterations", "tokenizer.vocoder.weights"]
    assert unknown_key("tokenizer.vocoder.iterations", known) == (
        "unknown key 'tokenizer.vocoder.iterations'. Did you mean 'tokenizer.vocoder.weights'?"
    )
    assert unknown_key("lm.dim", ["lm.dim"]) == "unknown key 'lm.dim'. --cfg job shows every key."


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("configs/tran.yaml", "there is no config 'configs/tran.yaml'. Did you mean 'configs/train.yaml'?"),
        ("nowhere/train.yml", "there is no config 'nowhere/train.yml'. Did you mean 'configs/train.yaml'?"),
        ("stranger", "in stranger.yaml, unknown key 'trainr'. Did you mean 'trainer'?"),
        ("mistyped", "in mistyped.yaml, seed takes a whole number, not 'many'"),
        ("broken", "{configs}/broken.yaml, line 2 is not YAML: mapping values are not allowed here"),
        ("open", "data.root (the folder of clips): no value given; add data.root=VALUE"),
        (
            "bare",
            "{configs}/bare.yaml names no schema: its defaults list begins with one of train, train_part, quickstart, "
            "finetune, generate, evaluate, codec, prepare, serve, as '- schema: train'",
        ),
        (
            "experiments/system/lost",
            "{configs}/experiments/system/lost.yaml needs '# @package _global_' as its first line, because it lies in a"
            " subfolder of {configs}",
        ),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(refusal, configs, seen, name, sentence):
    assert refusal(f"config={name}") == sentence.format(configs=configs)
    assert not seen


@pytest.mark.parametrize(
    ("content", "told"), [(b"\xff\xfe\x00", "is not text, let alone YAML"), (b"defaults: 5", "defaults must be a list")]
)
def test_what_is_no_config_is_told(refusal, tmp_path, content, told):
    (tmp_path / "some.yaml").write_bytes(content)
    assert told in refusal(f"config={tmp_path}/some.yaml")
