#include "gpu/run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <iterator>
#include <string>
#include <thread>

#include "cpu/interrupt.h"
#include "gpu/device.h"
#include "gpu/failure.h"
#include "gpu/mail.h"
#include "gpu/settings.h"
#include "gpu/trace.h"

namespace monokernel::gpu {
namespace {

using std::chrono::microseconds;
using Clock = std::chrono::steady_clock;

Failure cancelled() {
  return Failure(Code::kCancelled,
                 "decode was cancelled, by Ctrl-C or jax_monokernel.cancel(). Its tokens are lost. The state that it was given "
                 "is as before if it was not donated: call decode with it again. A donated state is gone: make a new one with "
                 "prefill");
}

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", value);
  return text;
}

// Which word a wait missed, in the words of docs/kernel.md.
std::string missed(const mk::Report& r) {
  constexpr const char* kHandoffs[] = {"h1_qkv",     "h2_attended", "h3_partial",   "h4_projected",
                                       "h5_inner",   "h6_residual", "h7_candidate", "h8_token",
                                       "h9_final",   "h10_out_sums", "h11_down_sums", "h12_places",
                                       "h13_projected_squares", "h14_residual_squares", "h15_final_squares"};
  const std::string handoff = r.handoff >= 1 && r.handoff <= std::size(kHandoffs) ? kHandoffs[r.handoff - 1]
                                                                                  : "hand-off " + std::to_string(r.handoff);
  if (handoff == "h12_places") {
    return "at the start for h12_places: expected all " + std::to_string(r.expected) + " units to have looked where they are, saw " + hex(r.seen);
  }
  const bool of_a_token = handoff == "h7_candidate" || handoff == "h8_token" || handoff == "h9_final" || handoff == "h15_final_squares";
  const std::string where =
      (of_a_token ? "after the layers of token " : "in layer " + std::to_string(r.layer) + " of token ") + std::to_string(r.token);
  if (r.word == mk::kNotLooked) return where + " for a word of " + handoff + ", which came too late";
  return where + " for word " + std::to_string(r.word) + " of " + handoff + ": expected " +
         (r.expected == mk::kNotZero ? "activations that are not 0" : "parity " + std::to_string(r.expected)) + ", saw " + hex(r.seen);
}

// What a report says.
Failure reported(const mk::Report& r, int64_t vocab_size, double timeout_s) {
  if (r.reason == mk::kCancelled) return cancelled();
  if (r.reason == mk::kInvalid) {  // the reason's own use of the fields: request, position and token
    const std::string request = std::to_string(r.unit);
    const auto position = static_cast<int32_t>(r.expected), token = static_cast<int32_t>(r.seen);
    return Failure(Code::kInvalid, position < 0 ? "position of request " + request + " is " + std::to_string(position) +
                                                      "; expected at least 0"
                                                : "last_token of request " + request + " is " + std::to_string(token) +
                                                      "; expected 0 to " + std::to_string(vocab_size - 1));
  }
  if (r.reason != mk::kTimeout) {
    return Failure(Code::kInternal, "the kernel ended for an unknown reason (" + std::to_string(r.reason) + ")");
  }
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%g", timeout_s);
  return Failure(Code::kTimeout,
                 "a wait inside the kernel took more than " + std::string(seconds) + " s, and decode ended early. Unit " +
                     std::to_string(r.unit) + " waited " + missed(r) +
                     ". The device can be used further. If it is shared or runs under a debugger, allow longer waits with "
                     "MONOKERNEL_TIMEOUT (seconds); otherwise please report this");
}

// The results of a call that ends before its launch.
void give_back(const Driver& api, const Call& call, void* stream) {
  const mk::Args& a = call.args;
  const size_t rows = static_cast<size_t>(call.request.batch), tokens = rows * static_cast<size_t>(a.max_new_tokens);
  api.check(api.set_async(a.tokens, 0xff, tokens * sizeof(int32_t), stream), "write the results");
  api.check(api.set_async(a.lengths, 0, rows * sizeof(int32_t), stream), "write the results");
  if (a.log_probs) api.check(api.set_async(a.log_probs, 0, tokens * sizeof(float), stream), "write the results");
  for (const Copy& copy : call.copies) {
    api.check(api.copy_async(copy.to, const_cast<void*>(copy.from), copy.bytes, stream), "copy the state");
  }
}

// Sleeps a small part of the time waited so far, so that short calls return at once and long ones leave the CPU to others.
void pause(Clock::time_point start) {
  const auto waited = std::chrono::duration_cast<microseconds>(Clock::now() - start);
  if (waited < microseconds(500)) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(std::min(waited / 128, microseconds(50)));
  }
}

// Launches and waits for the end. The device is locked and current.
template <typename IsCancelled>
mk::Report launch(Device& device, const Call& call, const Request& request, const Kernel& kernel, void* stream, const Settings& s,
                  Mail& mail, const IsCancelled& is_cancelled) {
  const Driver& api = device.api();
  const WorkspaceSize workspace = workspace_size(request);
  Exchange& exchange = device.exchange();
  std::atomic_ref<uint32_t> cancel(exchange.host->cancel);
  cancel.store(0);
  exchange.host->report = {};
  Trace trace(device, request, s.trace);

  mk::Args args = call.args;
  args.report = static_cast<mk::Report*>(exchange.report);
  args.cancel = static_cast<const uint32_t*>(exchange.host_on_device);
  args.mailbox = reinterpret_cast<mk::u64*>(mail.open(exchange.mail));
  args.trace = trace.buffer();
  args.timeout_ticks = device.ticks(s.timeout_s());
  void* parameters[] = {&args};

  try {
    api.check(api.set_async(exchange.report, 0, sizeof(mk::Report), stream), "clear the report");
    api.check(api.set_async(args.workspace, 0, static_cast<size_t>(workspace.exchange_bytes), stream), "clear the workspace");
    for (const Copy& copy : call.copies) {
      api.check(api.copy_async(copy.to, const_cast<void*>(copy.from), copy.bytes, stream), "copy the state");
    }
    trace.clear(stream);
    api.check(api.launch_cooperative(kernel.function, kernel.units, 1, 1, static_cast<unsigned>(kernel.threads), 1, 1,
                                     kernel.shared_bytes, stream, parameters),
              "launch the kernel");
    api.check(api.copy_out_async(&exchange.host->report, exchange.report, sizeof(mk::Report), stream), "read the report");
    api.check(api.event_record(exchange.event, stream), "record an event");
  } catch (const Failure&) {
    api.stream_wait(stream);  // the next call must not find this one's work under way
    throw;
  }
  const Clock::time_point start = Clock::now();
  int state;
  while ((state = api.event_query(exchange.event)) == kNotReady) {
    if (is_cancelled() || mail.stopped()) cancel.store(1);
    mail.collect();
    pause(start);
  }
  api.check(state, "run the kernel");
  mail.collect();
  trace.save(stream);
  return exchange.host->report;
}

}  // namespace

void run(Vendor vendor, int ordinal, void* stream, const Call& call) {
  const uint64_t cancel_at_start = __atomic_load_n(cpu::cancel_epoch(), __ATOMIC_RELAXED);
  const auto is_cancelled = [&] { return __atomic_load_n(cpu::cancel_epoch(), __ATOMIC_RELAXED) != cancel_at_start; };
  const cpu::InterruptScope interrupts;

  Device& device = Device::get(vendor, ordinal);
  device.open();
  const Device::Current current(device);
  const Settings s = settings();
  const double timeout_s = s.timeout_s();
  Request request = call.request;
  request.trace = !s.trace.empty();
  request.racecheck = s.racecheck;
  request.near = request.program.groups > 1 && device.api().vendor == Vendor::kRocm && !s.chip_wide && !device.misplaced();
  Mail mail(device, call.mailbox, request.batch, call.args.max_new_tokens, stream);
  const auto ends_early = [&] {
    if (is_cancelled() && !mail.listens()) throw cancelled();
    if (is_cancelled()) mail.set_cancelled();
    return mail.stopped();
  };
  // None if the call ends before there is one.
  const auto wait_for_kernel = [&]() -> std::shared_ptr<const Kernel> {
    try {
      return device.kernel(request_key(call.attributes, request), request, [&] { return is_cancelled() || mail.stopped(); });
    } catch (const Failure& failure) {
      if (failure.code != Code::kCancelled || !ends_early()) throw;
      return nullptr;
    }
  };
  std::unique_lock<std::timed_mutex> lock(device.launching(), std::defer_lock);
  for (;;) {
    const std::shared_ptr<const Kernel> kernel = wait_for_kernel();
    if (!kernel) return give_back(device.api(), call, stream);
    while (!lock.try_lock_for(std::chrono::milliseconds(1))) {
      if (ends_early()) return give_back(device.api(), call, stream);
    }
    if (ends_early()) return give_back(device.api(), call, stream);
    const mk::Report report = launch(device, call, request, *kernel, stream, s, mail, is_cancelled);
    lock.unlock();
    if (report.reason == mk::kOk) return;
    if (report.reason == mk::kCancelled && mail.listens()) {
      if (is_cancelled()) mail.set_cancelled();
      return;
    }
    if (report.reason != mk::kMisplaced || !request.near) throw reported(report, request.program.vocab_size, timeout_s);
    // Groups are elsewhere than they should be, and nothing has been done yet: the other kernel does not mind.
    device.set_misplaced();
    request.near = false;
  }
}

}  // namespace monokernel::gpu
