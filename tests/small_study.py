"""A study of 32 small students, and how its table is read: for the tests of both engines."""

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


def table(folder):
    """The rows without the one column that measures time."""
    return [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in read_rows(folder / "runs.csv").values()
    ]


def quiet(_):
    pass
