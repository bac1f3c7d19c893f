#include "races.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>

#include "machine.h"

namespace mk::host {

namespace {

struct Image {
  const char *begin, *end;
};

int find_image(dl_phdr_info* info, size_t, void* out) {
  auto* image = static_cast<Image*>(out);
  const char* here = reinterpret_cast<const char*>(&find_image);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
    if (header.p_type != PT_LOAD || here < begin || here >= begin + header.p_memsz) continue;
    image->begin = reinterpret_cast<const char*>(info->dlpi_addr);
    image->end = image->begin;
    for (int j = 0; j < info->dlpi_phnum; j++) {
      const auto& other = info->dlpi_phdr[j];
      if (other.p_type == PT_LOAD) image->end = std::max(image->end, image->begin + other.p_vaddr + other.p_memsz);
    }
    return 1;
  }
  return 0;
}

}  // namespace

Races::Races(Machine& machine, const Options& options) : machine_(machine) {
  Image image{};
  dl_iterate_phdr(find_image, &image);
  image_begin_ = image.begin;
  image_end_ = image.end;
  for (u64 i = 0; i < options.region_count; i++) {
    const Region& r = options.regions[i];
    ranges_.push_back({r.name, r.begin, r.bytes, r.writable != 0, r.blank != 0, r.narrow != 0, false,
                       r.writable ? zeroed<Cell>(r.bytes + 3) : nullptr});
  }
  for (const Unit& unit : machine.units) {
    ranges_.push_back({"shared memory of unit " + std::to_string(unit.index), unit.shared, geometry.shared_bytes, true, true, false, true,
                       zeroed<Cell>(geometry.shared_bytes + 3)});
  }
}

Races::Range* Races::range(const void* p) {
  const char* at = static_cast<const char*>(p);
  auto holds = [at](const Range& r) { return at >= r.begin && at < r.begin + r.bytes; };
  if (last_ && holds(*last_)) return last_;
  for (Range& r : ranges_) {
    if (holds(r)) return last_ = &r;
  }
  return nullptr;
}

bool Races::ordered(const Event& event) const {
  if (event.lane == 0) return true;
  const Lane& me = machine_.lane();
  if (event.lane == me.index + 1) return true;
  return event.clock < machine_.clocks.known(me.home->index, (event.lane - 1) / geometry.wave_size);
}

bool Races::read_before(const Event& event) const {
  if (ordered(event)) return true;
  const Lane &me = machine_.lane(), &other = machine_.lanes[event.lane - 1];
  return other.unit != me.unit && event.clock < machine_.clocks.heard(me.home->index, other.home->index);
}

void Races::access(const void* p, u64 bytes, Kind kind, const void* pc) {
  Lane& me = machine_.lane();
  if (machine_.in_stack(me, p) || (p >= &me && p < &me + 1)) return;  // the latter: unit(), wave() and lane()
  Range* r = range(p);
  if (r == nullptr) {
    if (kind == Kind::kRead && p >= image_begin_ && p < image_end_) return;
    for (const Lane& lane : machine_.lanes) {
      if (machine_.in_stack(lane, p)) machine_.fail(me.where, "a lane's own variables are used by another lane" + place(pc));
    }
    char text[64];
    std::snprintf(text, sizeof text, "%p is in none of the kernel's operands", p);
    machine_.fail(me.where, text + place(pc));
  }
  const u64 offset = static_cast<u64>(static_cast<const char*>(p) - r->begin);
  // A word may have some bytes of what follows.
  if (offset + bytes > (kind == Kind::kAtomicRead ? (r->bytes + 3) / 4 * 4 : r->bytes)) report(*r, offset, "beyond the end", kind, pc, nullptr);
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    report(*r, offset, "an address that is no multiple of its size", kind, pc, nullptr);
  }
  if (!r->writable) {
    if (kind == Kind::kWrite || kind == Kind::kAtomicWrite) report(*r, offset, "only to be read", kind, pc, nullptr);
    return;
  }
  if (r->narrow && kind == Kind::kAtomicRead) return;
  const bool atomic = kind == Kind::kAtomicRead || kind == Kind::kAtomicWrite, reads = kind == Kind::kRead || kind == Kind::kAtomicRead;
  const Event now{me.index + 1, machine_.clocks.now(me.home->index),
                  static_cast<u32>(static_cast<const char*>(pc) - image_begin_), atomic};
  for (u64 i = 0; i < bytes; i++) {
    Cell& cell = r->cells[offset + i];
    if (cell.write.lane == 0 && reads && r->blank) {
      report(*r, offset + i, "not written before", kind, pc, nullptr);
    }
    if (!(atomic && cell.write.atomic) && !ordered(cell.write)) {
      report(*r, offset + i, "a race with a write by", kind, pc, &cell.write);
    }
    if (reads) {
      // Two readers are remembered; one that everybody has waited for is forgotten first.
      cell.reads[ordered(cell.reads[0]) ? 0 : 1] = now;
    } else {
      for (const Event& read : cell.reads) {
        if (!(atomic && read.atomic) && !read_before(read)) report(*r, offset + i, "a race with a read by", kind, pc, &read);
      }
      cell.write = now;
    }
  }
}

void Races::report(const Range& range, u64 offset, const char* what, Kind kind, const void* pc, const Event* other) {
  std::string text = std::string(kind == Kind::kRead || kind == Kind::kAtomicRead ? "reads" : "writes") + " byte " +
                     std::to_string(offset) + " of " + std::to_string(range.bytes) + " of " + range.name + place(pc) + ": " + what;
  if (other) {
    const Lane& lane = machine_.lanes[other->lane - 1];
    text += " unit " + std::to_string(lane.unit) + ", wave " + std::to_string(lane.wave) + ", lane " + std::to_string(lane.lane) +
            place(image_begin_ + other->pc);
  }
  machine_.fail(machine_.lane().where, text);
}

// tests/gpu_host.py replaces it by the line of the source.
std::string Races::place(const void* pc) const {
  char text[32];
  std::snprintf(text, sizeof text, " {+%#zx}", static_cast<size_t>(static_cast<const char*>(pc) - image_begin_));
  return text;
}

}  // namespace mk::host

// ---- What instrumented code calls: the names are those of ThreadSanitizer's and UndefinedBehaviorSanitizer's run times ----

namespace {

void watch(const void* p, unsigned long bytes, mk::host::Races::Kind kind, const void* pc) {
  if (mk::host::machine && mk::host::machine->races && mk::host::current) mk::host::machine->races->access(p, bytes, kind, pc);
}

[[noreturn]] void undefined(const char* what, const void* data) {
  struct {
    const char* file;
    unsigned line, column;
  } where;
  std::memcpy(&where, data, sizeof where);
  mk::host::fail({where.file, static_cast<int>(where.line)}, "undefined behaviour: %s", what);
}

}  // namespace

#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define MK_ACCESS(size)                                                                                                      \
  HOOK __tsan_read##size(void* p) { watch(p, size, mk::host::Races::Kind::kRead, __builtin_return_address(0)); }             \
  HOOK __tsan_write##size(void* p) { watch(p, size, mk::host::Races::Kind::kWrite, __builtin_return_address(0)); }           \
  HOOK __tsan_unaligned_read##size(void* p) { watch(p, size, mk::host::Races::Kind::kRead, __builtin_return_address(0)); }   \
  HOOK __tsan_unaligned_write##size(void* p) { watch(p, size, mk::host::Races::Kind::kWrite, __builtin_return_address(0)); }
MK_ACCESS(1)
MK_ACCESS(2)
MK_ACCESS(4)
MK_ACCESS(8)
MK_ACCESS(16)
HOOK __tsan_read_range(void* p, unsigned long bytes) { watch(p, bytes, mk::host::Races::Kind::kRead, __builtin_return_address(0)); }
HOOK __tsan_write_range(void* p, unsigned long bytes) { watch(p, bytes, mk::host::Races::Kind::kWrite, __builtin_return_address(0)); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}

#define MK_UNDEFINED(name, what) \
  HOOK __ubsan_handle_##name(void* data, ...) { undefined(what, data); }
MK_UNDEFINED(add_overflow, "an addition overflows")
MK_UNDEFINED(sub_overflow, "a subtraction overflows")
MK_UNDEFINED(mul_overflow, "a multiplication overflows")
MK_UNDEFINED(negate_overflow, "a negation overflows")
MK_UNDEFINED(divrem_overflow, "a division by zero, or one that overflows")
MK_UNDEFINED(shift_out_of_bounds, "a shift by too much")
MK_UNDEFINED(out_of_bounds, "an index outside its array")
MK_UNDEFINED(type_mismatch_v1, "a null or misaligned pointer")
MK_UNDEFINED(load_invalid_value, "a bool or enum with another value")
MK_UNDEFINED(vla_bound_not_positive, "an array without elements")
MK_UNDEFINED(pointer_overflow, "a pointer that wraps around")
MK_UNDEFINED(float_cast_overflow, "a float that does not fit an integer")
MK_UNDEFINED(missing_return, "a function without return")
MK_UNDEFINED(builtin_unreachable, "unreachable code")
MK_UNDEFINED(nonnull_arg, "a null argument")
