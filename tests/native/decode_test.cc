// The native decode without Python, JAX or XLA: for sanitizers, which want every thread's code to be built with them, and for
// machines that are emulated.
//
// Usage: decode_test CASES, a file that make_cases.py wrote. Prints one line per check; the exit status is 0 if all held.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/barrier.h"
#include "cpu/decode.h"
#include "cpu/interrupt.h"
#include "cpu/isa.h"
#include "cpu/read_bandwidth.h"
#include "cpu/settings.h"
#include "cpu/team.h"

namespace ffi = xla::ffi;
namespace cpu = monokernel::cpu;

namespace {

void check(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// An array as XLA passes it. Its memory has exactly the size of its contents, so that address sanitizer sees every step
// outside.
class Array {
 public:
  Array(XLA_FFI_DataType dtype, std::vector<int64_t> dims, size_t bytes)
      : dims_(std::move(dims)), bytes_(bytes), data_(new char[bytes]) {
    buffer_.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer_.extension_start = nullptr;
    buffer_.dtype = dtype;
    buffer_.data = data_.get();
    buffer_.rank = static_cast<int64_t>(dims_.size());
    buffer_.dims = dims_.data();
  }
  Array(const Array& other) : Array(other.buffer_.dtype, other.dims_, other.bytes_) {
    std::memcpy(data_.get(), other.data_.get(), bytes_);
  }

  static std::unique_ptr<Array> read(std::istream& in) {
    char name[4];
    in.read(name, 4);
    int64_t rank = 0;
    in.read(reinterpret_cast<char*>(&rank), sizeof(rank));
    check(in.good() && rank >= 0 && rank < 8, "the cases file is damaged");
    std::vector<int64_t> dims(static_cast<size_t>(rank));
    in.read(reinterpret_cast<char*>(dims.data()), rank * 8);
    const auto [dtype, width] = type_of(std::string(name, 4));
    size_t bytes = width;
    for (int64_t d : dims) bytes *= static_cast<size_t>(d);
    auto array = std::make_unique<Array>(dtype, dims, bytes);
    in.read(array->data_.get(), static_cast<std::streamsize>(bytes));
    check(in.good(), "the cases file is damaged");
    return array;
  }

  const XLA_FFI_Buffer* buffer() const { return &buffer_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  template <typename T>
  ffi::Span<const T> span() const {
    return {as<T>(), bytes_ / sizeof(T)};
  }
  bool operator==(const Array& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data_.get(), other.data_.get(), bytes_) == 0;
  }
  const std::vector<int64_t>& dims() const { return dims_; }
  XLA_FFI_DataType dtype() const { return buffer_.dtype; }

 private:
  static std::pair<XLA_FFI_DataType, size_t> type_of(const std::string& name) {
    if (name == "S32 ") return {XLA_FFI_DataType_S32, 4};
    if (name == "S64 ") return {XLA_FFI_DataType_S64, 8};
    if (name == "U8  ") return {XLA_FFI_DataType_U8, 1};
    if (name == "U32 ") return {XLA_FFI_DataType_U32, 4};
    if (name == "F16 ") return {XLA_FFI_DataType_F16, 2};
    if (name == "BF16") return {XLA_FFI_DataType_BF16, 2};
    if (name == "F32 ") return {XLA_FFI_DataType_F32, 4};
    if (name == "F64 ") return {XLA_FFI_DataType_F64, 8};
    throw std::runtime_error("the cases file is damaged");
  }

  std::vector<int64_t> dims_;
  size_t bytes_;
  std::unique_ptr<char[]> data_;
  XLA_FFI_Buffer buffer_;
};

constexpr int kAttributes = 5, kOperands = 19, kCarried = 6, kFresh = 3;

struct Case {
  std::vector<std::unique_ptr<Array>> attributes, operands;
  std::unique_ptr<Array> tokens, log_probs;  // expected

  explicit Case(std::istream& in) {
    for (int i = 0; i < kAttributes; i++) attributes.push_back(Array::read(in));
    for (int i = 0; i < kOperands; i++) operands.push_back(Array::read(in));
    tokens = Array::read(in);
    log_probs = Array::read(in);
  }
};

// The results of one call, and its error if it had one.
struct Outcome {
  std::vector<std::unique_ptr<Array>> results;
  ffi::Error error;

  bool operator==(const Outcome& other) const {
    for (size_t i = 0; i < results.size(); i++) {
      if (!(*results[i] == *other.results[i])) return false;
    }
    return error.errc() == other.error.errc();
  }
};

Outcome run(const Case& c, bool aliased = true, int64_t steps = 0) {
  const int64_t batch = c.tokens->dims()[0], width = steps > 0 ? steps : c.tokens->dims()[1];
  Outcome outcome;
  std::vector<std::unique_ptr<Array>>& out = outcome.results;
  const auto bytes = [&](int64_t n) { return static_cast<size_t>(n) * 4; };
  out.push_back(std::make_unique<Array>(XLA_FFI_DataType_S32, std::vector{batch, width}, bytes(batch * width)));
  out.push_back(std::make_unique<Array>(XLA_FFI_DataType_S32, std::vector{batch}, bytes(batch)));
  out.push_back(std::make_unique<Array>(XLA_FFI_DataType_F32, std::vector{batch, width}, bytes(batch * width)));
  for (int i = kOperands - kCarried; i < kOperands; i++) out.push_back(std::make_unique<Array>(*c.operands[i]));

  std::vector<const XLA_FFI_Buffer*> in;
  for (int i = 0; i < kOperands; i++) {
    const bool carried = i >= kOperands - kCarried;
    in.push_back(carried && aliased ? out[i - (kOperands - kCarried) + kFresh]->buffer() : c.operands[i]->buffer());
  }
  using Any = ffi::AnyBuffer;
  const cpu::Operands operands{Any(in[0]),       cpu::F32(in[1]),  Any(in[2]),       cpu::F32(in[3]),  cpu::S32(in[4]),
                               cpu::F32(in[5]),  cpu::F32(in[6]),  cpu::F32(in[7]),  cpu::F32(in[8]),  cpu::S32(in[9]),
                               cpu::S32(in[10]), cpu::F32(in[11]), cpu::U32(in[12]), Any(in[13]),      Any(in[14]),
                               cpu::S32(in[15]), cpu::S32(in[16]), cpu::S32(in[17]), cpu::U8(in[18])};
  const auto result = [&](int i) { return out[static_cast<size_t>(i)]->buffer(); };
  cpu::Results results{cpu::S32(result(0)), cpu::S32(result(1)), cpu::F32(result(2)),
                       Any(result(3)),      Any(result(4)),      cpu::S32(result(5)),
                       cpu::S32(result(6)), cpu::S32(result(7)), cpu::U8(result(8))};
  const auto& a = c.attributes;
  outcome.error = cpu::decode(operands, results,
                              {a[0]->span<int64_t>(), a[1]->span<float>(), a[2]->span<int64_t>(), a[3]->span<double>(),
                               a[4]->span<int64_t>()});
  return outcome;
}

void use_threads(int threads) {
  setenv("MONOKERNEL_THREADS", std::to_string(threads).c_str(), 1);
  cpu::read_environment();
}

std::vector<Case> g_cases;

// Whether results are those of the reference: tokens exactly, log-probabilities up to the rounding of the weights' dtype.
void check_results(const Case& c, const Outcome& outcome, const std::string& isa) {
  check(outcome.error.success(), outcome.error.message());
  check(*outcome.results[0] == *c.tokens, isa + ": other tokens than the reference's");
  const XLA_FFI_DataType dtype = c.operands[0]->dtype();
  const float tolerance = dtype == XLA_FFI_DataType_F32 ? 2e-4f : dtype == XLA_FFI_DataType_F16 ? 0.02f : 0.15f;
  const auto got = outcome.results[2]->span<float>(), want = c.log_probs->span<float>();
  for (size_t i = 0; i < want.size(); i++) {
    check(std::fabs(got[i] - want[i]) <= tolerance, isa + ": other log-probabilities than the reference's");
  }
}

// The reference's results on every instruction set; the same bits with any number of threads, in place or not.
void every_build_and_thread_count() {
  for (const std::string& isa : cpu::available_isas()) {
    check(cpu::set_isa(isa).empty(), "set_isa");
    for (const Case& c : g_cases) {
      use_threads(1);
      const Outcome alone = run(c);
      check_results(c, alone, isa);
      for (int threads : {2, 3, 8}) {
        use_threads(threads);
        check(run(c) == alone, isa + ": other bits with " + std::to_string(threads) + " threads");
      }
      check(run(c, /*aliased=*/false) == alone, isa + ": other bits where results are not in place");
    }
  }
  cpu::set_isa("");
}

void calls_from_several_threads() {
  use_threads(3);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (const Case& c : g_cases) {
    threads.emplace_back([&c, &wrong] {
      for (int i = 0; i < 10; i++) wrong += !(*run(c).results[0] == *c.tokens);
    });
  }
  for (std::thread& t : threads) t.join();
  check(wrong == 0, "other tokens with company");
}

void cancelling() {
  use_threads(2);
  const Case& c = g_cases[0];
  // Every call ends with its tokens or as cancelled; nothing hangs, and later calls are not affected.
  std::atomic<bool> done = false;
  std::thread canceller([&done] {
    while (!done) {
      cpu::cancel_all();
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  int cancelled = 0;
  for (int i = 0; i < 100; i++) {
    const Outcome outcome = run(c);
    if (outcome.error.success()) {
      check(*outcome.results[0] == *c.tokens, "other tokens beside cancellations");
    } else {
      check(outcome.error.errc() == ffi::ErrorCode::kCancelled, outcome.error.message());
      cancelled++;
    }
  }
  done = true;
  canceller.join();
  check(cancelled > 0, "nothing was cancelled");
  check(*run(c).results[0] == *c.tokens, "a later call was affected");
}

void read_probe() {
  for (int threads : {1, 3}) {
    for (double rate : cpu::read_bandwidth(100'001, threads, 20)) check(rate > 0, "nothing was read");
  }
}

// What one thread writes before a hand-off, all see after it, however long they spin, and in every round.
void hand_offs() {
  constexpr int kThreads = 4, kRounds = 3000;
  cpu::Barrier barrier;
  barrier.reset(kThreads);
  int values[kThreads] = {};  // not atomic: the barrier alone orders these
  std::atomic<int> wrong = 0;
  auto wait = [&barrier](int spins) {
    const uint32_t ticket = barrier.arrive();
    for (int i = 0; i < spins; i++) {
      if (__atomic_load_n(barrier.epoch(), __ATOMIC_ACQUIRE) != ticket) return;
    }
    barrier.sleep(ticket);
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; t++) {
    threads.emplace_back([&, t] {
      for (int round = 1; round <= kRounds; round++) {
        values[t] = round;
        wait((round * 7 + t) % 50);
        for (int value : values) wrong += value != round;
        wait((round * 3 + t) % 50);
      }
    });
  }
  for (std::thread& t : threads) t.join();
  check(wrong == 0, "a hand-off let a thread pass early");
}

void teams() {
  for (int threads : {1, 2, 5}) {
    cpu::Team team(threads);
    std::vector<int> calls(static_cast<size_t>(threads));  // not atomic: each thread has its own, read after run()
    for (int i = 0; i < 200; i++) team.run([&calls](int t) { calls[static_cast<size_t>(t)]++; });
    for (int n : calls) check(n == 200, "a thread of a team missed a call");
  }
  for (int i = 0; i < 50; i++) cpu::Team unused(3);  // gone before its threads have begun

  std::atomic<int> running = 0;
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; c++) {
    callers.emplace_back([&running, c] {
      for (int i = 0; i < 30; i++) {
        cpu::Lease lease(1 + (c + i) % 4, [] { return false; });
        check(lease.team() != nullptr, "no team");
        lease.team()->run([&running](int) { running++; });
      }
    });
  }
  for (std::thread& t : callers) t.join();
  check(running > 0, "nothing ran");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return std::fprintf(stderr, "usage: decode_test CASES\n"), 2;
  const std::pair<const char*, void (*)()> tests[] = {
      {"hand-offs", hand_offs},
      {"teams", teams},
      {"every build and thread count", every_build_and_thread_count},
      {"calls from several threads", calls_from_several_threads},
      {"cancelling", cancelling},
      {"read probe", read_probe},
  };
  try {
    std::ifstream file(arguments[1], std::ios::binary);
    int64_t cases = 0;
    file.read(reinterpret_cast<char*>(&cases), sizeof(cases));
    check(file.good() && cases > 0, "cannot read the cases");
    for (int64_t i = 0; i < cases; i++) g_cases.emplace_back(file);
    for (const auto& [name, test] : tests) {
      const auto start = std::chrono::steady_clock::now();
      test();
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      std::printf("%s: ok (%.1f s)\n", name, seconds.count());
      std::fflush(stdout);
    }
  } catch (const std::exception& e) {
    std::printf("FAILED: %s\n", e.what());
    return 1;
  }
  return 0;
}
