import math

import pytest
import torch

from vaura.errors import InputError
from vaura.tokenizer.quantiser import VectorQuantiser, perplexity


def make(codes: int = 16, dim: int = 4, **settings) -> VectorQuantiser:
    torch.manual_seed(0)
    return VectorQuantiser(codes, dim, **settings)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_the_nearest_entry_is_found_by_looking_at_all():
    quantiser = make()
    torch.nn.init.normal_(quantiser.embedding.weight)
    z = noise(2, 4, 3, 5)
    distance = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 4).double(), quantiser.embedding.weight.double())
    assert torch.equal(quantiser.codes(z).flatten(), distance.argmin(1))
    assert quantiser(z).codes.shape == (2, 3, 5)


def test_of_equally_near_entries_the_first_is_taken():
    quantiser = make()
    with torch.no_grad():
        quantiser.embedding.weight[:] = torch.tensor([1.0, 0, 0, 0])
    assert quantiser.codes(noise(3, 4, 7)).max() == 0


def test_entries_begin_small_and_evenly_spread():
    table = make(64, 256).embedding.weight
    assert table.abs().max() <= 1 / 64
    assert table.std().item() == pytest.approx(1 / 64 / math.sqrt(3), rel=0.02)


def test_entries_name_themselves():
    quantiser = make()
    codes = torch.arange(16).view(2, 8)
    assert torch.equal(quantiser.codes(quantiser.vectors(codes)), codes)


@pytest.mark.parametrize(("beta_on", "of_vectors", "of_entries"), [("codebook", 1.0, 0.25), ("commitment", 0.25, 1.0)])
def test_beta_weighs_the_term_it_is_on(beta_on, of_vectors, of_entries):
    quantiser = make(beta=0.25, beta_on=beta_on)
    z = noise(2, 4, 6).requires_grad_()
    made = quantiser(z)
    entries = quantiser.vectors(made.codes).detach()
    difference = z.detach() - entries
    assert made.loss.item() == pytest.approx(1.25 * difference.square().mean().item())
    of_z, of_table = torch.autograd.grad(made.loss, [z, quantiser.embedding.weight])
    torch.testing.assert_close(of_z, of_vectors * 2 * difference / difference.numel())
    drawn = torch.zeros_like(of_table).index_add_(0, made.codes.flatten(), difference.movedim(1, -1).reshape(-1, 4))
    torch.testing.assert_close(of_table, -of_entries * 2 * drawn / difference.numel())


def test_gradients_pass_straight_through():
    z = noise(2, 4, 6).requires_grad_()
    probe = noise(2, 4, 6) + 1
    (grad,) = torch.autograd.grad((make()(z).vectors * probe).sum(), z)
    torch.testing.assert_close(grad, probe)


def test_another_term_is_refused():
    with pytest.raises(InputError, match="beta_on is 'both'; choose codebook or commitment"):
        make(beta_on="both")


def test_perplexity_counts_what_is_in_use():
    assert perplexity(torch.tensor([0, 7, 0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([3, 3, 3, 3, 0, 0])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([1, 3])).item() == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))


def test_dead_entries_are_revived_where_vectors_are():
    quantiser = make(64, 4).train()
    vectors = 5 + noise(30, 4, 3)
    met = quantiser(vectors).codes.unique()
    before = quantiser.embedding.weight.detach().clone()
    assert quantiser.revive(vectors) == 64 - len(met)
    table = quantiser.embedding.weight.detach()
    assert torch.equal(table[met], before[met])
    rows = vectors.movedim(1, -1).reshape(-1, 4)
    moved = [code for code in range(64) if code not in met.tolist()]
    assert (table[moved][:, None] == rows).all(-1).any(1).all()
    quantiser(vectors)
    assert quantiser.revive(rows) < 64 - len(met)


def test_only_training_marks_entries_as_met():
    quantiser = make(8, 4).eval()
    quantiser(noise(50, 4))
    assert quantiser.revive(noise(3, 4)) == 8


def test_the_state_is_the_published_one():
    assert list(make().state_dict()) == ["embedding.weight"]
