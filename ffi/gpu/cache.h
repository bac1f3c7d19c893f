// Compiled kernels on disk, one file each: safe across threads, processes and crashes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "gpu/failure.h"

namespace monokernel::gpu {

// Entries are named by what they were compiled from (`hash`) and by the compiler's version, so that a machine without a compiler
// finds what another one left.
class Cache {
 public:
  explicit Cache(std::string dir) : dir_(std::move(dir)) {}

  // The entry of one compiler. What is damaged or cannot be read is reported on standard error and not given.
  std::optional<std::string> load(const std::string& hash, const std::string& version) const;

  // Those of all compilers, the newest first; for where nothing is compiled.
  std::vector<std::string> load_all(const std::string& hash) const;

  // Written aside, synced and renamed: readers see all of it or nothing. A cache that cannot be written is reported on standard
  // error and does no other harm. Returns the file's path, or "".
  std::string store(const std::string& hash, const std::string& version, const std::string& code) const;

  const std::string& dir() const { return dir_; }

 private:
  std::string dir_;  // "": no cache
};

// Held while one process compiles an entry, so that others wait for its result instead of compiling the same. Waiting ends after
// some minutes or where the file system has no locks; compiling twice is then harmless. It throws Failure if it is cancelled.
class CompileLock {
 public:
  // `what` is compiled, for the line on standard error that says what is waited for.
  CompileLock(const Cache& cache, const std::string& hash, const std::string& what, const IsCancelled& is_cancelled);
  ~CompileLock();
  CompileLock(const CompileLock&) = delete;
  CompileLock& operator=(const CompileLock&) = delete;

 private:
  void wait(const std::string& what, const IsCancelled& is_cancelled) const;

  int file_ = -1;
};

}  // namespace monokernel::gpu
