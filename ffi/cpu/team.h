// Persistent threads that run decode calls together.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace monokernel::cpu {

// Reusable memory of one call: grows, is never shrunk, and belongs to a team so that repeated calls allocate nothing.
class Arena {
 public:
  // 64-byte aligned memory of at least `bytes`, or nullptr. Contents are undefined. Invalidates what it returned before.
  void* reserve(size_t bytes);

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }
  Arena& arena() { return arena_; }

  // Calls work(0) on this thread and work(1) ... work(threads - 1) on the team's own, and returns when all have.
  void run(const std::function<void(int)>& work);

 private:
  struct State;
  static void serve(std::shared_ptr<State> state, int index);
  void dismiss();

  int threads_;
  Arena arena_;
  std::shared_ptr<State> state_;
};

// A team for the time of one call, from the process's pool.
//
// Waits until enough CPUs are free of other calls, and until it is its turn: teams that spin against each other for the same
// cores would all be slow.
// A call that wants more threads than there are CPUs gets them once nothing else runs.
class Lease {
 public:
  // `give_up` is polled while waiting; if it returns true the lease is empty.
  Lease(int threads, const std::function<bool()>& give_up);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Team* team() const { return team_.get(); }

 private:
  std::unique_ptr<Team> team_;
};

// Whether the calls that run have at least as many threads as there are CPUs, so that anything else slows them.
bool all_cpus_decode();

}  // namespace monokernel::cpu
