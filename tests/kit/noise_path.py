"""Lets a seeded denoiser do the one thing without which sampling is meaningless: find the noise in its input.

A trained net's output is mostly the noise that it was shown; what it adds is the picture. A random net's output has
nothing to do with its input, so its "pictures" are the noise they began with, or grow without bound. Here a few
entries of the first and last layers are set so that the input reaches the output once, while everything between them
stays random. No layer is added, none is skipped, and no LoRA target is touched.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def through_tokens(first: torch.nn.Linear, last: torch.nn.Linear, share: float, texture: float) -> None:
    """Makes `last` undo `first`, for a transformer whose stream carries the embedded patch to its end.

    Args:
        first: patch (P values) → stream (D); left as it is. last: stream (D) → patch (P); becomes
            share · pseudo-inverse(first) + texture · itself.
    """
    inverse = torch.linalg.pinv(first.weight.double()).to(last.weight)
    last.weight.mul_(texture).add_(inverse, alpha=share)


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
    shortcut.weight[:pairs] = 0.0
    shortcut.weight[torch.arange(pairs), skipped + torch.arange(pairs)] = 1.0
    shortcut.bias[:pairs] = 0.0
    for layer in (inside, *(block.proj_out for block in last_block[1:])):
        layer.weight[:pairs] = 0.0
        layer.bias[:pairs] = 0.0

    norm.weight[:pairs], norm.bias[:pairs] = 1.0, 0.0
    last.weight.mul_(texture)
    last.bias.zero_()
    last.weight[:, :pairs] = 0.0
    last.weight[:, :pairs, middle, middle] = sign.T
