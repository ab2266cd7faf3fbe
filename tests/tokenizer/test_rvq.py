import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vaura.errors import InputError
from vaura.tokenizer.rvq import ResidualCodebooks

D, K, V = 3, 4, 8


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def begun(seed: int = 0, **settings) -> ResidualCodebooks:
    """Codebooks that a first batch began."""
    torch.manual_seed(seed)
    codebooks = ResidualCodebooks(D, K, V, **settings)
    codebooks(drawn(6, D, 20))
    codebooks.follow()
    return codebooks


def buffers(codebooks: ResidualCodebooks) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in codebooks.named_buffers()}


def test_each_code_is_the_nearest_entry_to_what_is_left():
    """The definition, one vector at a time; loss and perplexity by theirs."""
    codebooks = begun().eval()
    latents = drawn(2, D, 7, seed=1)
    named = codebooks(latents)
    lost, used = torch.zeros(K), [Counter() for _ in range(K)]
    for row in range(2):
        for frame in range(7):
            left = latents[row, :, frame]
            for k in range(K):
                code = min(range(V), key=lambda v: float((codebooks.entries[k, v] - left).norm()))
                assert named.codes[row, k, frame] == code
                left = left - codebooks.entries[k, code]
                lost[k] += left.square().sum() / (2 * D * 7)
                used[k][code] += 1
            assert torch.allclose(named.vectors[row, :, frame], latents[row, :, frame] - left, atol=1e-6)
    assert float(named.loss) == pytest.approx(float(lost.mean()), rel=1e-5)
    entropies = [-sum(n / 14 * math.log(n / 14) for n in count.values()) for count in used]
    assert float(named.perplexity) == pytest.approx(sum(map(math.exp, entropies)) / K, rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, K])
def test_the_first_codes_alone_stand_for_something_coarser(count):
    codebooks = begun().eval()
    latents = drawn(2, D, 7, seed=1)
    named = codebooks(latents)
    codes = codebooks.encode(latents, count)
    assert torch.equal(codes, named.codes[:, :count])
    entries = [codebooks.entries[k][codes[:, k]] for k in range(count)]
    assert torch.allclose(codebooks.from_codes(codes), sum(entries).transpose(1, 2), atol=1e-6)
    if count == K:
        assert torch.allclose(codebooks.from_codes(codes), named.vectors, atol=1e-6)


def test_gradients_pass_straight_through_and_the_loss_draws_latents_to_their_entries():
    codebooks = begun().eval()
    latents, weight = drawn(2, D, 7, seed=1).requires_grad_(), drawn(2, D, 7, seed=2)
    (codebooks(latents).vectors * weight).sum().backward()
    assert torch.equal(latents.grad, weight)
    latents.grad = None
    named = codebooks(latents)
    named.loss.backward()
    totals = [codebooks.from_codes(named.codes[:, : k + 1]) for k in range(K)]
    pull = sum(2 * (latents.detach() - total) / latents.numel() / K for total in totals)
    assert torch.allclose(latents.grad, pull, atol=1e-6)
    assert not list(codebooks.parameters())


def test_the_first_batch_begins_them():
    """Clusters that are there are found, and each codebook leaves less than the one before."""
    torch.manual_seed(0)
    corners = 5 * drawn(V, D, seed=3)
    latents = corners[torch.arange(64) % V].T[None] + 0.01 * drawn(1, D, 64)
    codebooks = ResidualCodebooks(D, K, V)
    assert not codebooks.started
    named = codebooks(latents)
    assert codebooks.started
    assert torch.cdist(corners, codebooks.entries[0]).amin(1).max() < 0.05
    assert named.perplexity > 0.8 * V
    left = [(latents - codebooks.from_codes(named.codes[:, :k])).norm() for k in range(1, K + 1)]
    assert left == sorted(left, reverse=True)


def test_fewer_vectors_than_entries_begin_them_too():
    codebooks = ResidualCodebooks(D, K, V)
    latents = drawn(1, D, 3)
    assert torch.allclose(codebooks(latents).vectors, latents, atol=1e-3)
    assert codebooks.entries.isfinite().all()


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_entries_are_moving_averages_of_what_they_name(decay):
    """By hand: the sums and numbers of the vectors of a batch, smoothed; without memory the mean of the batch itself."""
    codebooks = begun(decay=decay, revive_below=0.0)
    before = buffers(codebooks)
    latents = drawn(6, D, 20, seed=5)
    named = codebooks(latents)
    asked = [(latents - codebooks.from_codes(named.codes[:, :k])).transpose(1, 2) for k in range(1, K)]
    asked = [latents.transpose(1, 2), *asked]
    assert all(torch.equal(tensor, before[name]) for name, tensor in codebooks.named_buffers())
    codebooks.follow()
    for k in range(K):
        vectors, codes = asked[k].flatten(0, 1), named.codes[:, k].flatten()
        for v in range(V):
            mine = vectors[codes == v]
            number = decay * before["named"][k, v] + (1 - decay) * len(mine)
            total = decay * before["sums"][k, v] + (1 - decay) * mine.sum(0)
            assert codebooks.named[k, v] == pytest.approx(float(number), rel=1e-5)
            if number > 0:
                assert torch.allclose(codebooks.entries[k, v], total / number, atol=1e-4)


def test_what_is_learnt_lies_ever_nearer():
    codebooks = begun(decay=0.9)
    losses = [float(codebooks(drawn(6, D, 20, seed=seed)).loss) for seed in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_evaluation_moves_nothing():
    codebooks = begun(dropout=1.0).eval()
    before = buffers(codebooks)
    named = codebooks(drawn(6, D, 20, seed=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in codebooks.named_buffers())
    assert torch.allclose(named.vectors, codebooks.from_codes(named.codes), atol=1e-6)
    fresh = ResidualCodebooks(D, K, V).eval()
    fresh(drawn(1, D, 5))
    assert not fresh.started


@pytest.mark.parametrize("revive_below", [0.1, 0.0])
def test_an_entry_that_names_nothing_moves_into_the_batch(revive_below):
    codebooks = begun(decay=0.5, revive_below=revive_below)
    codebooks.entries[0, 2], codebooks.sums[0, 2], codebooks.named[0, 2] = 100.0, 0.1, 1e-3
    latents = drawn(6, D, 20, seed=1)
    codebooks(latents)
    codebooks.follow()
    distance = torch.cdist(codebooks.entries[0, 2][None], latents.transpose(1, 2).reshape(-1, D)).min()
    assert (distance < 1e-4) == (revive_below > 0)
    if revive_below:
        assert codebooks.named[0, 2] > 0.7 * codebooks.named[0].mean()  # it gets its chance


def test_with_dropout_some_rows_end_early():
    codebooks = begun(dropout=0.5)
    latents = drawn(300, D, 4, seed=1)
    before = codebooks.entries
    named = codebooks(latents)
    met = Counter()
    for row in range(300):
        totals = [sum(before[k][named.codes[row, k]] for k in range(n)).T for n in range(1, K + 1)]
        met[next(n for n, total in enumerate(totals, 1) if torch.allclose(total, named.vectors[row], atol=1e-5))] += 1
    assert [met[n] / 300 for n in range(1, K)] == pytest.approx([0.5 / K] * (K - 1), abs=0.07)
    assert met[K] / 300 == pytest.approx(0.5 + 0.5 / K, abs=0.1)


def test_halves_of_a_batch_in_two_processes_are_the_batch_in_one(forked, tmp_path):
    """They begin alike, follow all vectors, and revive the same entries in the same places."""
    assert forked(_share, [(rank, str(tmp_path)) for rank in range(2)]) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = begun(revive_below=0.0)
    alone.load_state_dict(torch.load(tmp_path / "begun.pt", weights_only=True))
    alone(drawn(8, D, 20, seed=7))
    alone.follow()
    assert all(torch.allclose(tensor, one[name], atol=1e-5) for name, tensor in alone.named_buffers())


def _share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    codebooks = ResidualCodebooks(D, K, V, decay=0.5, revive_below=0.5, dropout=0.5)
    for seed in range(4):
        if (seed, rank) not in ((0, 0), (2, 0)):  # a batch that could not be read: one calls the module less often
            codebooks(drawn(6, D, 20, seed=10 * seed + rank))
        codebooks.follow()
    codebooks.decay, codebooks.revive_below, codebooks.dropout = 0.99, 0.0, 0.0
    if rank == 0:
        torch.save(codebooks.state_dict(), f"{folder}/begun.pt")
    codebooks(drawn(8, D, 20, seed=7).chunk(2)[rank])
    codebooks.follow()
    torch.save(codebooks.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_what_is_no_number_is_not_followed():
    """Neither as the first that is met nor later, nor where nothing else is met; what stands beside it counts."""
    latents, lost = drawn(6, D, 20), drawn(6, D, 20)
    lost[0, 1, 3:] = math.nan
    lost[2, 0, 0] = math.inf
    kept = lost.isfinite().all(1)
    torch.manual_seed(0)
    codebooks = ResidualCodebooks(D, K, V, decay=0.0, revive_below=0.0)
    codebooks(torch.full((1, D, 5), math.nan))
    assert not codebooks.started
    codebooks(lost)
    assert codebooks.started
    for given in (lost, torch.full((1, D, 5), math.nan), latents, lost):
        named = codebooks(given)
        codebooks.follow()
        assert codebooks.entries.isfinite().all()
        assert codebooks.sums.isfinite().all()
    assert torch.equal(codebooks.named[0], torch.bincount(named.codes[:, 0][kept], minlength=V).float())


@pytest.mark.parametrize("wrong", [{"latent_dim": 0}, {"num_codebooks": 0}, {"codebook_size": 0}])
def test_no_size_is_nothing(wrong):
    with pytest.raises(InputError, match=f"tokenizer.{next(iter(wrong))} is 0; give 1 or more"):
        ResidualCodebooks(*({"latent_dim": D, "num_codebooks": K, "codebook_size": V} | wrong).values())


def test_autocast_changes_nothing():
    codebooks, latents = begun().eval(), drawn(2, D, 7, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        named = codebooks(latents)
    assert torch.equal(named.codes, codebooks(latents).codes)
    assert named.vectors.dtype == torch.float32
