"""What compiled kernels ask of memory in cases of the benchmark, counted without a GPU.

    python tools/count_traffic.py 'attention/decode*bfloat16' --backend triton --target 90
    python tools/count_traffic.py 'retrieve/*' --backend cuda

Runs each case's PTX instruction by instruction (`tests/ptx`): seconds to minutes a case.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--target", type=int, choices=(80, 90), default=90)
    parser.add_argument("--worst", type=int, default=4, help="instructions shown a kernel")
    options = parser.parse_args()
    os.environ["VICO_EMULATE"] = str(int(options.backend == "cuda"))
    os.environ["VICO_PTX"] = str(options.target)

    import torch
    from ptx import plugin, traffic

    from kit import emulation
    from vicostream_kernels.bench import registry

    emulation.pytest_configure()  # nothing, unless VICO_EMULATE is set
    plugin.activate()
    cpu = torch.device("cpu")
    for case in registry.select(options.cases, registry.load()):
        providers = {p.name: p for p in case.providers(cpu)}
        ours = providers.get(f"ours:{options.backend}")
        if ours is None:
            print(f"{case.name}: no ours:{options.backend} here ({', '.join(providers)})")
            continue
        inputs, began = case.make(cpu, 1), time.time()
        with traffic.counted() as counts:
            ours.run(inputs)
        print(
            f"\n{case.name}, {options.backend}, sm_{options.target} ({time.time() - began:.0f} s)"
        )
        print(counts.report(options.worst), flush=True)


if __name__ == "__main__":
    main()
