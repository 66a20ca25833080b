"""The two LeNets of the pruning literature, without what the original LeNet-5 had besides."""

from torch import Tensor, nn


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10 with ReLU between; 266,200 weights, 266,610 with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 28, 28) to logits (batch, 10)."""
        hidden = self.fc1(images.flatten(1)).relu()
        hidden = self.fc2(hidden).relu()
        logits: Tensor = self.fc3(hidden)
        return logits


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it: two 5x5 convolutions of 20 and 50 channels, each pooled, then 500 and 10.

    ReLU after every layer but the last. 430,500 weights, 431,080 with biases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 28, 28) to logits (batch, 10)."""
        # ReLU and max commute: rectifying after pooling gives the same bits for a quarter of the work.
        hidden = self.pool(self.conv1(images)).relu()
        hidden = self.pool(self.conv2(hidden)).relu()
        hidden = self.fc1(hidden.flatten(1)).relu()
        logits: Tensor = self.fc2(hidden)
        return logits
