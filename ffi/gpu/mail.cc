#include "gpu/mail.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "gpu/failure.h"

namespace monokernel::gpu {

Mail::Mail(const Device& device, const void* operand, int64_t batch, int64_t steps, void* stream)
    : device_(device), batch_(batch), steps_(steps), count_(static_cast<size_t>(batch)),
      offset_ns_(std::numeric_limits<int64_t>::max()) {
  if (!operand) return;
  const Driver& api = device.api();
  std::vector<int32_t> numbers(static_cast<size_t>(batch) * 2);
  api.check(api.copy_out_async(numbers.data(), const_cast<void*>(operand), numbers.size() * sizeof(int32_t), stream), "read an operand");
  api.check(api.stream_wait(stream), "read an operand");
  if (const std::string error = open_mail(numbers.data(), batch, steps, &rows_); !error.empty()) throw Failure(Code::kInvalid, error);
}

uint64_t* Mail::open(PinnedMemory& memory) {
  if (!listens()) return nullptr;
  const size_t bytes = static_cast<size_t>(batch_ * steps_) * 2 * sizeof(uint64_t);
  memory.reserve(device_.api(), bytes);
  std::memset(memory.host, 0, bytes);
  words_ = static_cast<const uint64_t*>(memory.host);
  return static_cast<uint64_t*>(memory.on_device);
}

void Mail::collect() {
  if (!words_) return;
  const auto load = [](const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); };
  struct Found {
    int64_t request;
    uint64_t word, time;
  };
  std::vector<Found> all;
  for (size_t before = ~size_t{0}; before != all.size();) {  // a token of each request, then the next
    before = all.size();
    for (int64_t b = 0; b < batch_; b++) {
      int64_t& n = count_[static_cast<size_t>(b)];
      if (n == steps_) continue;
      const uint64_t* at = words_ + (b * steps_ + n) * 2;
      const uint64_t word = load(at), time = load(at + 1);
      if (word == 0 || time == 0) continue;
      n++;
      all.push_back({b, word, time});
    }
  }
  // A token is seen a moment after it was written, so the least difference is the best.
  const auto now = static_cast<int64_t>(Mailbox::now_ns());
  for (const Found& f : all) offset_ns_ = std::min(offset_ns_, now - static_cast<int64_t>(f.time));
  for (const Found& f : all) {
    last_ns_ = std::max(last_ns_, static_cast<uint64_t>(static_cast<int64_t>(f.time) + offset_ns_));
    const uint32_t bits = static_cast<uint32_t>(f.word);
    float log_prob;
    std::memcpy(&log_prob, &bits, sizeof(log_prob));
    rows_.put(f.request, static_cast<int32_t>(f.word >> 32 & 0x7fffffffu), log_prob, last_ns_);
  }
}

}  // namespace monokernel::gpu
