"""The new process of ``bench --first-use``: prints as JSON how long its first call takes.

python -m flashcute._cli.first_call DEVICE DTYPE HEAD_DIM forward|training
"""

from __future__ import annotations

import json
import subprocess
import sys
import time


def main(device: str, dtype: str, head_dim: int, call: str) -> int:
    import flashcute
    from flashcute._cli.kits import choose_kit

    try:
        if device == "cuda":
            what = "flash_attention, 1024 tokens"
            kit = choose_kit(device, dtype)
            x = kit.normal((1, 1024, 8, head_dim), dtype)
            if call == "training":
                what = "flash_attention and its gradients, 1024 tokens"
                x.requires_grad_()
                x.sum().backward()  # torch has compiled and loaded what is its own
            kit.synchronize()  # the library has initialised the GPU
            start = time.perf_counter()
            out = flashcute.flash_attention(x, x, x, True)
            if call == "training":
                out.sum().backward()
            kit.synchronize()
        else:
            what = "prebuild for sm_80"
            cfgs: list[flashcute.ForwardConfig | flashcute.BackwardConfig]
            cfgs = [flashcute.default_config(head_dim, dtype, "sm_80")]
            if call == "training":
                what = "prebuild for sm_80, gradients too"
                cfgs.append(flashcute.default_backward_config(head_dim, dtype, "sm_80"))
            start = time.perf_counter()
            flashcute.prebuild(cfgs, "sm_80")
    except flashcute.FlashcuteError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(json.dumps({"what": what, "call_s": time.perf_counter() - start, "import_s": import_s()}))
    return 0


def import_s() -> float:
    """Seconds of `import flashcute` in a process that has imported nothing else."""
    code = "import time; t = time.perf_counter(); import flashcute; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
