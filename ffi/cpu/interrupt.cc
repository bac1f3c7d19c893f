#include "cpu/interrupt.h"

#include <signal.h>

#include <cerrno>
#include <mutex>

namespace monokernel::cpu {
namespace {

uint64_t g_epoch = 0;
std::mutex g_mutex;
int g_scopes = 0;
bool g_installed = false;
struct sigaction g_previous;

void on_interrupt(int signal, siginfo_t* info, void* context) {
  int saved_errno = errno;
  cancel_all();
  if (g_previous.sa_flags & SA_SIGINFO) {
    g_previous.sa_sigaction(signal, info, context);
  } else if (g_previous.sa_handler != SIG_DFL && g_previous.sa_handler != SIG_IGN) {
    g_previous.sa_handler(signal);
  }
  errno = saved_errno;
}

bool has_handler(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) || (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == on_interrupt;
}

}  // namespace

const uint64_t* cancel_epoch() { return &g_epoch; }

void cancel_all() { __atomic_fetch_add(&g_epoch, 1, __ATOMIC_RELAXED); }

InterruptScope::InterruptScope() {
  std::lock_guard lock(g_mutex);
  if (g_scopes++ > 0) return;
  struct sigaction current;
  if (sigaction(SIGINT, nullptr, &current) != 0 || !has_handler(current) || is_ours(current)) return;
  g_previous = current;
  struct sigaction ours = {};
  ours.sa_sigaction = on_interrupt;
  ours.sa_flags = SA_SIGINFO | (current.sa_flags & (SA_ONSTACK | SA_RESTART));
  ours.sa_mask = current.sa_mask;
  g_installed = sigaction(SIGINT, &ours, nullptr) == 0;
}

InterruptScope::~InterruptScope() {
  std::lock_guard lock(g_mutex);
  if (--g_scopes > 0 || !g_installed) return;
  struct sigaction current;
  // Somebody may have installed another handler meanwhile; theirs stays.
  if (sigaction(SIGINT, nullptr, &current) == 0 && is_ours(current)) sigaction(SIGINT, &g_previous, nullptr);
  g_installed = false;
}

}  // namespace monokernel::cpu
