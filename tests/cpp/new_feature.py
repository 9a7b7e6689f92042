"""Checks that each place that must know a new feature, or a new kind of mask, fails to compile.

Adds them to copies of the sources. Guards against a place that lists features by hand and goes on without
the new one: a kernel under the name of another, or a call that computes something else than it was asked for.

usage: new_feature.py --compiler g++ --root REPOSITORY --system FOLDER...
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copytree

CPU = "src/cpu/dispatch.cpp"

# What follows from the table alone.
FEATURE_IN_TABLE = """
#include <cassert>
#include <string>
#include "image/source.hpp"
using namespace flashcute;
int main() {
  Features const with{.probe = true};
  ForwardKernelId const kernel = kernel_of(ForwardConfig{}, with), plain = kernel_of(ForwardConfig{}, {});
  assert(kernel != plain && hash_of(kernel) != hash_of(plain));
  assert(std::string(name(kernel).text) == std::string(name(plain).text) + "_probing");
  assert(code_of(kernel, 80).source.find(", .probe = true, .count_blocks = false}})") != std::string::npos);
  assert(code_of(plain, 80).source.find(", .probe = false, .count_blocks = false}})") != std::string::npos);
  for (BackwardPass const pass : {BackwardPass::queries, BackwardPass::keys, BackwardPass::gradients}) {
    BackwardKernelId const gradients = kernel_of(BackwardConfig{}, pass, with);
    assert(gradients.features == with && std::string(name(gradients).text).ends_with("_full_probing"));
  }
  assert(kernel_of(BackwardConfig{}, BackwardPass::prepare, with).features == Features{});
}
"""
MASK_IN_TABLE = """
#include <cassert>
#include <string>
#include "image/source.hpp"
using namespace flashcute;
int main() {
  ForwardKernelId const kernel = kernel_of(ForwardConfig{}, {.mask = MaskKind::probe});
  assert(hash_of(kernel) != hash_of(kernel_of(ForwardConfig{}, {})));
  assert(std::string(name(kernel).text).ends_with("_probe"));
  assert(code_of(kernel, 80).source.find(".mask = flashcute::MaskKind::probe,") != std::string::npos);
}
"""


def forward_kernel(features: str) -> str:
    kernel = f"ForwardPass<kernel_of(ForwardConfig{{}}, {features})>"
    return (
        '#include "flashcute/sm80/forward.hpp"\nusing namespace flashcute;\n'
        f"static_assert(sizeof({kernel}) > 0);\n"
    )


def backward_kernels(features: str, *passes: str) -> str:
    ids = [f"BackwardKernelId{{{{}}, BackwardPass::{each}, {features}}}" for each in passes]
    kernels = "".join(f"static_assert(sizeof(BackwardKernel<{id}>) > 0);\n" for id in ids)
    return f'#include "flashcute/sm80/backward_passes.hpp"\nusing namespace flashcute;\n{kernels}'


class Copy:
    """A copy of the sources, to be changed and compiled."""

    def __init__(self, root: Path, folder: str, compiler: str, system: list[str]) -> None:
        self.folder = Path(folder)
        for name in ("include", "src", "tests/cpp"):
            copytree(root / name, self.folder / name)
        # The kernels' headers need emulation/ before include/; the others have no twin there.
        names = ("tests/cpp/emulation", "include", "src", "tests/cpp")
        self.command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror=switch"]
        self.command += [f"-I{self.folder / name}" for name in names]
        self.command += [f"-isystem{path}" for path in system]

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        if old not in text:
            sys.exit(f"{file} has no {old!r} any more: tell {Path(__file__).name} what to edit")
        path.write_text(text.replace(old, new))

    def compile(self, source: str, *options: str) -> subprocess.CompletedProcess[str]:
        """`source`: a file of the copy, or text."""
        is_text = "\n" in source
        path = self.folder / ("text.cpp" if is_text else source)
        if is_text:
            path.write_text(source)
        command = [*self.command, *(options or ["-fsyntax-only"]), str(path)]
        return subprocess.run(command, capture_output=True, text=True)

    def expect_error(self, source: str, message: str) -> None:
        result = self.compile(source)
        if result.returncode == 0:
            sys.exit(f"this compiles, and must not:\n{source}")
        if not re.search(message, result.stderr):
            sys.exit(f"expected {message!r} of\n{source}\ngot\n{result.stderr}")

    def expect_compiled(self, source: str) -> None:
        result = self.compile(source)
        if result.returncode:
            sys.exit(f"this does not compile, with all places told:\n{source}\n{result.stderr}")

    def expect_success(self, program: str) -> None:
        binary = self.folder / "program"
        result = self.compile(program, str(self.folder / "src/image/source.cpp"), "-o", str(binary))
        if result.returncode == 0:
            result = subprocess.run([binary], capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{program}\n{result.stderr}")


def check_feature(copy: Copy) -> None:
    features = "include/flashcute/core/features.hpp"
    copy.edit(
        features,
        "  bool count_blocks = false;",
        "  bool probe = false;\n  bool count_blocks = false;",
    )
    copy.expect_error('#include "flashcute/core/features.hpp"\n', "needs a row in for_each_feature")

    row = 'visit(Feature{"count_blocks"'
    copy.edit(
        features, row, 'visit(Feature{"probe", "probing", Readers::scores}, f.probe);\n  ' + row
    )
    copy.expect_success(FEATURE_IN_TABLE)

    # Nothing leaves the feature out of what it computes. The CPU's dispatch has to name it; a GPU
    # kernel is refused if it is asked for the feature and has no code for it.
    copy.expect_error(CPU, "decomposes into 3 elements")
    unknown = "has no code for one of the features"
    copy.expect_compiled(forward_kernel("{.count_blocks = true}"))
    copy.expect_error(forward_kernel("{.probe = true}"), unknown)
    passes = ("queries", "keys", "prepare", "gradients", "finish", "sink")
    copy.expect_compiled(backward_kernels("{}", *passes))
    for each in passes:
        copy.expect_error(backward_kernels("{.probe = true}", each), unknown)

    copy.edit(CPU, "[mask, count_blocks]", "[mask, probe, count_blocks]")
    copy.expect_compiled(CPU)


def check_mask(copy: Copy) -> None:
    last = 'ROW(mapped, "mapped")'
    copy.edit("include/flashcute/core/enums.hpp", last, f'{last} ROW(probe, "probe")')
    copy.expect_error('#include "flashcute/sm90/rounds.hpp"\n', "probe.* not handled in switch")
    mapped = "    case MaskKind::mapped: return {1,"
    copy.edit("include/flashcute/sm90/rounds.hpp", mapped, f"    case MaskKind::probe:\n{mapped}")
    copy.expect_success(MASK_IN_TABLE)

    users = [CPU, "src/launch/tile_deal.cpp"]
    for unit in users:
        copy.expect_error(unit, "incomplete type.*Mask<.*probe")
    copy.expect_error("tests/cpp/policy/test_mask.cpp", "probe.* not handled in switch")
    probe = "template <>\nstruct Mask<MaskKind::probe> : Mask<MaskKind::full> {};\n\n"
    copy.edit(
        "include/flashcute/policy/mask.hpp",
        "}  // namespace flashcute",
        f"{probe}}}  // namespace flashcute",
    )
    for unit in users:
        copy.expect_compiled(unit)

    # The CPU serves any mask under which a query sees neighbouring keys, and asks for code for any other.
    copy.edit(
        "include/flashcute/policy/mask.hpp",
        "struct Mask<MaskKind::probe> : Mask<MaskKind::full> {};",
        "struct Mask<MaskKind::probe> : Mask<MaskKind::full> {\n"
        "  static RowRange keys_of(int32_t, BatchSequence const&) = delete;\n};",
    )
    copy.expect_error(CPU, "deleted function.*probe.*keys_of")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--root", type=Path, default=Path("."))
    parser.add_argument(
        "--system", nargs="*", default=[], help="folders of CUTLASS and CUDA headers"
    )
    arguments = parser.parse_args()
    for check in (check_feature, check_mask):
        with tempfile.TemporaryDirectory() as folder:
            check(Copy(arguments.root, folder, arguments.compiler, arguments.system))


if __name__ == "__main__":
    main()
