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
  static const Region* last = nullptr;
  const Region* end = machine->options.regions + machine->options.region_count;
  if (last == nullptr || at < last->begin || at + bytes > last->begin + last->bytes) {
    for (last = machine->options.regions; last != end; last++) {
      if (at >= last->begin && at + bytes <= last->begin + last->bytes) break;
    }
    if (last == end) {
      last = nullptr;
      fail(where, "%p is in none of the kernel's operands", p);
    }
  }
  if (kind != Kind::kRead && !last->writable) fail(where, "%s is only to be read", last->name);
}

void check_word(const void* p, u64 bytes, Where where) {
  if (!machine->words.holds(p)) fail(where, "%p is no word of the workspace", p);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(where, "%p is no multiple of %llu bytes", p, bytes);
}

}  // namespace

u32 load_word(const u32* p, Where where) {
  const Lane& me = machine->lane();
  check_word(p, 4, where);
  const u32 value = machine->words.load(p, me.unit, me.home->index);
  machine->pass(where, false);
  return value;
}

Vec4 load_words(const u32* p, Where where) {
  const Lane& me = machine->lane();
  check_word(p, 16, where);
  const Vec4 value{machine->words.load(p, me.unit, me.home->index), machine->words.load(p + 1, me.unit, me.home->index),
                   machine->words.load(p + 2, me.unit, me.home->index), machine->words.load(p + 3, me.unit, me.home->index)};
  machine->pass(where, false);
  return value;
}

void store_word(u32* p, u32 value, Where where) {
  const Lane& me = machine->lane();
  check_word(p, 4, where);
  machine->words.store(p, value, me.unit, me.home->index);
  machine->pass(where, true);
}

bool claim(u32* p, Where where) {
  check_word(p, 4, where);
  const bool first = machine->words.claim(p);
  machine->pass(where, true);
  return first;
}

Vec4 load_data(const void* p, bool once, Where where) {
  watch(p, 16, Kind::kRead, __builtin_return_address(0), where);
  Vec4 value;
  std::memcpy(&value, p, 16);
  if (!once) machine->pass(where, true);
  return value;
}

u32 load_host(const u32* p, Where where) {
  watch(p, 4, Kind::kRead, __builtin_return_address(0), where);
  const u32 value = *p;
  machine->pass(where, false);
  return value;
}

u32 shared_add(u32* p, u32 value, Where where) {
  const char* begin = shared_memory();
  const char* at = reinterpret_cast<const char*>(p);
  if (at < begin || at + 4 > begin + geometry.shared_bytes) fail(where, "shared_add outside shared memory");
  if (machine->races) machine->races->access(p, 4, Kind::kAtomic, __builtin_return_address(0));
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
