"""Compares quantization-aware training and calibration of the digits network: `python -m examples.digits.qat`.

With 8 bits, both are as accurate as float. With fewer bits in the weights, training is more accurate.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from openneutron import NeutronQuantizer, quantize

from .network import DigitsSplit, load_digits_split, load_network

_BATCH = 32
_LEARNING_RATE = 1e-3
_CALIBRATION_IMAGES = 128


def train_quantized(data: DigitsSplit, weight_bits: int = 8, seed: int = 0) -> GraphModule:
    """Train for two epochs over the training images, and return the converted network.

    In the second epoch, batch norms use fixed statistics.
    """
    torch.manual_seed(seed)
    example = data.train_images[:_BATCH]
    exported = torch.export.export(
        load_network().train(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    prepared = prepare_qat_pt2e(exported, NeutronQuantizer(is_qat=True, weight_bits=weight_bits))
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=_LEARNING_RATE)
    steps = 2 * -(-len(data.train_images) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(2):
        if epoch == 1:
            move_exported_model_to_eval(prepared)  # use the statistics with which batch norms are folded
        for batch in torch.split(torch.randperm(len(data.train_images)), _BATCH):
            loss = F.cross_entropy(prepared(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    converted: GraphModule = convert_pt2e(prepared)
    return converted


def calibrate(data: DigitsSplit, weight_bits: int = 8) -> Callable[..., Any]:
    """Return the trained network, quantized by calibration."""
    calibration = torch.split(data.train_images[:_CALIBRATION_IMAGES], 1)
    return quantize(load_network(), (data.test_images[:1],), calibration, recover=None, weight_bits=weight_bits)


@torch.no_grad()
def accuracy(network: Callable[..., Any], images: Tensor, labels: Tensor) -> float:
    """Return the share of `images` [N, 1, 32, 32] whose top-1 class is that of `labels` [N]."""
    classes = torch.stack([network(image).argmax() for image in torch.split(images, 1)])
    return (classes == labels).float().mean().item()


def main() -> None:
    """Print the accuracy on the test images of float, calibrated and trained networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    logging.disable(logging.WARNING)  # torchao warns about missing GPU libraries
    warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
    torch.set_num_threads(1)
    data = load_digits_split()
    tests = data.test_images, data.test_labels
    table = Table("bits of the weights", "calibrated", "trained")
    for bits in (8, 4, 3):
        found = accuracy(calibrate(data, bits), *tests), accuracy(train_quantized(data, bits, options.seed), *tests)
        table.add_row(str(bits), *(f"{100 * share:.1f} %" for share in found))
    of_float = 100 * accuracy(load_network(), *tests)
    Console().print(f"float: {of_float:.1f} % of {len(data.test_images)} test images", table)


if __name__ == "__main__":
    main()
