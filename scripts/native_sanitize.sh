#!/bin/sh
# Runs the tests of the native kernels once, the extension built with AddressSanitizer and UBSan:
# a read or write outside an array, or undefined behaviour, ends the run. Needs g++, whose libasan
# is loaded before Python, which knows nothing of it. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export CXX="${CXX:-g++}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/build/test-extensions}"
export ULTRAMEM_CXXFLAGS='-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all'
"$python" -c 'from ultramem_ds.kernels.build import build; print(build())'
libraries="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so)"
# No leaks are looked for: Python keeps memory to its end.
exec env LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0 "$python" -m pytest -p no:xdist \
  tests/unit/test_kernels_ops.py tests/unit/test_kernels_row_adam.py \
  tests/unit/test_kernels_threads.py tests/unit/test_memory_native.py tests/unit/test_infer.py "$@"
