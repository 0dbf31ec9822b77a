"""Fine-tune a pretrained BatchNorm model on private images, with differential privacy.

The public model meets the images of another scanner, which are private but for a few without
labels. Opacus refuses BatchNorm. Its own replacement of it starts anew; a swap that is calibrated
on the few public images keeps most of the accuracy, and a fold keeps all of it. (The bundled model
was trained on these digits as the first scanner gave them: only what is read here is private.)

    pip install opacus
    python examples/private_finetune.py
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.demo.digits import ResidualBlock, digits, digits_data
from normswap.fit.evaluate import accuracy

try:
    from opacus import PrivacyEngine
    from opacus.validators import ModuleValidator
except ImportError:
    raise SystemExit("This example needs Opacus; run: pip install opacus") from None

PUBLIC, BATCH = 200, 100
EPSILON, DELTA = 8.0, 1e-4
RATE, CLIP = 0.2, 1.0


class OutOfPlaceBlock(ResidualBlock):
    """The block of the bundled model; the hooks of Opacus forbid `y += shortcut` after a layer."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


def pretrained() -> nn.Module:
    """The bundled model, without in-place operations, in eval mode."""
    model = digits()
    block = OutOfPlaceBlock(32, 64)
    block.load_state_dict(model.residual.state_dict())
    model.residual = block
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.eval()


def scanned(images: Tensor) -> Tensor:
    """Images as another scanner gives them: faint, on grey paper."""
    return 0.5 * images + 0.1


def trained(start: nn.Module, private: TensorDataset) -> tuple[nn.Module, float]:
    """`start` after its training by DP-SGD, in place, and the epsilon that it spent."""
    torch.manual_seed(0)
    engine = PrivacyEngine()
    learner, optimizer, batches = engine.make_private_with_epsilon(
        module=start.train(),
        optimizer=torch.optim.SGD(start.parameters(), lr=RATE),
        data_loader=DataLoader(private, batch_size=BATCH),
        target_epsilon=EPSILON,
        target_delta=DELTA,
        epochs=1,
        max_grad_norm=CLIP,
    )
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(learner(x), y).backward()
        optimizer.step()
    return start, engine.get_epsilon(DELTA)


def main() -> None:
    warnings.simplefilter("ignore")  # of Opacus, on its random numbers and its hooks
    images, labels = digits_data("train")
    public = scanned(images[:PUBLIC])
    private = TensorDataset(scanned(images[PUBLIC:]), labels[PUBLIC:])
    test_images, test_labels = digits_data("test")
    test = [(scanned(test_images), test_labels)]

    model = pretrained()
    starts = {
        "Opacus' own fix": ModuleValidator.fix(model),
        "GroupNorm, calibrated": normswap.convert(model, "group_norm", data=public.split(50)),
        "BatchNorm folded away": normswap.fold(model, public[:2]),
    }
    for name, start in starts.items():
        before = accuracy(start, test)
        after, epsilon = trained(start, private)
        print(f"{name:22} {before:.1%}, then {accuracy(after, test):.1%}, epsilon {epsilon:.1f}")


if __name__ == "__main__":
    main()
