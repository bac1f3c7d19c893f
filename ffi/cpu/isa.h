// Choice of the kernel build at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/job.h"

namespace monokernel::cpu {

// Names of the builds that this machine can run, best first.
std::vector<std::string> available_isas();

// Forces a build by name; an empty name goes back to the best one. Returns an error text, empty on success.
std::string set_isa(const std::string& name);

// The best build that this machine can run.
const Kernel& best_kernel();

// The build in force: forced by set_isa, else by MONOKERNEL_ISA, else the best. nullptr with *error set if the name is bad.
const Kernel* current_kernel(std::string* error);

}  // namespace monokernel::cpu
