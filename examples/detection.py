"""Fine-tune a torchvision detector with one image in a batch, then fold its BatchNorms away.

The statistics are frozen and computed by the convolutions (tune mode), so that one image is enough
and its activations take less memory. Images and boxes are made up, and so are the weights; with
your own, `weights=` of torchvision is all that changes.

    python examples/detection.py
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

import normswap

STEPS = 5


def drawn() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """An image (3, 320, 320) with a bright rectangle, and the box around it."""
    left, top = torch.randint(20, 150, (2,)).tolist()
    image = 0.1 * torch.rand(3, 320, 320)
    image[:, top : top + 120, left : left + 120] += 0.8
    box = torch.tensor([[left, top, left + 120, top + 120]], dtype=torch.float)
    return [image], [{"boxes": box, "labels": torch.tensor([1])}]


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def main() -> None:
    torch.manual_seed(0)
    detector = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=2
    ).eval()
    print(f"BatchNorms: {batch_norms(detector)}")

    with torch.no_grad():  # statistics, as a trained detector has them
        for _ in range(4):
            detector.train()([*drawn()[0], *drawn()[0]], [*drawn()[1], *drawn()[1]])
    detector.eval()

    # Where detectors select boxes no graph can follow; their BatchNorms are in the parts before.
    images = torch.rand(2, 3, 320, 320)
    normswap.freeze(detector.backbone, images, mode="tune", inplace=True)
    normswap.freeze(detector.head, inplace=True)

    detector.train()  # does not thaw the statistics
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-3)
    image, target = drawn()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(detector(image, target).values())
        loss.backward()
        optimizer.step()
        print(f"step {step}, batch of 1: loss {loss:.3f}")

    detector.eval()
    with torch.no_grad():
        before = detector.backbone(images)
        normswap.fold(detector.backbone, images, inplace=True)
        features = detector.backbone(images)
    normswap.fold(detector.head, (list(features.values()),), inplace=True)
    worst = max(
        float((features[name] - before[name]).abs().max() / before[name].abs().max())
        for name in before
    )
    print(f"BatchNorms after the fold: {batch_norms(detector)}, features differ by {worst:.0e}")


if __name__ == "__main__":
    main()
