"""Sizing is arithmetic: it comes without torch, and at once."""

import pkgutil
import statistics
import subprocess
import sys
import time

import labkit.sizing
import labkit.specs

CODE = "import labkit.sizing, sys; print('torch' in sys.modules)"


def test_sizing_needs_no_torch_and_is_there_within_three_tenths_of_a_second():
    took = []
    for code in (CODE, "pass") * 3:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took.append(time.perf_counter() - start)
        assert done.stdout.strip() in ("False", "")
    # The interpreter's own start is not the import's.
    assert statistics.median(took[::2]) - statistics.median(took[1::2]) < 0.3


def test_no_module_of_sizing_or_specs_loads_torch_when_it_is_imported():
    rooms = (labkit.sizing, labkit.specs)
    names = [f"{room.__name__}.{module.name}" for room in rooms for module in pkgutil.iter_modules(room.__path__)]
    assert {"labkit.specs.measured", "labkit.sizing.command"} <= set(names)
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
