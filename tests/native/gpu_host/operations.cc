// Device memory, fences and the clock, as arch/host.h calls them.
#include <cstring>

#include "machine.h"

namespace mk::host {

namespace {

using Kind = Races::Kind;

void watch(const void* p, u64 bytes, Kind kind, const void* pc, Where where) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(where, "%p is no multiple of %llu bytes", p, bytes);
  if (machine->races) {
    machine->lane().where = where;
    machine->races->access(p, bytes, kind, pc);
    return;
  }
  const char* at = static_cast<const char*>(p);
  const Region* end = machine->options.regions + machine->options.region_count;
  const Region*& last = machine->last_watched;
  if (last == end || at < last->begin || at + bytes > last->begin + last->bytes) {
    for (last = machine->options.regions; last != end; last++) {
      if (at >= last->begin && at + bytes <= last->begin + last->bytes) break;
    }
    if (last == end) fail(where, "%p is in none of the kernel's operands", p);
  }
  if (kind != Kind::kRead && !last->writable) fail(where, "%s is only to be read", last->name);
}

// The number of the word at `p`, the first of `bytes`.
size_t word_at(const void* p, u64 bytes, Kind kind, const void* pc, Where where) {
  const size_t i = machine->words.find(p, bytes);
  if (i == Words::kNone) fail(where, "%p is no word of an operand that the kernel may change", p);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(where, "%p is no multiple of %llu bytes", p, bytes);
  if (machine->races) {
    machine->lane().where = where;
    machine->races->access(p, bytes, kind, pc);
  }
  return i;
}

void check_near(size_t word, size_t count, Where where) {
  if (machine->near.empty()) return;
  for (size_t i = word; i < word + count; i++) {
    const auto found = machine->near.find(i);
    if (found != machine->near.end() && found->second != die() + 1) fail(where, "a word that stays on die %u is read on die %u", found->second - 1, die());
  }
}

void count_reading(const char* p) {
  const Homes& homes = machine->options.homes;
  if (p < homes.begin || p >= homes.begin + homes.pages * 4096) return;
  const bool near = homes.of_pages[(p - homes.begin) / 4096] == homes.of_dies[die()];
  (near ? machine->statistics.near : machine->statistics.far) += 16;
}

}  // namespace

u32 load_word(const u32* p, Where where) {
  const Lane& me = machine->lane();
  const size_t i = word_at(p, 4, Kind::kAtomicRead, __builtin_return_address(0), where);
  check_near(i, 1, where);
  const u32 value = machine->words.load(p, i, me.unit, me.home->index);
  machine->pass(where, false);
  return value;
}

Vec4 load_words(const u32* p, Where where) {
  const size_t unit = machine->lane().unit, wave = machine->lane().home->index;
  const size_t i = word_at(p, 16, Kind::kAtomicRead, __builtin_return_address(0), where);
  check_near(i, 4, where);
  Words& words = machine->words;
  const Vec4 value{words.load(p, i, unit, wave), words.load(p + 1, i + 1, unit, wave), words.load(p + 2, i + 2, unit, wave),
                   words.load(p + 3, i + 3, unit, wave)};
  machine->pass(where, false);
  return value;
}

void store_word(u32* p, u32 value, Where where) {
  const Lane& me = machine->lane();
  machine->words.store(p, word_at(p, 4, Kind::kAtomicWrite, __builtin_return_address(0), where), value, me.unit, me.home->index);
  machine->pass(where, true);
}

// The halves of a word are one unit's.
void store_half(u16* p, u32 value, Where where) {
  const u32 high = reinterpret_cast<uintptr_t>(p) % 4 == 2;
  u32* word = reinterpret_cast<u32*>(p - high);
  const Lane& me = machine->lane();
  const size_t i = word_at(word, 4, Kind::kAtomicWrite, __builtin_return_address(0), where);
  const u32 before = machine->words.own(word, i, me.unit);
  value = high ? (before & 0xffffu) | value << 16 : (before & 0xffff0000u) | (value & 0xffffu);
  machine->words.store(word, i, value, me.unit, me.home->index);
  machine->pass(where, true);
}

// A word that stays on a die: nobody on another one ever reads it.
void store_near_word(u32* p, u32 value, Where where) {
  machine->near[word_at(p, 4, Kind::kAtomicWrite, __builtin_return_address(0), where)] = die() + 1;
  store_word(p, value, where);
}

bool claim(u32* p, Where where) {
  const bool first = machine->words.claim(p, word_at(p, 4, Kind::kAtomicWrite, __builtin_return_address(0), where));
  machine->pass(where, true);
  return first;
}

u32 die() { return machine->options.dies ? machine->options.dies[machine->lane().unit] : 0; }

u32 add(u32* p, u32 value, Where where) {
  const u32 before = machine->words.add(p, word_at(p, 4, Kind::kAtomicWrite, __builtin_return_address(0), where), value);
  machine->pass(where, true);
  return before;
}

Vec4 load_data(const void* p, bool once, Where where) {
  watch(p, 16, Kind::kRead, __builtin_return_address(0), where);
  Vec4 value;
  std::memcpy(&value, p, 16);
  if (once) count_reading(static_cast<const char*>(p));
  if (!once) machine->pass(where, true);
  return value;
}

u32 load_host(const u32* p, Where where) {
  watch(p, 4, Kind::kRead, __builtin_return_address(0), where);
  const u32 value = *p;
  machine->pass(where, false);
  return value;
}

void store_host(u64* p, u64 value, Where where) {
  watch(p, 8, Kind::kWrite, __builtin_return_address(0), where);
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  machine->pass(where, false);
}

u32 shared_add(u32* p, u32 value, Where where) {
  const char* begin = shared_memory();
  const char* at = reinterpret_cast<const char*>(p);
  if (at < begin || at + 4 > begin + geometry.shared_bytes) fail(where, "shared_add outside shared memory");
  if (machine->races) machine->races->access(p, 4, Kind::kAtomicWrite, __builtin_return_address(0));
  const u32 before = *p;
  *p += value;
  machine->pass(where, true);
  return before;
}

void release(Where where) {
  const Lane& me = machine->lane();
  machine->clocks.release(me.home->index);
  machine->words.release(me.unit, me.home->index);
  machine->pass(where, true);
}

void acquire(Where where) {
  machine->clocks.acquire(machine->lane().home->index);
  machine->words.acquire(machine->lane().home->index);
  machine->pass(where, true);
}

u64 ticks(Where where) {
  const u64 now = machine->statistics.steps;
  machine->pass(where, false);
  return now;
}

}  // namespace mk::host
