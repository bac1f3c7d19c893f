#include "cpu/team.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <list>
#include <thread>

#include "cpu/cpus.h"

namespace monokernel::cpu {

void Arena::Free::operator()(void* p) const { std::free(p); }

void* Arena::reserve(size_t bytes) {
  if (bytes > bytes_) {
    bytes = (bytes + 63) / 64 * 64;
    memory_.reset();
    bytes_ = 0;
    memory_.reset(std::aligned_alloc(64, bytes));
    if (memory_) bytes_ = bytes;
  }
  return memory_.get();
}

// Shared with the team's threads, which may outlive the Team object by a moment.
struct Team::State {
  alignas(64) std::atomic<uint32_t> generation{0};  // counts calls
  alignas(64) std::atomic<int> running{0};
  std::atomic<bool> stop{false};
  const std::function<void(int)>* work = nullptr;
};

namespace {

// Spins briefly, since calls often follow each other, then sleeps until `word` differs from `old`.
template <typename T>
void wait_for_change(std::atomic<T>& word, T old) {
  for (int i = 0; i < 2000; i++) {
    if (word.load(std::memory_order_acquire) != old) return;
    std::this_thread::yield();
  }
  word.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int threads) : threads_(threads), state_(std::make_shared<State>()) {
  try {
    for (int i = 1; i < threads; i++) std::thread(serve, state_, i).detach();
  } catch (...) {  // the system gives no more of them: those that there are leave
    dismiss();
    throw;
  }
}

Team::~Team() { dismiss(); }

void Team::dismiss() {
  state_->stop.store(true, std::memory_order_relaxed);
  state_->generation.fetch_add(1, std::memory_order_release);
  state_->generation.notify_all();
}

void Team::serve(std::shared_ptr<State> state, int index) {
  for (uint32_t seen = 0;; seen++) {
    while (state->generation.load(std::memory_order_acquire) == seen) wait_for_change(state->generation, seen);
    if (state->stop.load(std::memory_order_relaxed)) return;
    (*state->work)(index);
    if (state->running.fetch_sub(1, std::memory_order_acq_rel) == 1) state->running.notify_one();
  }
}

void Team::run(const std::function<void(int)>& work) {
  if (threads_ == 1) return work(0);
  state_->work = &work;
  state_->running.store(threads_ - 1, std::memory_order_relaxed);
  state_->generation.fetch_add(1, std::memory_order_release);
  state_->generation.notify_all();
  work(0);
  for (int left; (left = state_->running.load(std::memory_order_acquire)) != 0;) wait_for_change(state_->running, left);
}

namespace {

struct Pool {
  std::mutex mutex;
  std::condition_variable released;
  int busy = 0;  // threads of teams on lease
  int calls = 0;  // teams on lease
  std::list<int> waiting;  // calls that have no team yet, by the number of threads that they want
  std::vector<std::unique_ptr<Team>> idle;
};

// Never destroyed: detached threads may still look at it while the process exits.
Pool* g_pool = nullptr;

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    // A forked child has none of the threads: start over, and leave the parent's objects alone.
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool;
}

}  // namespace

Lease::Lease(int threads, const std::function<bool()>& give_up) {
  Pool& p = pool();
  const int cpus = available_cpus();
  std::unique_lock lock(p.mutex);
  // In the order in which they came: one that wants many threads would otherwise wait for a moment when nothing else runs.
  const auto here = p.waiting.insert(p.waiting.end(), threads);
  const auto may_go = [&] { return p.waiting.begin() == here && (p.calls == 0 || p.busy + threads <= cpus); };
  while (!may_go() && !give_up()) p.released.wait_for(lock, std::chrono::milliseconds(20));
  const bool goes = may_go();
  p.waiting.erase(here);
  p.released.notify_all();
  if (!goes) return;
  p.busy += threads;
  p.calls++;
  for (size_t i = p.idle.size(); i-- > 0;) {
    if (p.idle[i]->threads() == threads) {
      team_ = std::move(p.idle[i]);
      p.idle.erase(p.idle.begin() + static_cast<std::ptrdiff_t>(i));
      return;
    }
  }
  // Teams of other sizes hold threads and memory that may never be asked for again.
  p.idle.clear();
  lock.unlock();
  try {
    team_ = std::make_unique<Team>(threads);
  } catch (...) {
    lock.lock();
    p.busy -= threads;
    p.calls--;
    throw;
  }
}

Lease::~Lease() {
  if (!team_) return;
  Pool& p = pool();
  {
    std::lock_guard lock(p.mutex);
    p.busy -= team_->threads();
    p.calls--;
    p.idle.push_back(std::move(team_));
  }
  p.released.notify_all();
}

bool all_cpus_decode() {
  Pool& p = pool();
  std::unique_lock lock(p.mutex);
  const int busy = p.busy;
  lock.unlock();
  return busy > 0 && busy >= available_cpus();
}

}  // namespace monokernel::cpu
