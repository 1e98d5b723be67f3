"""The kernels and operators: run by Triton's interpreter, and compiled for an absent GPU.

The interpreter takes code that the compiler refuses, so both are needed. No GPU is.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import rkd.operators

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
GROUPS = ["fast", "exact"]


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(group):
    environment = os.environ | {"TRITON_INTERPRET": "1", "RKD_TRITON": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, "-k", group, str(TESTS / "interpreted_kernels.py")],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rkd import exact_kernel, kernels

rich = sys.argv[2] == "rich"
options = dict.fromkeys(["PER_ORDER", "HARD", "HAS_MASK", "ALPHAS", "TEMPERATURES", "SOFTS", "HARDS"], rich)
tile = dict(KIND=1 + rich, FLIP=False, HALF=True, EVEN=not rich, SUB=2 - rich, WIDTH=2048, STAGES=3)
kernel, constants = {
    "visit": (kernels.visit_rows, options | tile | {"GRADIENT": True}),
    "differentiate": (kernels.differentiate_rows, options | tile),
    "scale": (kernels.scale_rows, {"WIDTH": 2048}),
    "exact": (
        exact_kernel.visit_rows_exactly,
        options | {"UPSTREAM": rich, "ONLY_LEFT": True, "GRADIENT": True, "BLOCK": 1024},
    ),
}[sys.argv[1]]
pointers = dict(z="bf16", v="bf16", g="bf16", mask="u8", labels="i64", softs="fp64", hards="fp64")
signature, aligned = {}, {}
for i, name in enumerate(kernel.arg_names):
    stem = name.removesuffix("_ptr")
    if name in constants:
        signature[name] = "constexpr"
    elif stem != name:
        signature[name] = "*" + pointers.get(stem, "fp32")
        aligned[(i,)] = [["tt.divisibility", 16]]
    elif name in ("n", "rows") or name.endswith("stride"):
        signature[name] = "i32"
        aligned[(i,)] = [["tt.divisibility", 16]]
    else:
        signature[name] = "fp32"
source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
assert len(built.asm["cubin"]) > 1000
wide = built.asm["ptx"].count(".v4.b32") + built.asm["ptx"].count("cp.async.cg.shared.global")
print(wide, built.metadata.shared)
"""


def has_assembler():
    spec = find_spec("triton")
    return spec is not None and (Path(spec.origin).parent / "backends/nvidia/bin/ptxas").exists()


@pytest.mark.skipif(not has_assembler(), reason="Triton with its assembler for NVIDIA GPUs is not installed")
@pytest.mark.parametrize("kernel", ["visit plain", "visit rich", "differentiate rich", "exact rich", "scale plain"])
def test_compiles_for_hopper(kernel, tmp_path):
    """To machine code of sm_90, whose assembler refuses too much shared memory; bf16 moves 16 bytes at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, *kernel.split()]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wide, shared = map(int, done.stdout.split())
    assert shared < 100 * 1024
    assert wide > 0 or kernel == "exact rich"


def test_not_chosen_on_a_cpu():
    z = torch.zeros(2, 3)
    assert not rkd.operators.can_launch(z, z)
