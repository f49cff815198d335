"""Networks: sizes derived by hand, Keras' semantics rebuilt in numpy, and what initialisation promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_gan import models
from dist_gan.config import ArticleNetworks, DCGANNetworks, MLPNetworks
from dist_gan.models import article, build_networks, count_parameters, dcgan, mlp

Z = 100


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks here are small, and threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def latents(batch: int, dim: int = Z, *, seed: int = 0) -> Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed))


def images(batch: int, channels: int, side: int, *, seed: int = 0) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- the article's pair -----------------------------------------------------------------------------------------------

# Keras' counts, layer by layer from the article's code. A Dense(n) on m inputs has m n + n numbers; a convolution of
# 4x4 from m to n channels 16 m n + n; BatchNormalization(n) learns 2 n (gamma, beta).
ARTICLE_G_DENSE = (
    100 * 256 + 256  # Dense(256, input_dim=z_dim)
    + 2 * 256
    + 256 * 512 + 512  # Dense(512)
    + 2 * 512
    + 512 * 1024 + 1024  # Dense(1024)
    + 2 * 1024
    + 1024 * 8192 + 8192  # Dense(4 * 4 * 512, activation='relu')
)  # fmt: skip
ARTICLE_G_32 = ARTICLE_G_DENSE + (
    16 * 512 * 256 + 256 + 2 * 256  # Conv2DTranspose(256, strides=(1, 1)), BatchNormalization
    + 16 * 256 * 128 + 128 + 2 * 128  # Conv2DTranspose(128, strides=(2, 2)), BatchNormalization
    + 16 * 128 * 64 + 64 + 2 * 64  # Conv2DTranspose(64, strides=(2, 2)), BatchNormalization
    + 16 * 64 * 3 + 3  # Conv2DTranspose(3, strides=(2, 2), activation='tanh')
)  # fmt: skip
ARTICLE_G_64 = ARTICLE_G_32 - (16 * 64 * 3 + 3) + (16 * 64 * 32 + 32 + 2 * 32) + (16 * 32 * 3 + 3)
ARTICLE_D_CONV = (16 * 3 * 64 + 64) + (16 * 64 * 128 + 128)
ARTICLE_D_32 = ARTICLE_D_CONV + 8 * 8 * 128 + 1  # Flatten of 8x8x128, Dense(1)
ARTICLE_D_64 = ARTICLE_D_CONV + 16 * 16 * 128 + 1


@pytest.mark.parametrize(
    ("resolution", "in_generator", "in_discriminator"),
    [(32, ARTICLE_G_32, ARTICLE_D_32), (64, ARTICLE_G_64, ARTICLE_D_64)],
)
def test_the_articles_pair_has_the_numbers_of_its_keras_code(
    resolution: int, in_generator: int, in_discriminator: int
) -> None:
    assert count_parameters(article.Generator(ArticleNetworks(resolution=resolution))) == in_generator
    assert count_parameters(article.Discriminator(ArticleNetworks(resolution=resolution))) == in_discriminator


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [32, 64])
def test_the_articles_pair_makes_and_reads_pictures_of_the_side_asked_for(resolution: int, channels: int) -> None:
    torch.manual_seed(0)
    G = article.Generator(ArticleNetworks(resolution=resolution, channels=channels))
    D = article.Discriminator(ArticleNetworks(resolution=resolution, channels=channels))
    made = G(latents(4))
    assert made.shape == (4, channels, resolution, resolution)
    assert made.abs().max().item() <= 1.0
    assert made.std().item() > 0.05
    assert D(made).shape == (4,)


def test_the_articles_layers_stand_in_the_order_of_its_code() -> None:
    G, D = article.Generator(ArticleNetworks()), article.Discriminator(ArticleNetworks())
    names = [type(m).__name__ for m in G.modules() if not list(m.children())][1:]  # after the label
    dense = ["Linear", "LeakyReLU", "BatchNorm1d"]
    stage = ["ConvTranspose2d", "ReLU", "BatchNorm2d"]
    assert names == [*dense * 3, "Linear", "ReLU", *stage * 3, "ConvTranspose2d", "Tanh"]
    names = [type(m).__name__ for m in D.modules() if not list(m.children())]
    assert names == [*["Conv2d", "LeakyReLU", "Dropout"] * 2, "Flatten", "Linear"]


def test_the_articles_layers_have_the_numbers_of_its_code() -> None:
    G, D = article.Generator(ArticleNetworks()), article.Discriminator(ArticleNetworks())
    strides = [m.stride for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert strides == [(1, 1), (2, 2), (2, 2), (2, 2)]
    assert all(m.negative_slope == 0.2 for n in (G, D) for m in n.modules() if isinstance(m, nn.LeakyReLU))
    assert all(m.p == 0.3 for m in D.modules() if isinstance(m, nn.Dropout))
    norms = [m for m in G.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 6
    # Keras keeps 0.8 of the old mean, torch names the share of the new one; 1e-3 is Keras' default epsilon.
    assert all(m.momentum == pytest.approx(0.2) and m.eps == 1e-3 for m in norms)
    G.train()
    before = norms[0].running_mean.clone()
    G(latents(8))
    inputs = nn.functional.leaky_relu(G.dense[0](latents(8)), 0.2).mean(0)
    assert torch.allclose(norms[0].running_mean, 0.8 * before + 0.2 * inputs, atol=1e-6)


def keras_transposed(x_BCHW: np.ndarray, kernel: np.ndarray, bias: np.ndarray, *, stride: int) -> np.ndarray:
    """Conv2DTranspose(padding='same') as the adjoint of Conv2D(padding='same'), scattered entry by entry.

    TensorFlow's "same": the forward convolution from side s*n to n pads max((n - 1) s + k - s n, 0) zeros, the odd one
    at the end. `kernel` is (in, out, 4, 4).
    """
    batch, channels, side, _ = x_BCHW.shape
    size, big = kernel.shape[2], side * stride
    pad = max((side - 1) * stride + size - big, 0) // 2
    out = np.zeros((batch, kernel.shape[1], big, big))
    for i in range(side):
        for j in range(side):
            for di in range(size):
                for dj in range(size):
                    row, column = i * stride + di - pad, j * stride + dj - pad
                    if 0 <= row < big and 0 <= column < big:
                        out[:, :, row, column] += x_BCHW[:, :, i, j] @ kernel[:, :, di, dj]
    assert channels == kernel.shape[0]
    return out + bias[None, :, None, None]


@pytest.mark.parametrize("side", [1, 2, 4, 5])
def test_a_transposed_convolution_of_stride_1_keeps_the_side_as_keras_does(side: int) -> None:
    torch.manual_seed(1)
    layer = article.SameTransposed(3, 2).double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    expected = keras_transposed(
        x.numpy(), layer.conv.weight.detach().numpy(), layer.conv.bias.detach().numpy(), stride=1
    )
    assert np.allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def test_the_stride_2_stages_pad_as_keras_does() -> None:
    layer = [m for m in article.Generator(ArticleNetworks()).double().modules() if isinstance(m, nn.ConvTranspose2d)][
        -1
    ]
    x = torch.randn(1, 64, 3, 3, dtype=torch.float64)
    expected = keras_transposed(x.numpy(), layer.weight.detach().numpy(), layer.bias.detach().numpy(), stride=2)
    assert np.allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def test_the_discriminators_convolutions_pad_as_keras_does() -> None:
    """Conv2D 'same', 4x4, stride 2, even side: one zero on each side."""
    layer = next(m for m in article.Discriminator(ArticleNetworks()).double().modules() if isinstance(m, nn.Conv2d))
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = np.array(
        [[(padded[0, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] * weight).sum((1, 2, 3)) + bias for j in range(4)]
         for i in range(4)]
    ).transpose(2, 0, 1)  # fmt: skip
    assert np.allclose(layer(torch.from_numpy(x)).detach().numpy()[0], expected, atol=1e-12)


def test_the_articles_weights_start_as_glorot_uniform_and_biases_at_zero() -> None:
    nets = build_networks(ArticleNetworks(), seed=3)
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.Linear):
                fan_in, fan_out = module.in_features, module.out_features
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_in, fan_out = 16 * module.in_channels, 16 * module.out_channels
            else:
                continue
            limit = math.sqrt(6 / (fan_in + fan_out))
            weight = module.weight.detach()
            assert float(weight.abs().max()) <= limit
            assert float(weight.abs().max()) > 0.98 * limit
            assert float(weight.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
            assert module.bias is not None
            assert (module.bias == 0).all()


def test_dropout_works_in_training_only_and_its_share_is_a_setting() -> None:
    D = build_networks(ArticleNetworks(), seed=0).discriminator
    x = images(4, 3, 32)
    D.train()
    assert not torch.equal(D(x), D(x))
    D.eval()
    assert torch.equal(D(x), D(x))
    without = build_networks(ArticleNetworks(dropout=0), seed=0).discriminator.train()
    assert torch.equal(without(x), without(x))


# -- DCGAN ------------------------------------------------------------------------------------------------------------

# PyTorch's DCGAN example, width 64, latent 100, 64x64 in colour: no biases at all; 3,576,704 and 2,765,568 numbers.
EXAMPLE_G = (
    16 * 100 * 512 + 2 * 512
    + 16 * 512 * 256 + 2 * 256
    + 16 * 256 * 128 + 2 * 128
    + 16 * 128 * 64 + 2 * 64
    + 16 * 64 * 3
)  # fmt: skip
EXAMPLE_D = (
    16 * 3 * 64
    + 16 * 64 * 128 + 2 * 128
    + 16 * 128 * 256 + 2 * 256
    + 16 * 256 * 512 + 2 * 512
    + 16 * 512 * 1
)  # fmt: skip


def test_dcgan_at_64_is_the_known_network_with_biases_where_no_norm_takes_them_away() -> None:
    assert (EXAMPLE_G, EXAMPLE_D) == (3_576_704, 2_765_568)
    assert count_parameters(dcgan.Generator(DCGANNetworks(resolution=64))) == EXAMPLE_G + 3  # bias of the output
    assert (
        count_parameters(dcgan.Discriminator(DCGANNetworks(resolution=64))) == EXAMPLE_D + 64 + 1
    )  # first layer, last logit


def test_without_norm_every_layer_has_a_bias_and_no_norm_its_numbers() -> None:
    norms_g, norms_d = 2 * (512 + 256 + 128 + 64), 2 * (128 + 256 + 512)
    in_generator = EXAMPLE_G - norms_g + (512 + 256 + 128 + 64 + 3)
    in_discriminator = EXAMPLE_D - norms_d + (64 + 128 + 256 + 512 + 1)
    assert count_parameters(dcgan.Generator(DCGANNetworks(resolution=64, g_norm="none"))) == in_generator
    assert count_parameters(dcgan.Discriminator(DCGANNetworks(resolution=64, d_norm="none"))) == in_discriminator


def test_options_add_exactly_their_numbers() -> None:
    def numbers(network: type[dcgan.Generator | dcgan.Discriminator], **options: Any) -> int:
        section = DCGANNetworks(resolution=64, g_norm="none", d_norm="none")
        options_set = section.model_copy(update=options)
        return count_parameters(network(options_set)) - count_parameters(network(section))

    extra = (100 * 128 + 128) + (128 * 128 + 128) + 16 * (128 - 100) * 512
    assert numbers(dcgan.Generator, g_mapping=2) == extra
    assert numbers(dcgan.Discriminator, d_stddev=4) == 16
    assert numbers(dcgan.Generator, classes=10) == 10 * 100 + 16 * 100 * 512
    assert numbers(dcgan.Discriminator, classes=10) == 10 * 512 * 16


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256])
def test_dcgan_makes_and_reads_every_side(resolution: int, norm: Any, channels: int) -> None:
    section = DCGANNetworks(
        resolution=resolution,
        channels=channels,
        g_width=4,
        d_width=4,
        g_norm=norm,
        d_norm=norm,
        g_mapping=1,
        d_stddev=2,
    )  # type: ignore[arg-type]
    G, D = build_networks(section, seed=0)
    made = G(latents(4))
    assert made.shape == (4, channels, resolution, resolution)
    assert made.abs().max().item() <= 1.0
    logits = D(made)
    assert logits.shape == (4,)
    assert torch.isfinite(logits).all()
    stages = int(math.log2(resolution)) - 2
    widths = [m.out_channels for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [4 * min(2**i, 8) for i in range(stages)]
    assert [m.out_channels for m in G.modules() if isinstance(m, nn.ConvTranspose2d)] == [*widths[::-1], channels]


def test_the_first_stage_is_the_transposed_convolution_that_it_stands_for() -> None:
    layer = dcgan.GrowFromPoint(7, 5, bias=True).double()
    x = torch.randn(3, 7, 1, 1, dtype=torch.float64, requires_grad=True)
    plain = nn.functional.conv_transpose2d(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), plain, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(plain.square().sum(), [x, *layer.parameters()])
    for a, b in zip(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]), wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_dcgan_has_no_norm_at_the_generators_output_and_the_discriminators_input() -> None:
    names = [type(m).__name__ for m in dcgan.Generator(DCGANNetworks(resolution=32)).stages]
    later = ["BatchNorm2d", "ReLU", "ConvTranspose2d"]
    assert names == ["GrowFromPoint", *later * 3, "Tanh"]
    names = [type(m).__name__ for m in dcgan.Discriminator(DCGANNetworks(resolution=32)).stages]
    assert names == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2, "Flatten"]


def weights_of(net: nn.Module, *kinds: type[nn.Module]) -> list[Tensor]:
    return [m.weight.detach() for m in net.modules() if isinstance(m, kinds)]  # type: ignore[arg-type]


def test_with_batch_norm_weights_start_as_in_the_paper() -> None:
    for net in build_networks(DCGANNetworks(resolution=64, d_stddev=4), seed=1):
        for weight in weights_of(net, nn.Conv2d, nn.ConvTranspose2d, nn.Linear):
            spread = 0.02 * 4.5 / math.sqrt(2 * weight.numel())
            assert float(weight.std()) == pytest.approx(0.02, abs=spread)
            assert abs(float(weight.mean())) < 4.5 * 0.02 / math.sqrt(weight.numel())
        gains = torch.cat(weights_of(net, nn.BatchNorm2d))
        assert float(gains.mean()) == pytest.approx(1.0, abs=0.005)
        assert float(gains.std()) == pytest.approx(0.02, rel=0.1)
        biases = [m.bias for m in net.modules() if getattr(m, "bias", None) is not None]
        assert biases
        assert all((b == 0).all() for b in biases)


def variances(net: nn.Module, *arguments: Tensor) -> list[float]:
    """Mean square of the input of every convolution and dense layer, in order; the last is that of the output."""
    found: list[float] = []
    handles = [
        m.register_forward_pre_hook(lambda _m, x: found.append(float(x[0].detach().square().mean())))
        for m in net.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    out = net(*arguments)
    for handle in handles:
        handle.remove()
    return [*found, float(out.detach().square().mean())]


@pytest.mark.parametrize("mapping", [0, 4])
def test_without_norm_he_weights_keep_the_activations_strength_through_the_depth(mapping: int) -> None:
    section = DCGANNetworks(resolution=128, g_width=16, d_width=16, g_norm="none", d_norm="none", g_mapping=mapping)
    G, D = build_networks(section, seed=5)
    inside_g = variances(G, latents(64))[:-1]  # the output has passed tanh
    # Border pixels of a stage see fewer taps: each costs a little strength, six stages some more.
    assert all(0.25 < v < 4 for v in inside_g), inside_g
    noise = torch.randn(16, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    inside_d = variances(D, noise)[:-1]  # one logit is no statistic
    assert all(0.25 < v < 4 for v in inside_d), inside_d


def test_he_weights_have_the_spread_of_their_fan_in() -> None:
    G, D = build_networks(DCGANNetworks(resolution=64, g_norm="none", d_norm="none", g_mapping=1), seed=2)
    gain = math.sqrt(2 / (1 + 0.2**2))
    fans = [128, 512 * 4, 256 * 4, 128 * 4, 64 * 4]  # 16 taps over a stride of 2x2; from a point, one tap
    for weight, fan in zip(weights_of(G, nn.ConvTranspose2d), fans, strict=True):
        assert float(weight.std()) == pytest.approx(gain / math.sqrt(fan), rel=0.04)
    (dense,) = weights_of(G, nn.Linear)
    assert float(dense.std()) == pytest.approx(gain / math.sqrt(100), rel=0.04)
    for weight, fan in zip(weights_of(D, nn.Conv2d), [16 * 3, 16 * 64, 16 * 128, 16 * 256], strict=True):
        assert float(weight.std()) == pytest.approx(gain / math.sqrt(fan), rel=0.04)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_smooth_stages_start_as_bilinear_enlargements_mixed_at_random(norm: str) -> None:
    section = DCGANNetworks(resolution=64, g_width=32, d_width=8, g_norm=norm, g_smooth=True)  # type: ignore[arg-type]
    G = build_networks(section, seed=2).generator
    stages = [m for m in G.modules() if isinstance(m, nn.ConvTranspose2d) and m.stride == (2, 2)]
    assert [m.in_channels for m in stages] == [256, 128, 64, 32]
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    bilinear = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    inside = (..., slice(1, -1), slice(1, -1))  # at the border one pads zeros, the other the edge
    for stage in stages:
        kernels = stage.weight.detach()
        strengths = kernels[0].sum(dim=(1, 2)) / 4  # four of the sixteen taps meet at each pixel
        made = nn.functional.conv_transpose2d(x, kernels[:1], stride=2, padding=1)
        assert torch.allclose(made[inside], (strengths[:, None, None] * bilinear)[inside], atol=1e-6)
        if stage is not stages[-1]:
            spread = float((kernels.sum(dim=(2, 3)) / 4).std())
            assert spread == pytest.approx(math.sqrt(2 / 1.04 / stage.in_channels), rel=0.04)


@pytest.mark.parametrize("mapping", [2, 8])
def test_with_batch_norm_the_picture_depends_on_the_latent_whatever_the_depth_of_the_mapping(mapping: int) -> None:
    section = DCGANNetworks(g_width=16, d_width=8, g_norm="batch", g_mapping=mapping)
    G = build_networks(section, seed=0).generator
    made, plain = (
        G(latents(64)),
        build_networks(section.model_copy(update={"g_mapping": 0}), seed=0).generator(latents(64)),
    )
    assert made.std(dim=0).mean().item() > 0.1 * plain.std(dim=0).mean().item()


def test_minibatch_standard_deviation_is_the_mean_spread_of_its_group_on_one_more_channel() -> None:
    layer = dcgan.MinibatchStdDev(2)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = layer(x)
    assert out.shape == (6, 4, 4, 4)
    assert torch.equal(out[:, :3], x)
    for i in range(3):  # a group is every third image: 0 and 3, 1 and 4, 2 and 5
        spread = np.std(x[[i, i + 3]].numpy(), axis=0).mean(axis=0)
        assert np.allclose(out[i, 3].numpy(), spread, atol=1e-6)
        assert np.allclose(out[i + 3, 3].numpy(), spread, atol=1e-6)


@pytest.mark.parametrize(("batch", "group"), [(1, 8), (5, 4), (7, 8), (12, 8), (8, 8)])
def test_minibatch_standard_deviation_takes_any_batch_and_its_gradient_is_finite(batch: int, group: int) -> None:
    x = images(batch, 2, 4).requires_grad_()
    dcgan.MinibatchStdDev(group)(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    same = torch.ones(4, 2, 4, 4, requires_grad=True)
    dcgan.MinibatchStdDev(4)(same).sum().backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


# -- points -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "width"), [(1, 8), (3, 128)])
def test_the_perceptrons_have_the_numbers_of_their_layers(depth: int, width: int) -> None:
    hidden = (depth - 1) * (width * width + width)
    G, D = (
        mlp.Generator(MLPNetworks(width=width, depth=depth)),
        mlp.Discriminator(MLPNetworks(width=width, depth=depth)),
    )
    assert count_parameters(G) == (16 * width + width) + hidden + (width * 2 + 2)
    assert count_parameters(D) == (2 * width + width) + hidden + (width + 1)
    points = G(latents(5, 16))
    assert points.shape == (5, 2)
    assert D(points).shape == (5,)


# -- all families -----------------------------------------------------------------------------------------------------

FAMILIES = {kind: family.settings(classes=5) for kind, family in models.FAMILIES.items() if kind != "own"} | {
    "article": ArticleNetworks(classes=5, dropout=0),
    "dcgan": DCGANNetworks(classes=5, g_width=8, d_width=8, g_norm="none", d_norm="none", g_mapping=1, d_stddev=2),
    "dcgan smooth": DCGANNetworks(classes=5, g_width=8, d_width=8, g_norm="none", d_norm="none", g_smooth=True),
}


def real_ones(name: str, batch: int) -> Tensor:
    section = FAMILIES[name]
    if models.FAMILIES[section.kind].makes == "points":
        return latents(batch, 2)
    return images(batch, section.channels, section.resolution)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conditional_pair_needs_labels_and_depends_on_them(name: str) -> None:
    section = FAMILIES[name]
    G, D = (net.eval() for net in build_networks(section, seed=1))
    z, x = latents(5, section.latent_dim), real_ones(name, 5)
    for call in (lambda: G(z), lambda: G(z, None), lambda: D(x), lambda: D(x, None)):
        with pytest.raises(ValueError, match="labels"):
            call()
    a, b = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 2, 3, 4])
    for net, data in ((G, z), (D, x)):
        first, second = net(data, a), net(data, b)
        assert torch.allclose(first[0], second[0], atol=1e-6), "an image depends on another image's label"
        assert all(not torch.allclose(first[i], second[i], atol=1e-4) for i in range(1, 5))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unconditional_pair_ignores_labels(name: str) -> None:
    section = FAMILIES[name].model_copy(update={"classes": 0})
    G, D = (net.eval() for net in build_networks(section, seed=1))
    z, x, labels = latents(5, section.latent_dim), real_ones(name, 5), torch.arange(5)
    assert torch.equal(G(z), G(z, labels))
    assert torch.equal(D(x), D(x, labels))


def test_the_projection_adds_the_class_product_over_the_root_of_the_features() -> None:
    D = build_networks(MLPNetworks(classes=5), seed=1).discriminator
    x, labels = latents(6, 2), torch.tensor([0, 1, 2, 3, 4, 0])
    h = D.hidden(x)
    expected = h @ D.head.linear.weight[0] + D.head.linear.bias
    expected = expected + (D.head.embedding.weight[labels] * h).sum(1) / math.sqrt(128)
    assert torch.allclose(D(x, labels), expected, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_a_function_of_the_seed_and_the_global_generator_stays(name: str) -> None:
    section = FAMILIES[name]
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first = build_networks(section, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.randn(7)
    again, other = build_networks(section, seed=1), build_networks(section, seed=2)
    for a, b, c in zip(first, again, other, strict=True):
        states = [net.state_dict() for net in (a, b, c)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_takes_part(name: str) -> None:
    """One that never gets a gradient would make DDP wait for it."""
    G, D = build_networks(FAMILIES[name], seed=1)
    labels = torch.arange(5)
    D(G(latents(5, FAMILIES[name].latent_dim), labels), labels).sum().backward()
    idle = [key for net in (G, D) for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle
