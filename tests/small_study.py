"""A study of 32 small students, one of residual networks in bfloat16, and how their tables are read."""

import numpy as np

from rkd.study import read_rows

SPEC = """
seeds: 4
bundle: 4
data: {name: digits}
teacher: {model: mlp, hidden: [32], epochs: 8, learning_rate: 0.003}
transfer: {size: [60, 120]}
student: {model: mlp, hidden: [8]}
loss:
  - {loss: hard}
  - {alpha: [0.5, 2], temperature: 2, scale: T2/alpha}
  - {loss: mse, scale: 1}
training: {epochs: 6, batch_size: 20}
"""

IMAGES = """
seeds: 2
precision: bf16
bundle: 2
data: {name: cifar100, validation: 100}
teacher: {model: resnet8, epochs: 2, batch_size: 64, learning_rate: 0.05, optimizer: sgd, decay: step,
  weight_decay: 0.0005, augmentation: crop-flip}
transfer: {size: 100}
student: {model: wrn_10_1}
loss: [{alpha: 2, scale: T2/alpha}, {loss: mse, scale: 1}]
training: {epochs: 2, batch_size: 32, learning_rate: 0.05, optimizer: sgd, weight_decay: 0.0005,
  augmentation: crop-flip}
"""


def write_images(folder):
    """cifar100.npz with 300 training and 100 test images: a colour and a brightness for each class, and noise."""
    generator, parts = np.random.default_rng(0), {}
    colours = generator.uniform(60, 200, (100, 1, 1, 3))
    for part, a_class in (("train", 3), ("test", 1)):
        y = np.repeat(np.arange(100), a_class)
        noise = generator.normal(0, 30, (len(y), 32, 32, 3))
        parts |= {f"x_{part}": np.clip(colours[y] + noise, 0, 255).astype(np.uint8), f"y_{part}": y}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cifar100.npz", **parts)


def table(folder):
    """The rows without the one column that measures time."""
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_rows(folder / "runs.csv").values()
    ]


def quiet(_):
    pass
