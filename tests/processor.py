"""Whether this processor has AVX2, as the exit status: `make test-portable` asks."""

import sys

import llvmlite.binding as llvm

features = llvm.get_host_cpu_features()
if not all(features.get(name) for name in ("avx", "avx2", "fma")):
    sys.exit("this processor has no AVX2, so nothing is tested as if it had no more")
