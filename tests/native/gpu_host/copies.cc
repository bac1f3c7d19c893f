// Copies from device memory to shared memory. Each is made when it is requested or when it is waited for, as chance will have it.
#include <cstring>

#include "machine.h"

namespace mk::host {

namespace {

CopyBarrier& barrier_at(u64* at, Where where) {
  const auto found = machine->copies.find(at);
  if (found == machine->copies.end()) fail(where, "%p is no barrier of copies", static_cast<void*>(at));
  return found->second;
}

// What other units see of device memory, even of words that this one has stored since.
void make(const CopyBarrier::Copy& copy, const void* pc) {
  for (u64 at = 0; machine->races && at < copy.bytes; at += 16) {
    machine->races->access(copy.from + at, 16, Races::Kind::kAtomicRead, pc);
    machine->races->access(copy.to + at, 16, Races::Kind::kWrite, pc);
  }
  std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace

void make_copy_barrier(u64* barrier, Where where) {
  if (!machine->copies.emplace(barrier, CopyBarrier{}).second) fail(where, "a barrier of copies is made for the second time");
}

void announce_copies(u64* barrier, int bytes, Where where) {
  CopyBarrier& b = barrier_at(barrier, where);
  if (bytes <= 0) fail(where, "%d bytes are announced", bytes);
  if (b.announced > 0) fail(where, "copies are announced before those announced last were waited for");
  b.announced = static_cast<u64>(bytes);
}

void copy_in(void* to, const void* from, int bytes, u64* barrier, Where where) {
  CopyBarrier& b = barrier_at(barrier, where);
  const CopyBarrier::Copy copy{static_cast<char*>(to), static_cast<const char*>(from), static_cast<u64>(bytes)};
  const char* shared = shared_memory();
  if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail(where, "a copy of %d bytes from %p to %p", bytes, from, to);
  }
  if (copy.to < shared || copy.to + bytes > shared + geometry.shared_bytes) fail(where, "a copy to %p, outside shared memory", to);
  if (machine->words.find(from, copy.bytes) == Words::kNone) fail(where, "a copy of %d bytes from %p, which is in none of the operands", bytes, from);
  b.requested += copy.bytes;
  machine->lane().where = where;
  if (machine->random.one_in(2)) {
    make(copy, __builtin_return_address(0));
  } else {
    b.waiting.push_back(copy);
  }
  machine->pass(where, true);
}

void await_copies(u64* barrier, u32 parity, Where where) {
  if (!machine->meet(Meeting::kRing, 1, where)) return;
  CopyBarrier& b = barrier_at(barrier, where);
  if (b.announced == 0) fail(where, "copies are waited for that nobody has announced");
  if (b.requested != b.announced) fail(where, "%llu bytes were announced, and copies of %llu requested", b.announced, b.requested);
  if (b.phase % 2 != parity) fail(where, "the wait is for parity %u, but phase %llu comes next", parity, b.phase);
  for (const CopyBarrier::Copy& copy : b.waiting) make(copy, __builtin_return_address(0));
  b = {.phase = b.phase + 1, .announced = 0, .requested = 0, .waiting = {}};
  machine->clocks.advance(machine->lane().home->index);
  machine->lane().home->busy = true;
  machine->part();
}

void publish_to_copies(Where where) {
  const Lane& me = machine->lane();
  machine->words.release(me.unit, me.home->index);
  machine->pass(where, true);
}

}  // namespace mk::host
