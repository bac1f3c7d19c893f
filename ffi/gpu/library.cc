#include "gpu/library.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "gpu/failure.h"

namespace monokernel::gpu {
namespace {

namespace fs = std::filesystem;

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// 13 for libnvrtc.so.13 and libnvrtc.so.13.1, 0 where no version is given.
int major_version(const std::string& path, const std::string& name) {
  const std::string base = base_name(path);
  return base.size() > name.size() + 1 ? std::atoi(base.c_str() + name.size() + 1) : 0;
}

bool is_named(const std::string& path, const std::string& name) {
  const std::string base = base_name(path);
  return base == name || base.starts_with(name + ".");
}

std::string loaded_path(const std::string& name) {
  struct Search {
    const std::string& name;
    std::string found;
  } search{name, ""};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& s = *static_cast<Search*>(data);
        if (!info->dlpi_name || !is_named(info->dlpi_name, s.name)) return 0;
        s.found = info->dlpi_name;
        return 1;
      },
      &search);
  return search.found;
}

std::vector<std::string> files_in(const std::string& dir, const std::string& name) {
  std::vector<std::string> files;
  std::error_code error;
  for (fs::directory_iterator it(dir, error), end; !error && it != end; it.increment(error)) {
    if (is_named(it->path().string(), name)) files.push_back(it->path().string());
  }
  std::sort(files.begin(), files.end(), [&](const std::string& a, const std::string& b) {
    const int x = major_version(a, name), y = major_version(b, name);
    return x != y ? x > y : a < b;
  });
  return files;
}

}  // namespace

Library open_library(const Wanted& wanted) {
  std::string problems;
  const auto try_open = [&](const std::string& path, int flags) {
    Library library{dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | flags), path};
    if (!library.handle) {
      const char* error = dlerror();
      if (error && path.find('/') != std::string::npos) problems += std::string("\n  ") + error;
    }
    return library;
  };

  if (!wanted.only.empty()) {
    if (Library library = try_open(wanted.only, 0); library.handle) return library;
    throw Failure(Code::kMissing, wanted.variable + " is " + wanted.only + ", which cannot be loaded:" + problems);
  }
  // A second copy of a run time in one process would know nothing of the first one's memory and streams.
  if (const std::string path = loaded_path(wanted.name); !path.empty()) {
    if (Library library = try_open(path, RTLD_NOLOAD); library.handle) return library;
  }
  std::vector<std::string> paths;
  for (const std::string& dir : wanted.dirs) {
    for (const std::string& file : files_in(dir, wanted.name)) paths.push_back(file);
  }
  paths.insert(paths.end(), wanted.sonames.begin(), wanted.sonames.end());
  std::stable_partition(paths.begin(), paths.end(),
                        [&](const std::string& path) { return major_version(path, wanted.name) <= wanted.newest; });
  for (const std::string& path : paths) {
    if (Library library = try_open(path, 0); library.handle) return library;
  }
  throw Failure(Code::kMissing, wanted.name + " was not found. " + wanted.install + ", or set " + wanted.variable +
                                    " to the library's path" + (problems.empty() ? "" : ". Tried:" + problems));
}

void* find_function(const Library& library, const char* name) {
  if (void* function = dlsym(library.handle, name)) return function;
  throw Failure(Code::kMissing, library.path + " has no function " + name + ": it is too old or not the vendor's library");
}

}  // namespace monokernel::gpu
