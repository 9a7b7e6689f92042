#!/bin/sh
# Installs GoogleTest and Google Benchmark from the distribution if they are missing and that needs no
# question: as root on Debian or Ubuntu. Otherwise the CMake build fetches them.
set -eu
missing=""
[ -e /usr/include/gtest/gtest.h ] || [ -e /usr/src/googletest/CMakeLists.txt ] || missing="libgtest-dev"
[ -e /usr/include/benchmark/benchmark.h ] || missing="$missing libbenchmark-dev"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "flashcute: installing $missing with apt-get"
  apt-get install --yes --quiet $missing || { apt-get update --quiet && apt-get install --yes --quiet $missing; } ||
    echo "flashcute: apt-get failed; the build will fetch what is missing" >&2
fi
