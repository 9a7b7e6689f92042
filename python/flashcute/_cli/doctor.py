"""``doctor``: does flashcute work here, and who else computes attention?"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .. import FlashcuteError, __version__, _core
from ..sdpa import FIRST_TORCH_WITH_REGISTRY
from . import model_shapes
from .info import cuda_version, installed_version, told, without
from .kits import Kit, NumPyKit, choose_kit
from .options import DTYPES, Commands, UsageError, positive_int
from .self_test import self_test
from .table import format_bytes

# Modules and the distributions that own them, by which other libraries recognise FlashAttention.
FLASH_ATTENTION = {
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "flash_attn_2_cuda": "flash-attn",
    "flash_attn_3": "flash-attn-3",
}


class Finding(NamedTuple):
    """What one check found. Something `wrong` makes calls fail or wrong; a note is worth knowing."""

    subject: str
    text: str
    wrong: bool = False


Check = Callable[[], Iterator[Finding]]


def add_command(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check that flashcute works here, and tell who else computes attention",
        description="Checks the settings, the driver, the run-time compiler and the disk cache, computes a small "
        "attention with gradients on the CPU and on the GPU, and tells who claims the name flash_attn and which "
        "attention torch's scaled_dot_product_attention runs. With --model it tells what flashcute would run for a "
        "model's shapes, without padding and masks. Ends with 1 if something is wrong.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a model's config.json, as Hugging Face writes it, or the folder that holds it",
    )
    parser.add_argument(
        "--seqlen",
        type=positive_int,
        default=4096,
        metavar="N",
        help="of the model (default: 4096)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the model (default: what its file says, or bfloat16)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    model = None if options.model is None else model_shapes.read(options.model)
    print(f"flashcute {__version__}, Python {platform.python_version()}, {platform.machine()}\n")
    wrong_settings = {
        name: problem for name, _, _, problem in _core.environment_variables() if problem
    }
    wrong = 0
    for name, problem in wrong_settings.items():
        wrong += show(Finding(name, told(problem, verbose=False), wrong=True))
    with without(wrong_settings):
        for check in CHECKS:
            wrong += sum(map(show, check()))
        if model is not None:
            print()
            wrong += sum(map(show, served(model, options.seqlen, options.dtype)))
    print(f"\n{wrong or 'nothing'} wrong")
    return 1 if wrong else 0


def show(finding: Finding) -> int:
    mark = "WRONG" if finding.wrong else "     "
    print(f"{mark}  {finding.subject:<14}  {finding.text}")
    return int(finding.wrong)


# ---- this machine ------------------------------------------------------------------------------


def driver() -> Iterator[Finding]:
    found = _core.driver_info()
    if not found.available:
        yield Finding("driver", told(found.problem, verbose=False))
        return
    yield Finding("driver", f"runs CUDA {cuda_version(found.cuda_version)}")
    if not found.gpus:
        yield Finding("GPU", f"none: {found.problem or 'the driver reports no device'}")
    for gpu in found.gpus:
        served = gpu.arch >= 80
        reason = (
            "" if served else ": flashcute needs compute capability 8.0; calls on this GPU raise"
        )
        yield Finding(f"GPU {gpu.index}", f"{gpu.name}, sm_{gpu.arch}{reason}", wrong=not served)


def kernels() -> Iterator[Finding]:
    build = _core.build_info()
    if build.image_archs:
        yield Finding("images", f"for {build.image_archs}, by {build.image_compiler}")
    else:
        yield Finding("images", "none: each GPU kernel is compiled at its first use")
    on_gpu = bool(_core.driver_info().gpus)
    without_kernels = on_gpu and not build.image_archs and not build.jit_compiler
    found = told(build.jit_compiler or build.jit_problem, verbose=False)
    yield Finding("compiler", found, wrong=without_kernels)


def cache() -> Iterator[Finding]:
    build = _core.build_info()
    if not build.cache_folder:
        yield Finding("cache", "none: there is no home folder; FLASHCUTE_CACHE_DIR names one")
        return
    problem = why_not_writable(Path(build.cache_folder))
    if problem:
        yield Finding("cache", f"{problem}: kernels are compiled again in each process", wrong=True)
        return
    images = _core.cached_images()
    size = format_bytes(sum(image.size for image in images))
    limit = format_bytes(build.cache_limit)
    yield Finding(
        "cache", f"{build.cache_folder}, writable; {len(images)} images, {size} of {limit}"
    )


def why_not_writable(folder: Path) -> str:
    """Empty where the disk cache can keep images: in a folder of the user that nobody else writes to."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is no folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written to"
    if place == folder and (place.stat().st_uid != os.geteuid() or place.stat().st_mode & 0o022):
        return f"{place} does not belong to this user alone (mode 0700)"
    return ""


# ---- calls -------------------------------------------------------------------------------------


def cpu() -> Iterator[Finding]:
    build = _core.build_info()
    told = f"{build.cpu_isa}, {build.cpu_threads} threads"
    yield tested("CPU", told, NumPyKit(0), "float32")


def gpu() -> Iterator[Finding]:
    if not any(gpu.arch >= 80 for gpu in _core.driver_info().gpus):
        return
    try:
        kit = choose_kit("cuda")
    except UsageError as problem:
        yield Finding("GPU call", f"not tried: {problem}")
        return
    yield tested("GPU call", f"arrays of {kit.library} {kit.version}", kit, "float16")


def tested(subject: str, where: str, kit: Kit, dtype: str) -> Finding:
    try:
        wrong = self_test(kit, dtype)
    except FlashcuteError as problem:
        wrong = f"a call raises {type(problem).__name__}: {problem}"
    right = "a small attention and its gradients are right"
    return Finding(subject, f"{where}; {wrong or right}", bool(wrong))


# ---- others who compute attention --------------------------------------------------------------


def torch() -> Iterator[Finding]:
    version = installed_version("torch")
    if version is None:
        yield Finding("torch", "not installed")
        return
    try:
        found: Any = import_module("torch")
    except (ImportError, OSError) as problem:  # a library that it needs is missing
        yield Finding("torch", f"{version} is installed and cannot be imported: {problem}")
        return
    built_for = found.version.cuda
    gpus = _core.driver_info().gpus
    unusable = bool(gpus) and not found.cuda.is_available()
    reason = " and cannot use the GPU" if unusable else ""
    yield Finding(
        "torch",
        f"{version}, built {'for CUDA ' + built_for if built_for else 'without CUDA'}{reason}",
    )
    attention: Any = import_module("torch.nn.attention")
    if not hasattr(attention, "restore_flash_attention_impl"):
        needed = f"flashcute.sdpa.activate() needs torch {FIRST_TORCH_WITH_REGISTRY}"
        yield Finding("SDPA", f"torch's own; {needed}")
        return
    active = attention.current_flash_attention_impl()
    others = sorted(set(attention.list_flash_attention_impls()) - {active})
    known = f"; others that are registered: {', '.join(others)}" if others else ""
    yield Finding("SDPA", f"flash attention of {active or 'torch itself'} is active{known}")


def flash_attn() -> Iterator[Finding]:
    claims = []
    for module, distribution in FLASH_ATTENTION.items():
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):  # a module in sys.modules without a spec
            spec = None
        if spec is None:
            continue
        try:
            owner = f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            owner = f"no distribution {distribution}"
        claims.append(f"{module}: {owner}, {spec.origin or 'no file'}")
    if not claims:
        yield Finding("flash_attn", "no module claims the name; flashcute.compat.install() would")
    for claim in claims:
        yield Finding("flash_attn", claim)


def transformers() -> Iterator[Finding]:
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return
    register = "flashcute.integrations.transformers.register()"
    yield Finding("transformers", f'{version}; {register}, then attn_implementation="fcute"')


CHECKS: tuple[Check, ...] = (driver, kernels, cache, cpu, gpu, torch, flash_attn, transformers)


# ---- a model -----------------------------------------------------------------------------------


def served(model: model_shapes.Model, seqlen: int, dtype: str | None) -> Iterator[Finding]:
    """What calls of a model's shapes would run, and what of the model has no kernel."""
    dtype = dtype or model.dtype
    kit = choose_kit("auto", dtype, prefer_numpy=True)
    yield Finding(
        "model", f"{model}; {dtype}, {'on the GPU' if kit.device == 'cuda' else 'on the CPU'}"
    )
    for name, explanation in model_shapes.calls(model, kit, seqlen, dtype):
        yield Finding(name, explanation)
    for feature in model.not_served:
        yield Finding("no kernel", feature)
