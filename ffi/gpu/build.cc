#include "gpu/build.h"

#include <array>
#include <chrono>
#include <cstdio>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "gpu/cache.h"
#include "gpu/compiler.h"
#include "gpu/failure.h"
#include "gpu/headers.h"
#include "gpu/once_map.h"
#include "gpu/settings.h"
#include "gpu/sha256.h"

namespace monokernel::gpu {
namespace {

// Of everything but the compiler that the binary depends on.
std::string hash_of(const Architecture& architecture, const std::string& source) {
  std::string all;
  const auto add = [&all](const std::string& part) { all += std::to_string(part.size()) + ":" + part; };
  add(architecture.target);
  add(compile_flags(architecture));
  add(source);
  for (const Header& header : headers()) {
    add(header.name);
    add(header.text);
  }
  return sha256(all);
}

Failure no_compile(const Architecture& a, const Title& title, const std::string& dir, const std::string& why) {
  return Failure(Code::kMissing, "there is no compiled " + title.short_what + " on " + a.name + " in the cache (" +
                                     (dir.empty() ? "which has no folder" : dir) + "), and " + why +
                                     ". To compile it ahead of time: " + title.ahead);
}

// What was compiled before, or elsewhere.
std::optional<Built> cached(const Cache& cache, const std::string& hash) {
  std::vector<std::string> codes = cache.load_all(hash);
  if (codes.empty()) return std::nullopt;
  Built built;
  built.code = std::move(codes.front());
  built.others.assign(std::make_move_iterator(codes.begin() + 1), std::make_move_iterator(codes.end()));
  return built;
}

Built build_now(const Architecture& a, const Title& title, const std::string& source, const std::string& hash,
                const IsCancelled& is_cancelled) {
  const Settings s = settings();
  const Cache cache(s.cache_dir);
  if (s.no_compile) {
    if (auto built = cached(cache, hash)) return *built;
    throw no_compile(a, title, cache.dir(), "MONOKERNEL_NO_COMPILE forbids compiling");
  }
  const Compiler* with = nullptr;
  try {
    with = &compiler(a.vendor);
  } catch (const Failure&) {  // what was compiled elsewhere does without
    if (auto built = cached(cache, hash)) return *built;
    throw;
  }
  const std::string path = cache.dir() + "/" + hash + "-" + with->version;
  if (auto code = cache.load(hash, with->version)) return {*code, {}, path, 0};
  const CompileLock lock(cache, hash, title.what + " on " + a.name, is_cancelled);
  if (auto code = cache.load(hash, with->version)) return {*code, {}, path, 0};
  check_cancelled(is_cancelled);

  const auto start = std::chrono::steady_clock::now();
  std::fprintf(stderr, "jax_monokernel: compiling %s on %s (%s)\n", title.what.c_str(), a.name.c_str(),
               with->version.c_str());
  Built built;
  built.code = compile(a, source);
  built.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  built.path = cache.store(hash, with->version, built.code);
  std::fprintf(stderr, "jax_monokernel: compiled in %.1f s\n", built.seconds);
  return built;
}

// With all that the kernel depends on: what the command takes by default may be another kernel.
std::string command_for(const Architecture& a, const Request& request) {
  constexpr const char* kDtypes[] = {"bfloat16", "float16", "float32"};  // in the order of DType
  const Program& p = request.program;
  const auto number = [](const char* option, int64_t value) { return std::string(" --") + option + " " + std::to_string(value); };
  return "jax-monokernel compile --model CHECKPOINT" + number("batch", request.batch) + number("capacity", request.capacity) +
         " --arch " + a.name + number("units", p.units) + number("groups", p.groups) + " --dtype " + kDtypes[p.weight_dtype] +
         (request.placed ? " --placed" : "") +
         (request.trace || request.racecheck ? ", for calls without MONOKERNEL_TRACE and MONOKERNEL_RACECHECK" : "");
}

}  // namespace

std::shared_ptr<const Built> build(const Architecture& a, const Request& request, const IsCancelled& is_cancelled) {
  const std::string batch = std::to_string(request.batch);
  return build(a, stub(request, a.shared_bytes),
               {.what = "the kernel for this model, batch " + batch + ",",
                .short_what = "kernel for this model",
                .ahead = command_for(a, request)},
               is_cancelled);
}

std::shared_ptr<const Built> build(const Architecture& a, const std::string& source, const Title& title,
                                   const IsCancelled& is_cancelled) {
  const std::string hash = hash_of(a, source);
  using Key = std::array<std::string, 3>;
  static auto* all = new OnceMap<Key, const Built>;
  const Settings settings_now = settings();
  const std::string& library = a.vendor == Vendor::kCuda ? settings_now.nvrtc_library : settings_now.hiprtc_library;
  return all->get(
      Key{hash, settings_now.cache_dir, library},
      [&] { return std::make_shared<const Built>(build_now(a, title, source, hash, is_cancelled)); }, is_cancelled);
}

}  // namespace monokernel::gpu
