// What both stand-ins for ROCm's libraries are built on: complaints about calls that AMD's would not take, or would take amiss.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace rocm {

constexpr size_t kComplaintBytes = 1 << 14;
inline std::mutex complaint_mutex;
inline std::string last_complaint;  // what the library's text of the error says

// Notes what was wrong with a call, for the test to find in `all`, and returns the error that the call gives.
__attribute__((format(printf, 3, 4))) inline int complain(char* all, int error, const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::lock_guard lock(complaint_mutex);
  last_complaint = text;
  std::fprintf(stderr, "stand-in for ROCm: %s\n", text);
  const size_t used = std::strlen(all);
  std::snprintf(all + used, kComplaintBytes - used, "%s\n", text);
  return error;
}

}  // namespace rocm
