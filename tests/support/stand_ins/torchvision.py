"""What the README's examples need of torchvision, for where it is not installed."""

from types import SimpleNamespace

from benchmarks.resnet import resnet50

models = SimpleNamespace(resnet50=resnet50)
