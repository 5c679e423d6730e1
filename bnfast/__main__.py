"""python -m bnfast info | check"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys

import torch

from . import __version__, dispatch

# All of them take the same paths.
LAYERS = (
    "BatchNorm1d/2d/3d, BatchRenorm1d/2d/3d, FrozenBatchNorm2d, GroupNorm, InstanceNorm1d/2d/3d, LayerNorm"
)


def info() -> int:
    """Versions, devices, and which path each layer takes on them, with the reason."""
    triton = f"Triton {dispatch.TRITON_VERSION}" if dispatch.TRITON_VERSION else "no Triton"
    print(f"bnfast {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {triton}")
    print(f"Layers: {LAYERS}")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] + [torch.device("cpu")]
    for device in devices:
        described, kernels = f"{platform.machine()}, {os.cpu_count()} cores", "Triton kernels (interpreter)"
        if device.type == "cuda":
            p, kernels = torch.cuda.get_device_properties(device), "Triton kernels"
            described = f"{p.name}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
        print(f"\n{device}: {described}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            why = dispatch.reason_for_torch(torch.empty(2, 8, 2, 2, dtype=dtype, device=device))
            print(f"  {str(dtype).removeprefix('torch.'):9} {f'plain torch: {why}' if why else kernels}")
    print(
        "\nSubclasses of torch.Tensor without a __torch_dispatch__ of their own (MONAI's MetaTensor,\n"
        "fastai's TensorBase, torchvision's tv_tensors) take the path of an ordinary tensor, and come\n"
        "back as what torch.nn's layer makes of them. Others, and compiled all, run plain torch."
    )
    print(
        "\nAnywhere: empty batches, export, jit.trace, functorch transforms and forward-mode AD run\n"
        "plain torch, which all of them understand; double backward differentiates plain torch formulas."
    )
    return 0


def check(seconds: float, compiled: bool = False) -> int:
    """Compare the kernels with fp64 on this machine: on its GPU, else in Triton's interpreter."""
    if not dispatch.TRITON:
        print(f"No kernels to check: {dispatch.reason_for_torch(torch.empty(1))}")
        return 1
    if compiled and dispatch.INTERPRET:
        print("Under TRITON_INTERPRET kernels are not compiled: unset it to check with --compiled.")
        return 1
    if compiled:
        from .ptx import library

        try:
            library.load()
        except library.MissingCompiler as missing:
            print(f"{missing}\nChecking in Triton's interpreter instead.")
            compiled = False
    if not compiled and not torch.cuda.is_available() and not dispatch.INTERPRET:
        # Triton reads the variable when it decorates a kernel: a process of its own has it from the start.
        command = [sys.executable, "-m", "bnfast", "check", "--seconds", str(seconds)]
        return subprocess.call(command, env={**os.environ, "TRITON_INTERPRET": "1"})
    from . import selfcheck

    return selfcheck.run(seconds, compiled)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bnfast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__)
    checker = commands.add_parser("check", help=check.__doc__)
    checker.add_argument("--seconds", type=float, default=120.0, help="start no new cases after this long")
    about = "execute on the CPU what Triton compiles for an H100, with races, bounds and alignment watched"
    checker.add_argument("--compiled", action="store_true", help=about)
    arguments = parser.parse_args()
    return info() if arguments.command == "info" else check(arguments.seconds, arguments.compiled)


if __name__ == "__main__":
    sys.exit(main())
