// The hand-off between the threads of a team: everyone waits until everyone has arrived.
#pragma once

#include <atomic>
#include <cstdint>

namespace monokernel::cpu {

class Barrier {
 public:
  // Call while nobody waits.
  void reset(int members);

  // Arrives and returns the ticket to wait for. What a thread wrote before arriving is visible to those whose wait is over.
  uint32_t arrive();

  // Waits by sleeping. Callers spin on `epoch` first: the gaps inside a token are microseconds, and only when another
  // process has taken a core is sleeping the better choice.
  void sleep(uint32_t ticket);

  // The wait for `ticket` is over once this word differs from it (load with acquire order).
  const uint32_t* epoch() const { return &epoch_; }

 private:
  alignas(64) uint32_t epoch_ = 0;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  int members_ = 1;
};

}  // namespace monokernel::cpu
