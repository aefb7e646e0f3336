"""Lets a seeded denoiser do the one thing without which sampling is meaningless: find the noise in its input.

A trained net's output is mostly the noise that it was shown; what it adds is the picture. A random net's output has
nothing to do with its input, so its "pictures" are the noise they began with, or grow without bound. Here a few
entries of the first and last layers are set so that the input reaches the output once, while everything between them
stays random. No layer is added, none is skipped, and no LoRA target is touched.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def through_tokens(first: torch.nn.Linear, last: torch.nn.Linear, even: torch.Tensor, share: float,
                   sizes: tuple[float, float], then: torch.Tensor | None = None) -> None:
    """Makes `last` undo `first`, for a transformer whose stream carries the embedded patch to its end.

    Args:
        first: patch (P values) → stream (D). Its weight becomes orthogonal and small, so that what the layers see is
            mostly place and text: their answer is then smooth rather than a function of the noise.
        last: stream (D) → patch (P); becomes share · (inverse of first).
        even: (n, P) directions in a patch along which all its cells change together. They enter at `sizes[0]`, the
            rest at `sizes[1]`; the inverse weighs what the layers add by 1 / size, so that the picture is made of
            even patches.
        then: (m, P) directions that come second: when D < P, only D directions can be carried.
    """
    others = () if then is None else (then.double(),)
    basis = torch.linalg.qr(torch.cat((even.double(), *others, first.weight.double())).T).Q.T[: first.out_features]
    size = torch.full((basis.shape[0], 1), sizes[1], dtype=torch.float64)
    size[: even.shape[0]] = sizes[0]
    into = torch.linalg.qr(first.weight.double()).Q  # (D, min(D, P)), orthonormal columns, random
    if first.out_features < first.in_features:
        into = into[:, : basis.shape[0]]
    first.weight.copy_(into @ (size * basis))
    if first.out_features > first.in_features and first.bias is not None:
        # What is the same in every patch stays out of the way of the patches: else it would tint the whole picture.
        first.bias.copy_(first.bias.double() - into @ (into.T @ first.bias.double()))
    last.weight.copy_(share * ((basis.T / size.T) @ into.T))


@torch.no_grad()
def through_unet(unet: torch.nn.Module, channels: int, texture: float) -> None:
    """Carries the input over the outermost skip connection of a UNet, from its first convolution to its last.

    Each latent channel travels twice, once with each sign, because the last activation then keeps it whole:
    silu(u) − silu(−u) = u. The group norm before it gives the noise unit size, which is what the net must return.

    Args:
        unet: with `input_blocks`, `output_blocks` and `out`, and as many norm groups as base channels, so that
            the norm keeps the channels apart. channels: of the latent. texture: size of all the rest.
    """
    pairs = 2 * channels
    first, last_block = unet.input_blocks[0][0], unet.output_blocks[-1]
    norm, last = unet.out[0], unet.out[2]
    if norm.num_groups != norm.num_channels:
        raise ValueError(f"{norm.num_groups} groups for {norm.num_channels} channels: they must be equal")
    sign = torch.cat((torch.eye(channels), -torch.eye(channels))).to(first.weight)
    middle = first.kernel_size[0] // 2

    first.weight[:pairs] = 0.0
    first.weight[:pairs, :, middle, middle] = sign
    first.bias[:pairs] = 0.0

    resblock = last_block[0]
    shortcut, inside = resblock.skip_connection, resblock.out_layers[3]
    skipped = shortcut.in_channels - first.out_channels  # the skip connection's channels stand behind the stream's
    # What comes over this skip is nearly pure noise: all that is not the path listens to the deeper layers instead.
    shortcut.weight[:, skipped:] *= 0.2
    resblock.in_layers[2].weight[:, skipped:] *= 0.2
    shortcut.weight[:pairs] = 0.0
    shortcut.weight[torch.arange(pairs), skipped + torch.arange(pairs)] = 1.0
    shortcut.bias[:pairs] = 0.0
    for layer in (inside, *(block.proj_out for block in last_block[1:])):
        layer.weight[:pairs] = 0.0
        layer.bias[:pairs] = 0.0

    norm.weight[:pairs], norm.bias[:pairs] = 1.0, 0.0
    last.weight[:, :pairs] = 0.0
    rest = last.weight[:, pairs:]
    rest -= rest.mean(dim=(1, 2, 3), keepdim=True)  # else the activation's positive mean would tint the picture
    rest *= texture
    last.bias.zero_()
    last.weight[:, :pairs, middle, middle] = sign.T
