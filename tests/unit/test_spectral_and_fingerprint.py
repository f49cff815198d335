"""Spectral normalisation against the singular values themselves; fingerprints against every single change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_gan.models.dcgan import DCGANNetworks, Discriminator
from dist_gan.models.spectral import SpectralConv2d, SpectralLinear, begin_spectral, spectral_weights
from dist_gan.runtime.batchnorm import CrossRankBatchNorm, synchronise_batchnorm
from dist_gan.runtime.fingerprint import fingerprint


def test_after_enough_iterations_the_weight_has_norm_one() -> None:
    torch.manual_seed(0)
    layer = SpectralConv2d(3, 8, 4, 2, 1).double()
    layer.begin()
    for _ in range(200):
        layer.iterate(layer.weight)
    values = torch.linalg.svdvals(layer.normed_weight().detach().flatten(1))
    assert float(values[0]) == pytest.approx(1.0, abs=1e-10)
    true = torch.linalg.svdvals(layer.weight.detach().flatten(1))
    assert torch.allclose(values, true / true[0], atol=1e-10)


def test_the_derivative_goes_through_the_norm_too() -> None:
    torch.manual_seed(1)
    layer = SpectralLinear(5, 4).double()
    layer.begin()
    inputs = torch.randn(3, 5, dtype=torch.float64)

    def output(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, inputs)

    assert torch.autograd.gradcheck(output, layer.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradgradcheck(output, layer.weight.detach().clone().requires_grad_())


def test_a_forward_pass_moves_no_vector_and_an_iteration_does() -> None:
    torch.manual_seed(2)
    network = Discriminator(DCGANNetworks(resolution=16, d_width=4, d_norm="spectral", classes=3))
    names = spectral_weights(network)
    assert set(names) == {n for n, p in network.named_parameters() if p.dim() > 1}
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    network(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert all(torch.equal(b, buffers[n]) for n, b in network.named_buffers())
    for name, layer in names.items():
        layer.iterate(torch.randn_like(network.get_parameter(name)))
    assert not any(torch.equal(b, buffers[n]) for n, b in network.named_buffers() if b.numel() > 1)


def test_the_scale_of_a_normalised_weight_does_not_matter() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(SpectralConv2d(3, 4, 4, 2, 1), nn.Flatten(), SpectralLinear(64, 1)).double()
    begin_spectral(network)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = network(images)
    with torch.no_grad():
        network[0].weight.mul_(7.0)
    assert torch.allclose(network(images), before, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 67),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    data=st.data(),
)
def test_every_flipped_bit_changes_the_fingerprint(size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    torch.manual_seed(size)
    tensor = (torch.rand(size) * 4).to(dtype)
    before = int(fingerprint(tensor))
    assert int(fingerprint(tensor.clone())) == before
    changed = tensor.clone()
    raw = changed.view(torch.uint8)
    place, bit = data.draw(st.integers(0, raw.numel() - 1)), data.draw(st.integers(0, 7))
    raw[place] ^= 1 << bit
    assert int(fingerprint(changed)) != before


def test_fingerprints_see_places_lengths_and_views() -> None:
    tensor = torch.arange(24, dtype=torch.float32)
    assert int(fingerprint(tensor)) != int(fingerprint(tensor.flip(0)))
    assert int(fingerprint(torch.zeros(4))) != int(fingerprint(torch.zeros(5)))
    assert int(fingerprint(tensor.view(4, 6).t())) == int(fingerprint(tensor.view(4, 6).t().contiguous()))
    assert int(fingerprint(tensor[1:])) == int(fingerprint(tensor[1:].clone()))
    assert int(fingerprint(torch.tensor(3.0))) == int(fingerprint(torch.tensor(3.0)))
    big = torch.randn(2**23 + 3)
    assert int(fingerprint(big)) == int(fingerprint(big.clone()))
    big[-1] += 1
    assert int(fingerprint(big)) != int(fingerprint(torch.cat([big[:-1], big[-1:] - 1])))


def test_batch_norm_of_one_process_is_torchs_own_and_keeps_names() -> None:
    torch.manual_seed(4)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    names = [n for n, _ in network.named_parameters()] + [n for n, _ in network.named_buffers()]
    images = torch.randn(5, 3, 6, 6)
    import copy

    expected = copy.deepcopy(network)(images)
    joined = synchronise_batchnorm(network)
    assert sum(isinstance(m, CrossRankBatchNorm) for m in joined.modules()) == 2
    assert [n for n, _ in joined.named_parameters()] + [n for n, _ in joined.named_buffers()] == names
    assert torch.equal(joined(images), expected)
