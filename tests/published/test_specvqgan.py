"""A run as SpecVQGAN published them, made here of random weights, becomes an experiment of the house."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vaura import experiment
from vaura.errors import InputError
from vaura.lm.sampling import Sampler
from vaura.published.specvqgan import is_published, read_published
from vaura.task.alignment import Extractor
from vaura.tokenizer.specvqgan_network import Network, Sizes

REPOSITORY = Path(__file__).resolve().parents[2]
FEATURES, WIDTH, LAYERS, CODES = 3, 16, 2, 8
NETWORK = {"ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 16, "attn_resolutions": [53]}


def settings(block: int, transformer: str = "GPTFeats") -> dict[str, Any]:
    gpt = {"vocab_size": CODES, "block_size": block, "n_layer": LAYERS, "n_head": 2, "n_embd": WIDTH}
    first = {"embed_dim": 8, "n_embed": CODES, "ddconfig": NETWORK}
    return {
        "model": {
            "target": "specvqgan.models.cond_transformer.Net2NetTransformer",
            "params": {
                "transformer_config": {
                    "target": f"specvqgan.modules.transformer.mingpt.{transformer}",
                    "params": {"GPT_config": gpt},
                },
                "first_stage_permuter_config": {"params": {"H": 5, "W": 53}},
                "first_stage_config": {"params": first},
            },
        },
        "data": {"params": {"train": {"target": "specvqgan.data.vas.VASSpecsCondOnFeats"}}},
    }


def tensors(embedder: dict[str, torch.Tensor], block: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=draw)

    state = {"tok_emb.weight": some(CODES, WIDTH), "pos_emb": some(1, block, WIDTH), "head.weight": some(CODES, WIDTH)}
    state |= {"ln_f.weight": 1 + some(WIDTH), "ln_f.bias": some(WIDTH)}
    for number in range(LAYERS):
        for part in ("query", "key", "value", "proj"):
            state |= {
                f"blocks.{number}.attn.{part}.weight": some(WIDTH, WIDTH),
                f"blocks.{number}.attn.{part}.bias": some(WIDTH),
            }
        for norm in ("ln1", "ln2"):
            state |= {f"blocks.{number}.{norm}.weight": 1 + some(WIDTH), f"blocks.{number}.{norm}.bias": some(WIDTH)}
        state |= {f"blocks.{number}.mlp.0.weight": some(4 * WIDTH, WIDTH), f"blocks.{number}.mlp.0.bias": some(4 * WIDTH)}
        state |= {f"blocks.{number}.mlp.2.weight": some(WIDTH, 4 * WIDTH), f"blocks.{number}.mlp.2.bias": some(WIDTH)}
        state[f"blocks.{number}.attn.mask"] = torch.ones(1, 1, block, block).tril()
    whole = {f"transformer.{key}": value for key, value in (state | embedder).items()}
    torch.manual_seed(0)
    network = Network(Sizes(32, (1, 1, 1, 1, 1), 1, (4,), 16, 8, CODES, 0.0), 0.25, "codebook")
    whole |= {f"first_stage_model.{key}": value for key, value in network.state_dict().items()}
    return whole | {"first_stage_permuter.forward_shuffle_idx": torch.arange(265)}


@pytest.fixture
def published(tmp_path):
    """published(state, settings): the folder of a run."""

    def write(state: dict[str, torch.Tensor], told: dict[str, Any]) -> Path:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "2021-07-30T21-03-22-project.yaml").write_text(yaml.safe_dump(told))
        torch.save({"state_dict": state, "epoch": 259}, tmp_path / "checkpoints" / "epoch_259.ckpt")
        return tmp_path

    return write


FEATS = {"embedder.weight": torch.randn(WIDTH, 6, 1), "embedder.bias": torch.zeros(WIDTH)}


def test_a_run_becomes_an_experiment_that_draws(published):
    folder = published(tensors(FEATS, 265 + FEATURES), settings(265 + FEATURES))
    assert is_published(folder)
    task, config = experiment.load(folder)
    assert config.conditioner.features == FEATURES == config.data.features
    assert (task.tokenizer.num_codebooks, task.tokenizer.codebook_size, task.encoder.dim) == (5, CODES, 6)
    assert task.tokenizer.fitted
    codes = task.sample(
        torch.randn(2, FEATURES, 6),
        4 / task.tokenizer.frame_rate,
        seeds=[1, 2],
        sampler=Sampler(1.0, top_k=4),
        guidance=2.0,
        window=53 / task.tokenizer.frame_rate,
        stride=53 / task.tokenizer.frame_rate,
    )
    assert codes.shape == (2, 5, 4)
    assert 0 <= codes.min() <= codes.max() < CODES


LOSS = {"K": 4, "tau": 2, "offset": 1, "segments": 16, "pal_weight": 0.5, "ce_weight": 1.0}


def extractors(width: int = 6) -> dict[str, torch.Tensor]:
    """Those of PerceptAlign's loss, of random weights, by their names in its checkpoints."""
    state = {}
    for part, channels in (("audio", 80), ("video", 6)):
        for key, value in Extractor(channels, width).state_dict().items():
            state[f"{part}_feature_extractor.{key}"] = torch.rand(value.shape) if value.is_floating_point() else value
    return state


def test_a_run_of_perceptaligns_keeps_its_loss(published):
    told, state = settings(265 + FEATURES), tensors(FEATS, 265 + FEATURES) | extractors()
    told["model"]["params"]["hyperparameters"] = LOSS
    folder = published(state, told)
    reading = read_published(folder)
    assert set(reading.used) | set(reading.dropped) >= set(state)
    task, config = experiment.load(folder)
    loss = task.alignment
    assert (config.task.alignment.form, loss.form, loss.weight, loss.cross_entropy_weight) == ("legacy", "legacy", 0.5, 1.0)
    assert (loss.lags, loss.tau, loss.offset, loss.segments, loss.clips) == (4, 2, 1, 16, None)
    for part in ("audio", "video"):
        for key, value in getattr(loss, part).state_dict().items():
            assert torch.equal(value, state[f"{part}_feature_extractor.{key}"]), key
    value = loss.of_logits(torch.randn(1, 5, 53, CODES), torch.randn(1, FEATURES, 6))
    assert value is not None
    assert value.isfinite()


def test_extractors_without_their_settings_are_left_aside_and_told(published):
    state = tensors(FEATS, 265 + FEATURES) | extractors()
    folder = published(state, settings(265 + FEATURES))
    reading = read_published(folder)
    assert {key for key in state if "_feature_extractor." in key} <= set(reading.dropped)
    assert reading.dropped["audio_feature_extractor.fc.bias"] == "of PerceptAlign's loss, of which the settings say nothing"
    assert experiment.load(folder)[0].alignment is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"K": None}, r"lack model\.params\.hyperparameters\.K,"),
        ({"segments": 0}, r"hyperparameters\.segments=0, not a whole number above 0"),
        ({"tau": "1"}, r"hyperparameters\.tau='1', not a number from 0 on"),
        ({"offset": 1.5}, r"hyperparameters\.offset=1\.5, not a whole number from 0 on"),
    ],
)
def test_settings_of_the_loss_that_are_none_are_named(published, change, said):
    told = settings(265 + FEATURES)
    told["model"]["params"]["hyperparameters"] = LOSS | change
    with pytest.raises(InputError, match=said):
        read_published(published(tensors(FEATS, 265 + FEATURES) | extractors(), told))


def test_a_loss_whose_extractors_are_missing_is_told(published):
    told = settings(265 + FEATURES)
    told["model"]["params"]["hyperparameters"] = LOSS
    with pytest.raises(InputError, match=r"alignment\.audio\.conv1\.weight is missing"):
        experiment.load(published(tensors(FEATS, 265 + FEATURES), told))


def test_every_tensor_is_used_or_accounted_for(published):
    state = tensors(FEATS, 265 + FEATURES)
    reading = read_published(published(state, settings(265 + FEATURES)))
    assert set(reading.used) | set(reading.dropped) >= set(state)
    assert not any("unknown" in why for why in reading.dropped.values())


def test_settings_of_other_features_are_taken_over(published):
    told = settings(265 + FEATURES)
    train = told["data"]["params"]["train"]
    train["params"] = {"rgb_feats_dir_path": "data/feature_resnet50_dim2048_21.5fps", "replace_feats_with_random": True}
    wide = {"embedder.weight": torch.randn(WIDTH, 2048, 1), "embedder.bias": torch.zeros(WIDTH)}
    config = read_published(published(tensors(wide, 265 + FEATURES), told)).config
    assert list(config.encoder.kinds) == ["feature_resnet50_dim2048_21.5fps"]
    assert config.data.random_features
    assert list(config.tokenizer.attention) == [4]


@pytest.mark.parametrize("kind", ["class", "both"])
def test_a_model_of_classes_wants_to_be_told_one(published, kind):
    table = torch.randn(4, WIDTH)
    both = {
        "feat_embedder.weight": FEATS["embedder.weight"],
        "feat_embedder.bias": torch.zeros(WIDTH),
        "cls_embedder.weight": table,
    }
    block = 265 + 1 + (FEATURES if kind == "both" else 0)
    folder = published(tensors(both if kind == "both" else {"embedder.weight": table}, block), settings(block))
    task, config = experiment.load(folder)
    assert (config.conditioner.features, config.conditioner.classes) == (FEATURES if kind == "both" else 0, 4)
    assert task.conditioner.class_embed.weight.equal(table)
    how = {"seeds": [1], "sampler": Sampler(), "guidance": 1.0, "window": 9.8, "stride": 9.8}
    features = torch.randn(1, max(config.conditioner.features, 1), task.encoder.dim)
    with pytest.raises(InputError, match=r"wants to be told one of its 4 classes: give label=NUMBER"):
        task.sample(features, 0.4, **how)
    codes = task.sample(features, 0.7, label=torch.tensor([0]), **how)
    assert codes.shape == (1, 5, 4)
    one, other = (task.lm(codes, task.conditioner(features, 4, label=torch.tensor([label]))) for label in (0, 3))
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (
            "transformer.blocks.1.attn.value.weight",
            r"lacks transformer\.blocks\.1\.attn\.value\.weight; give a whole checkpoint",
        ),
        ("transformer.blocks.0.ln1.bias", r"lm\.blocks\.0\.attention_norm\.bias is missing"),
        ("first_stage_model.quantize.embedding.weight", r"lacks quantize\.embedding\.weight"),
    ],
)
def test_a_missing_tensor_is_named(published, lost, told):
    state = tensors(FEATS, 265 + FEATURES)
    del state[lost]
    with pytest.raises(InputError, match=told):
        experiment.load(published(state, settings(265 + FEATURES)))


def test_missing_settings_are_named(published):
    told = settings(265 + FEATURES)
    del told["model"]["params"]["transformer_config"]["params"]["GPT_config"]["n_head"]
    with pytest.raises(InputError, match=r"the settings of this experiment lack model\..*GPT_config\.n_head"):
        experiment.load(published(tensors(FEATS, 265 + FEATURES), told))


GPT = ("transformer_config", "params", "GPT_config")
CODER = ("first_stage_config", "params", "ddconfig")
PERMUTER = ("first_stage_permuter_config", "params")


@pytest.mark.parametrize(
    ("place", "key", "value", "said"),
    [
        (PERMUTER, "H", None, r"lack model\..*\.H,"),
        (PERMUTER, "H", "five", r"say model\..*\.H='five', not a whole number above 0"),
        (PERMUTER, "W", 5.5, r"\.W=5\.5, not a whole number"),
        (CODER, "attn_resolutions", 53, r"\.attn_resolutions=53, not a list of numbers"),
        (CODER, "ch_mult", [1, "x"], r"\.ch_mult='x', not a whole number"),
        (CODER, "resolution", [848], r"\.resolution=\[848\], not a whole number"),
        (GPT, "n_embd", 0, r"\.n_embd=0, not a whole number above 0"),
        (GPT, "n_embd", 12, r"embeds features by \(16, 6\), but model\..*\.n_embd is 12"),
        (GPT, "n_layer", True, r"\.n_layer=True, not a whole number"),
        (GPT, "block_size", "${nope}", r"\.block_size='\$\{nope\}', not a"),
    ],
)
def test_settings_that_are_no_numbers_are_named(published, place, key, value, said):
    told = settings(265 + FEATURES)
    node = told["model"]["params"]
    for part in place:
        node[part] = dict(node[part])
        node = node[part]
    node[key] = value
    with pytest.raises(InputError, match=said):
        read_published(published(tensors(FEATS, 265 + FEATURES), told))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n- 2\n", r"2021-.*-project\.yaml holds no settings by name"),
        ("hello", "holds no settings by name"),
        ("", "tells no settings of a model"),
        ("a: [1", "is no YAML"),
        ("\x00", "is no YAML"),
        ("!!python/object/apply:os.system ['touch pwned']", "is no YAML"),
    ],
)
def test_settings_that_cannot_be_read_are_told(published, text, said):
    folder = published(tensors(FEATS, 265 + FEATURES), {})
    (folder / "configs" / "2021-07-30T21-03-22-project.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        read_published(folder)
    assert not Path("pwned").exists()


def test_what_no_model_is_built_of_may_be_anything(published):
    told = settings(265 + FEATURES)
    told["lightning"] = {"odd": "${nope", "odder": "${nope}"}
    assert read_published(published(tensors(FEATS, 265 + FEATURES), told)).config.conditioner.features == FEATURES


def test_later_settings_lie_over_earlier_ones(published):
    """As of a run that was taken up again: only what they say is another."""
    told = settings(265)
    folder = published(tensors(FEATS, 265 + FEATURES), told)
    later = {"model": {"params": {"transformer_config": {"params": {"GPT_config": {"block_size": 265 + FEATURES}}}}}}
    (folder / "configs" / "2021-08-01T00-00-00-project.yaml").write_text(yaml.safe_dump(later))
    assert read_published(folder).config.conditioner.features == FEATURES


def test_the_importer_makes_an_experiment_that_draws_the_same(published, tmp_path_factory):
    source, folder = published(tensors(FEATS, 265 + FEATURES), settings(265 + FEATURES)), tmp_path_factory.mktemp("new") / "own"
    done = [sys.executable, str(REPOSITORY / "scripts/import_checkpoint.py"), str(source), str(folder)]
    said = subprocess.run(done, capture_output=True, text=True, check=True).stdout
    assert "none missed" in said
    how = {"seeds": [1], "sampler": Sampler(1.0), "guidance": 1.0, "window": 9.8, "stride": 9.8}
    features = torch.randn(1, FEATURES, 6)
    one, other = (experiment.load(place)[0].sample(features, 0.7, **how) for place in (source, folder))
    assert one.equal(other)
