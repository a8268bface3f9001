"""What the benchmarks' tables have in common."""

import platform
import re
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np


def processor():
    """As in "AMD EPYC (znver4)"."""
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name} ({llvm.get_host_cpu_name()})"


def write_table(page, script, text):
    """Put `text` where the page has the table of one of the benchmarks, "compare.py"."""
    begin, end = f"<!-- table by benchmarks/{script} -->", "<!-- end of table -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def markdown(heads, rows):
    """A table whose first column is aligned left."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(list(values)))))
