#include "cpu/barrier.h"

#include <thread>

namespace monokernel::cpu {

void Barrier::reset(int members) {
  members_ = members;
  arrived_.store(0, std::memory_order_relaxed);
}

uint32_t Barrier::arrive() {
  std::atomic_ref<uint32_t> epoch(epoch_);
  uint32_t ticket = epoch.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
    arrived_.store(0, std::memory_order_relaxed);
    // Sequentially consistent with `sleepers_` below: either the sleeper sees the new epoch or we see the sleeper.
    epoch.store(ticket + 1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) epoch.notify_all();
  }
  return ticket;
}

void Barrier::sleep(uint32_t ticket) {
  std::atomic_ref<uint32_t> epoch(epoch_);
  // If the missing thread waits for this very core, giving way is enough. If it has just been woken, it needs tens of
  // microseconds to get here: sleeping meanwhile would make it wait for us in turn, and so on at every hand-off.
  for (int i = 0; i < 1000; i++) {
    std::this_thread::yield();
    if (epoch.load(std::memory_order_acquire) != ticket) return;
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (epoch.load(std::memory_order_seq_cst) == ticket) epoch.wait(ticket, std::memory_order_seq_cst);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace monokernel::cpu
