// A launch's part of a mailbox (mailbox.h): the kernel leaves tokens in host memory, from where the thread that waits for the
// kernel's end brings them to the mailbox.
#pragma once

#include <cstdint>
#include <vector>

#include "gpu/device.h"
#include "mailbox.h"

namespace monokernel::gpu {

class Mail {
 public:
  // operand: int32 [batch, 2] on the device, or nullptr: nobody listens. Waits for the stream, on which it is made. Throws Failure.
  Mail(const Device& device, const void* operand, int64_t batch, int64_t steps, void* stream);

  bool stopped() const { return rows_.stopped(); }
  // Whether somebody listens: then a launch that ends early is no failure.
  bool listens() const { return rows_.box != nullptr; }
  void set_cancelled() const { rows_.box->set_cancelled(); }

  // Makes the memory ready for a launch; its address on the device, nullptr if nobody listens. Throws Failure.
  uint64_t* open(PinnedMemory& memory);
  // Hands over what has come since the last time.
  void collect();

 private:
  const Device& device_;
  int64_t batch_, steps_;
  MailRows rows_;
  const uint64_t* words_ = nullptr;  // [batch, steps, 2]
  std::vector<int64_t> count_;       // of each request
  int64_t offset_ns_;                // from the device's clock to the host's: the least difference that was seen
  uint64_t last_ns_ = 0;
};

}  // namespace monokernel::gpu
