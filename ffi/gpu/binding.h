// The GPU run time for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace monokernel::gpu {

void bind(pybind11::module_& m);

}  // namespace monokernel::gpu
