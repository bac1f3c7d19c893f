// Values by key that are made once, by whichever thread asks first.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <mutex>

#include "gpu/failure.h"

namespace monokernel::gpu {

template <typename Key, typename Value>
class OnceMap {
 public:
  // The value of `key`, made by `make()` if there is none. Threads that ask for the same key meanwhile wait; if `make` throws, the
  // next one tries again; if they are cancelled, they throw. Values stay for the life of the map.
  template <typename Make>
  std::shared_ptr<Value> get(const Key& key, const Make& make, const IsCancelled& is_cancelled = {}) {
    std::shared_ptr<Slot> slot;
    {
      std::lock_guard lock(mutex_);
      auto& found = slots_[key];
      if (!found) found = std::make_shared<Slot>();
      slot = found;
    }
    std::unique_lock lock(slot->mutex, std::defer_lock);
    while (!lock.try_lock_for(std::chrono::milliseconds(20))) check_cancelled(is_cancelled);
    if (!slot->value) slot->value = make();
    return slot->value;
  }

 private:
  struct Slot {
    std::timed_mutex mutex;
    std::shared_ptr<Value> value;
  };
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<Slot>> slots_;
};

}  // namespace monokernel::gpu
