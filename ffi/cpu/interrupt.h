// Stops running decodes from outside: by Ctrl-C or by jax_monokernel.cancel().
#pragma once

#include <cstdint>

namespace monokernel::cpu {

// Counts cancellations. A call remembers the value it started with and leaves, within a token, once it has changed.
const uint64_t* cancel_epoch();

// Cancels every decode that is running or waiting in this process.
void cancel_all();

// While an object of this class lives, SIGINT cancels running decodes and is then passed on to the handler that was there.
//
// The main thread usually waits inside XLA during a decode, where Python cannot run its own handler, so the signal has to be
// seen here. A process that ignores SIGINT, or leaves it to the default action, is left as it is.
class InterruptScope {
 public:
  InterruptScope();
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;
};

}  // namespace monokernel::cpu
