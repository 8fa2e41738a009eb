"""The contrastive losses, and their gradients over more pairs than fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipfilter.training.group import Group

#: A micro-batch's number -> its image and text features, unit rows [n, dim].
Features = Callable[[int], tuple[Tensor, Tensor]]


def make_loss(kind: str, group: Group) -> nn.Module:
    """open_clip's ClipLoss (Radford et al. 2021) or SigLipLoss (Zhai et al. 2023, arXiv:2303.15343).

    Over several workers each computes its own rows against all (local loss, gather with gradient): the mean over the
    workers, of the loss and of its gradients, is that of one worker with the whole batch.
    """
    from open_clip.loss import ClipLoss, SigLipLoss

    if kind == "siglip":
        loss: nn.Module = SigLipLoss(rank=group.rank, world_size=group.size, dist_impl="gather")
    else:
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=group.rank, world_size=group.size)
    return loss


def contrast(loss: nn.Module, images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """The loss of n pairs, computed in float32. images, texts: unit rows [n, dim]; logit_scale: its logarithm."""
    arguments: list[Any] = [images.float(), texts.float(), logit_scale.float().exp()]
    if logit_bias is not None:
        arguments.append(logit_bias.float())
    value: Tensor = loss(*arguments)
    return value


def backward(
    features: Features, count: int, value: Callable[[Tensor, Tensor], Tensor], scale: Callable[[Tensor], Tensor]
) -> Tensor:
    """Add the gradients of the loss over `count` micro-batches to the parameters; return the loss, detached.

    With more than one micro-batch, features are computed twice: first all of them without a graph; the loss of the
    whole gives the gradient with respect to each feature (and to temperature and bias, once); then each micro-batch
    again, with a graph that takes its part of that gradient back to the weights. These are the gradients of the whole
    batch, in the memory of one micro-batch (Gao et al. 2021, arXiv:2101.06983; open_clip's `--accum-freq` for the same
    end). `features` must give the same features both times, dropout included. scale: what fp16 multiplies the loss by.
    """
    if count == 1:
        loss = value(*features(0))
        scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    with torch.no_grad():
        cached = [features(number) for number in range(count)]
    images = torch.cat([image for image, _ in cached]).requires_grad_()
    texts = torch.cat([text for _, text in cached]).requires_grad_()
    loss = value(images, texts)
    scale(loss).backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert texts.grad is not None
    start = 0
    for number, (image, _) in enumerate(cached):
        part = slice(start, start + len(image))
        start += len(image)
        outputs: Sequence[Tensor] = features(number)
        gradients = (images.grad[part], texts.grad[part])
        with_graph = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        torch.autograd.backward([o for o, _ in with_graph], [g for _, g in with_graph])
    return loss.detach()
