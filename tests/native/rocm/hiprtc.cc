// A stand-in for libhiprtc that compiles for this CPU: the source it is given, with the headers it is given, on the executor of
// native/gpu_host. What comes out is a shared library in place of a code object.
//
// HIPRTC_HOST_COMPILER is the command that makes @OUT@ of @SOURCE@, given as those words, in the folder of the headers.
#include <stdlib.h>
#include <sys/stat.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <type_traits>
#include <vector>

#include "gpu/compiler.h"
#include "numbers.h"
#include "strict.h"

namespace fs = std::filesystem;

extern "C" {
__attribute__((visibility("default"))) char hiprtc_complaints[rocm::kComplaintBytes] = "";
__attribute__((visibility("default"))) std::atomic<int> hiprtc_compiles = 0;
__attribute__((visibility("default"))) int hiprtc_major = 6, hiprtc_minor = 2;
}

namespace {

using namespace rocm;

struct Program {
  std::string source, name, log, code;
  std::vector<std::pair<std::string, std::string>> headers;
  bool compiled = false, sized = false, log_sized = false;
};

std::mutex g_mutex;
std::set<void*> g_programs;

template <typename... A>
int complain(int error, const char* format, A... arguments) {
  return rocm::complain(hiprtc_complaints, error, format, arguments...);
}

Program* find(void* program) {
  std::lock_guard lock(g_mutex);
  return g_programs.count(program) ? static_cast<Program*>(program) : nullptr;
}

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool write(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  return static_cast<bool>(std::ofstream(path, std::ios::binary) << text);
}

std::string replaced(std::string text, const std::string& word, const std::string& by) {
  for (size_t at; (at = text.find(word)) != std::string::npos;) text.replace(at, word.size(), by);
  return text;
}

int compile(Program& p) {
  const char* command = std::getenv("HIPRTC_HOST_COMPILER");
  if (!command) return complain(kInvalidOption, "HIPRTC_HOST_COMPILER is not set");
  char pattern[] = "/tmp/hiprtc-XXXXXX";
  const fs::path dir = mkdtemp(pattern);
  bool written = write(dir / p.name, p.source) &&
                 write(dir / "host.cc", "#include \"" + p.name + "\"\n#include \"about.h\"\n");
  for (const auto& [name, text] : p.headers) written &= write(dir / name, text);
  const std::string make = replaced(replaced(command, "@SOURCE@", "host.cc"), "@OUT@", "code");
  const std::string line = "cd '" + dir.string() + "' && (" + make + ") 2> log";
  const int status = written ? std::system(line.c_str()) : -1;
  p.log = read(dir / "log");
  p.code = read(dir / "code");
  fs::remove_all(dir);
  hiprtc_compiles++;
  p.compiled = true;
  return status == 0 ? 0 : kCompilation;
}

}  // namespace

EXPORT int hiprtcVersion(int* major, int* minor) {
  if (!major || !minor) return complain(kInvalidInput, "hiprtcVersion: a null pointer");
  *major = hiprtc_major;
  *minor = hiprtc_minor;
  return 0;
}

EXPORT const char* hiprtcGetErrorString(int error) {
  constexpr const char* kNames[] = {"HIPRTC_SUCCESS", "HIPRTC_ERROR_OUT_OF_MEMORY", "HIPRTC_ERROR_PROGRAM_CREATION_FAILURE",
                                    "HIPRTC_ERROR_INVALID_INPUT", "HIPRTC_ERROR_INVALID_PROGRAM", "HIPRTC_ERROR_INVALID_OPTION",
                                    "HIPRTC_ERROR_COMPILATION"};
  return error >= 0 && error < static_cast<int>(std::size(kNames)) ? kNames[error] : "Invalid HIPRTC error code";
}

EXPORT int hiprtcCreateProgram(void** program, const char* source, const char* name, int count, const char* const* texts,
                               const char* const* names) {
  if (!program || !source || !name || !*source) return complain(kInvalidInput, "hiprtcCreateProgram: no source or no name");
  if (count <= 0 || !texts || !names) return complain(kInvalidInput, "hiprtcCreateProgram: no headers");
  auto* p = new Program;
  p->source = source;
  p->name = name;
  std::set<std::string> seen;
  for (int i = 0; i < count; i++) {
    if (!texts[i] || !names[i] || !*names[i] || names[i][0] == '/' || !seen.insert(names[i]).second) {
      delete p;
      return complain(kInvalidInput, "hiprtcCreateProgram: header %d is null, has no relative name or comes twice", i);
    }
    p->headers.emplace_back(names[i], texts[i]);
  }
  std::lock_guard lock(g_mutex);
  g_programs.insert(p);
  *program = p;
  return 0;
}

EXPORT int hiprtcCompileProgram(void* program, int count, const char* const* options) {
  Program* p = find(program);
  if (!p) return complain(kInvalidProgram, "hiprtcCompileProgram: no such program");
  if (p->compiled) return complain(kInvalidProgram, "hiprtcCompileProgram: it was compiled before");
  std::string all;
  for (int i = 0; i < count; i++) {
    const std::string option = options[i];
    if (option.empty() || option.find(' ') != std::string::npos) {
      return complain(kInvalidOption, "hiprtcCompileProgram: option \"%s\" is not one word", option.c_str());
    }
    all += " " + option;
  }
  const bool known_arch = all.find(" --offload-arch=gfx942") == 0 || all.find(" --offload-arch=gfx950") == 0;
  if (!known_arch) return complain(kInvalidOption, "hiprtcCompileProgram: no architecture comes first in \"%s\"", all.c_str());
  // Without these, results would depend on the compiler, or the source would not be of the language that it is written in.
  for (const char* needed : {" -std=c++17", " -ffp-contract=off", " -O3"}) {
    if (all.find(needed) == std::string::npos) return complain(kInvalidOption, "hiprtcCompileProgram: %s is missing", needed);
  }
  if (all.find("fast-math") != std::string::npos) return complain(kInvalidOption, "hiprtcCompileProgram: fast-math breaks NaN");
  return compile(*p);
}

EXPORT int hiprtcGetProgramLogSize(void* program, size_t* size) {
  Program* p = find(program);
  if (!p || !size) return complain(kInvalidProgram, "hiprtcGetProgramLogSize: no such program");
  if (!p->compiled) return complain(kInvalidProgram, "hiprtcGetProgramLogSize: it was not compiled");
  *size = p->log.size() + 1;
  p->log_sized = true;
  return 0;
}

EXPORT int hiprtcGetProgramLog(void* program, char* log) {
  Program* p = find(program);
  if (!p || !log) return complain(kInvalidProgram, "hiprtcGetProgramLog: no such program");
  if (!p->log_sized) return complain(kInvalidProgram, "hiprtcGetProgramLog: its size was not asked for");
  std::memcpy(log, p->log.c_str(), p->log.size() + 1);
  return 0;
}

EXPORT int hiprtcGetCodeSize(void* program, size_t* size) {
  Program* p = find(program);
  if (!p || !size) return complain(kInvalidProgram, "hiprtcGetCodeSize: no such program");
  if (p->code.empty()) return complain(kInvalidProgram, "hiprtcGetCodeSize: it was not compiled");
  *size = p->code.size();
  p->sized = true;
  return 0;
}

EXPORT int hiprtcGetCode(void* program, char* code) {
  Program* p = find(program);
  if (!p || !code) return complain(kInvalidProgram, "hiprtcGetCode: no such program");
  if (!p->sized) return complain(kInvalidProgram, "hiprtcGetCode: its size was not asked for");
  std::memcpy(code, p->code.data(), p->code.size());
  return 0;
}

EXPORT int hiprtcDestroyProgram(void** program) {
  if (!program || !find(*program)) return complain(kInvalidProgram, "hiprtcDestroyProgram: no such program");
  std::lock_guard lock(g_mutex);
  g_programs.erase(*program);
  delete static_cast<Program*>(*program);
  *program = nullptr;
  return 0;
}

// How many programs were not destroyed.
EXPORT int hiprtc_programs() {
  std::lock_guard lock(g_mutex);
  return static_cast<int>(g_programs.size());
}

// The functions are those that the run time calls.
#define X(member, type, nvrtc, hiprtc) static_assert(std::is_same_v<decltype(hiprtc), type>);
MONOKERNEL_COMPILER_FUNCTIONS(X)
#undef X
