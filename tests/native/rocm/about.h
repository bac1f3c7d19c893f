// Follows the stub in what the stand-in for hipRTC compiles: what hip.cc checks a launch against, and the memory that the kernel
// may touch, by the stub's own numbers.
#include "about_kernel.h"
#include "options.h"

namespace {

constexpr mk::u64 kKvElements = mk::u64{MK_BATCH} * MK_NUM_LAYERS * MK_NUM_KV_HEADS * MK_HEAD_DIM;

mk::u64 regions(const mk::Args& a, mk::host::Region* out) {
  constexpr mk::u64 kVectors = mk::u64{MK_BATCH} * 4;
  const mk::u64 capacity = static_cast<mk::u64>(a.capacity), tokens = static_cast<mk::u64>(a.max_new_tokens);
  mk::u64 n = 0;
  const auto add = [&](const char* name, const void* begin, mk::u64 bytes, bool writable, bool blank = false, bool narrow = false) {
    out[n++] = {name, static_cast<char*>(const_cast<void*>(begin)), bytes, writable, blank, narrow, 0};
  };
  const mk::u64 streams = mk::kStreamBytes;
  add("streams", a.streams, streams + (mk::kPlaced ? mk::kPageBytes : 0), false);
  add("pages", a.pages, mk::kPlaced ? streams / mk::kPageBytes * 4 : 0, false);
  add("die_units", a.die_units, mk::kPlaced ? mk::kDies * 4 : 0, false);
  add("constants", a.constants, mk::u64{MK_CONSTANTS} * 4, false);
  add("embedding", a.embedding, MK_TIED_HEAD ? 0 : mk::u64{MK_VOCAB_SIZE} * MK_HIDDEN_SIZE * mk::kWeightBytes, false);
  add("temperature", a.temperature, kVectors, false);
  add("top_k", a.top_k, kVectors, false);
  add("top_p", a.top_p, kVectors, false);
  add("min_p", a.min_p, kVectors, false);
  add("repetition_penalty", a.repetition_penalty, kVectors, false);
  add("presence_penalty", a.presence_penalty, kVectors, false);
  add("max_new_tokens", a.row_max_new_tokens, kVectors, false);
  add("eos_token_id", a.eos_token_id, kVectors * static_cast<mk::u64>(a.eos_count), false);
  add("logit_bias", a.logit_bias, a.logit_bias ? kVectors * MK_VOCAB_SIZE : 0, false);
  add("key_data", a.key_data, kVectors * 2, false);
  add("k_cache", a.k_cache, kKvElements * capacity * mk::kKvBytes, true);
  add("v_cache", a.v_cache, kKvElements * capacity * mk::kKvBytes, true);
  add("position", a.position, kVectors, true);
  add("last_token", a.last_token, kVectors, true);
  add("status", a.status, kVectors, true);
  add("seen", a.seen, mk::u64{MK_BATCH} * MK_VOCAB_SIZE, true, false, true);
  add("tokens", a.tokens, kVectors * tokens, true);
  add("lengths", a.lengths, kVectors, true);
  add("log_probs", a.log_probs, a.log_probs ? kVectors * tokens : 0, true);
  add("report", a.report, sizeof(mk::Report), true);
  add("cancel", a.cancel, 4, false);
  add("mailbox", a.mailbox, a.mailbox ? kVectors * tokens * 4 : 0, true);
  const mk::u64 words = static_cast<mk::u64>(mk::kWorkspace.exchange_bytes);
  add("workspace", a.workspace, words, true);
  add("workspace behind the words", a.workspace == nullptr ? nullptr : static_cast<char*>(a.workspace) + words,
      static_cast<mk::u64>(mk::kWorkspace.bytes) - words, true, true);
  add("trace", a.trace, MK_TRACE ? mk::u64{MK_UNITS} * 16 : 0, true);  // at least; hip.cc knows how much was allocated
  return n;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const rocm::About mk_about;
const rocm::About mk_about{MK_UNITS, mk::kThreads, MK_SHARED_BYTES, MK_TRACE, regions};
