"""Makes a build of the native module other than the installed one the one that is imported, for .ci/sanitize.

Python imports this file at its start where its folder is on PYTHONPATH: in processes that tests start, too.
"""

import importlib.util
import os
import sys

if path := os.environ.get("MONOKERNEL_NATIVE_MODULE"):
    _spec = importlib.util.spec_from_file_location("jax_monokernel._native", path)
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = _module
    _spec.loader.exec_module(_module)
