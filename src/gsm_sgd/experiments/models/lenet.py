"""The two LeNets of the pruning literature, without what the original LeNet-5 had besides."""

from collections import OrderedDict

from torch import nn


def lenet300() -> nn.Sequential:
    """Return LeNet-300-100: 784-300-100-10 with ReLU between; 266,200 weights, 266,610 with biases."""
    layers = {"flatten": nn.Flatten(), "fc1": nn.Linear(784, 300), "relu1": nn.ReLU(), "fc2": nn.Linear(300, 100)}
    return nn.Sequential(OrderedDict(layers, relu2=nn.ReLU(), fc3=nn.Linear(100, 10)))


def lenet5() -> nn.Sequential:
    """Return LeNet-5 as Caffe has it: two 5x5 convolutions of 20 and 50 channels, each pooled, then 500 and 10.

    ReLU after every layer but the last. 430,500 weights, 431,080 with biases.
    """
    # ReLU and max commute: rectifying after pooling gives the same bits for a quarter of the work.
    first = {"conv1": nn.Conv2d(1, 20, 5), "pool1": nn.MaxPool2d(2), "relu1": nn.ReLU()}
    second = {"conv2": nn.Conv2d(20, 50, 5), "pool2": nn.MaxPool2d(2), "relu2": nn.ReLU(), "flatten": nn.Flatten()}
    last = {"fc1": nn.Linear(800, 500), "relu3": nn.ReLU(), "fc2": nn.Linear(500, 10)}
    return nn.Sequential(OrderedDict({**first, **second, **last}))
