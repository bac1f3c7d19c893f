#include "gpu/cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <system_error>
#include <thread>

#include "gpu/sha256.h"

namespace monokernel::gpu {
namespace {

namespace fs = std::filesystem;

constexpr char kMagic[] = "jax_monokernel 1";  // 16 bytes, then the length as 16 and the checksum as 64 hexadecimal digits
constexpr size_t kHeaderBytes = 16 + 16 + 64;

std::string header(const std::string& code) {
  char length[17];
  std::snprintf(length, sizeof(length), "%016llx", static_cast<unsigned long long>(code.size()));
  return kMagic + std::string(length) + sha256(code);
}

void report_unreadable(const fs::path& path, int error) {
  std::fprintf(stderr, "jax_monokernel: %s cannot be read (%s); let this user read it, or set MONOKERNEL_CACHE_DIR to another folder\n",
               path.c_str(), std::strerror(error));
}

// The file's whole content, if there is one that can be read.
std::optional<std::string> content_of(const fs::path& path) {
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (!file && errno == ENOENT) return std::nullopt;
  std::string content;
  char part[1 << 16];
  for (size_t n; file && (n = std::fread(part, 1, sizeof(part), file)) > 0;) content.append(part, n);
  const int error = !file || std::ferror(file) ? errno : 0;
  if (file) std::fclose(file);
  if (error == 0) return content;
  report_unreadable(path, error);
  return std::nullopt;
}

// `then` is what becomes of a damaged entry, for the line that reports it.
std::optional<std::string> read(const fs::path& path, const char* then) {
  const std::optional<std::string> content = content_of(path);
  if (!content) return std::nullopt;
  if (content->size() >= kHeaderBytes) {
    std::string code = content->substr(kHeaderBytes);
    if (content->compare(0, kHeaderBytes, header(code)) == 0) return code;
  }
  std::fprintf(stderr, "jax_monokernel: %s is damaged and %s\n", path.c_str(), then);
  return std::nullopt;
}

bool write(const std::string& path, const std::string& content) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) return false;
  size_t done = 0;
  while (done < content.size()) {
    const ssize_t n = ::write(file, content.data() + done, content.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    done += static_cast<size_t>(n);
  }
  const bool synced = done == content.size() && fsync(file) == 0;
  return close(file) == 0 && synced;
}

std::string create(const std::string& dir) {
  if (dir.empty()) return "";
  std::error_code error;
  fs::create_directories(dir, error);
  return error ? "" : dir;
}

}  // namespace

std::optional<std::string> Cache::load(const std::string& hash, const std::string& version) const {
  if (dir_.empty()) return std::nullopt;
  return read(dir_ + "/" + hash + "-" + version, "will be replaced");
}

std::vector<std::string> Cache::load_all(const std::string& hash) const {
  if (dir_.empty()) return {};
  std::vector<std::pair<fs::file_time_type, fs::path>> found;
  std::error_code error;
  for (fs::directory_iterator it(dir_, error), end; !error && it != end; it.increment(error)) {
    if (!it->path().filename().string().starts_with(hash + "-")) continue;
    std::error_code no_time;
    found.emplace_back(fs::last_write_time(it->path(), no_time), it->path());
  }
  if (error && error != std::errc::no_such_file_or_directory) report_unreadable(dir_, error.value());
  std::sort(found.rbegin(), found.rend());
  std::vector<std::string> codes;
  for (const auto& [time, path] : found) {
    if (auto code = read(path, "is not used; delete it, and compile the kernel anew")) codes.push_back(std::move(*code));
  }
  return codes;
}

std::string Cache::store(const std::string& hash, const std::string& version, const std::string& code) const {
  static std::atomic<unsigned> count = 0;
  if (dir_.empty()) return "";
  const std::string path = dir_ + "/" + hash + "-" + version;
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();  // a crashed process's number may come again
  const std::string aside = dir_ + "/." + hash + "." + std::to_string(getpid()) + "." + std::to_string(now) + "." +
                            std::to_string(count++);
  if (!create(dir_).empty() && write(aside, header(code) + code) && std::rename(aside.c_str(), path.c_str()) == 0) {
    return path;
  }
  std::fprintf(stderr, "jax_monokernel: the kernel was not saved in %s (%s); the next process will compile it again\n",
               dir_.c_str(), std::strerror(errno));
  unlink(aside.c_str());
  return "";
}

CompileLock::CompileLock(const Cache& cache, const std::string& hash, const std::string& what, const IsCancelled& is_cancelled) {
  if (create(cache.dir()).empty()) return;
  file_ = open((cache.dir() + "/." + hash + ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file_ < 0) return;
  try {
    wait(what, is_cancelled);
  } catch (...) {  // an object that was not made is not destroyed
    close(file_);
    throw;
  }
}

void CompileLock::wait(const std::string& what, const IsCancelled& is_cancelled) const {
  const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(5);
  for (bool said = false; flock(file_, LOCK_EX | LOCK_NB) != 0 && (errno == EWOULDBLOCK || errno == EINTR); said = true) {
    if (!said) std::fprintf(stderr, "jax_monokernel: waiting for another process that compiles %s\n", what.c_str());
    if (std::chrono::steady_clock::now() >= end) {
      std::fprintf(stderr, "jax_monokernel: the other process takes too long; compiling here too\n");
      return;
    }
    check_cancelled(is_cancelled);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

CompileLock::~CompileLock() {
  if (file_ >= 0) close(file_);  // gives the lock back too
}

}  // namespace monokernel::gpu
