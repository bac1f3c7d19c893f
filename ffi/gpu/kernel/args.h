// What a launch is given. Included by the kernel and by the host code that launches it: fixed-size types, no includes.
#pragma once

namespace mk {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;
using i64 = long long;

// Why a launch ended early. The first unit to find a reason writes it.
struct Report {
  u32 reason;    // enum Reason
  u32 handoff;   // 1 to 15: h1_qkv to h15_final_squares (docs/kernel.md)
  u32 layer;
  u32 token;     // of this launch
  u32 unit;      // the waiter
  u32 word;      // index in the hand-off
  u32 expected;  // parity, or kNotZero; of h12_places, a number of units
  u32 seen;      // the word
};

constexpr u32 kNotLooked = ~0u - 1;  // word: there was none any more when the waiter looked again
constexpr u32 kNotZero = 2;  // expected of a word of packed activations, which have no parity: none of them is 0

enum Reason : u32 {
  kOk = 0,
  kTimeout = 1,
  kCancelled = 2,
  kInvalid = 3,  // a running request (unit) whose position (expected) or last token (seen) is out of range
  kMisplaced = 4,  // MK_NEAR: units of a group are not on one die; nothing has been done
};

// Device pointers; shapes as in jax_monokernel.decode. Everything carried is read and written in place.
struct Args {
  const void* streams;      // weights, those of each unit's waves one after the other (pages.h); MK_PLACED: see pages
  const float* constants;   // [constants]
  const void* embedding;    // weights [vocab][hidden]; null when tied
  const float* temperature;         // [batch]
  const i32* top_k;                 // [batch]
  const float* top_p;               // [batch]
  const float* min_p;               // [batch]
  const float* repetition_penalty;  // [batch]
  const float* presence_penalty;    // [batch]
  const i32* row_max_new_tokens;    // [batch]
  const i32* eos_token_id;          // [batch][eos_count]
  const float* logit_bias;          // [batch][vocab] or null
  const u32* key_data;              // [batch][2]
  void* k_cache;    // [batch][layers][kv_heads][capacity][head_dim], element: kv dtype
  void* v_cache;    // likewise
  i32* position;    // [batch]
  i32* last_token;  // [batch]
  i32* status;      // [batch] 0 running, 1 stopped, 2 full
  u8* seen;         // [batch][vocab]
  i32* tokens;      // [batch][max_new_tokens], filled with -1 by the kernel
  i32* lengths;     // [batch]
  float* log_probs; // [batch][max_new_tokens] or null, filled with 0 by the kernel
  void* workspace;  // layout/workspace.h; its exchange part zeroed before every launch
  Report* report;   // zeroed before every launch
  const u32* cancel;  // host memory that the device can read; not 0: stop
  u64* mailbox;       // host memory that the device can write, zeroed before the launch: [batch][max_new_tokens][2], a token
                      // with its log-probability, and when it was chosen (docs/kernel.md); or null
  void* trace;        // MK_TRACE builds: [units][trace events]; else null
  i64 capacity;        // positions
  i32 max_new_tokens;
  i32 eos_count;
  u64 timeout_ticks;  // of arch::ticks()
  // MK_PLACED builds; else null. The streams' pages, one after the other, lie anywhere in [pages + 1][kPageBytes] at `streams`.
  const i32* pages;      // [pages] where each begins, in kPlaceBytes
  const i32* die_units;  // [kDies] units that each die has; the first units are the first die's
};

constexpr i32 kPageBytes = 4096, kPlaceBytes = 256;
constexpr i32 kDies = 16;  // that a device can tell apart

}  // namespace mk
