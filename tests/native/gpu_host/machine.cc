#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

extern "C" void monokernel(mk::Args);

namespace mk::host {

Machine* machine = nullptr;
Place* current = nullptr;

namespace {

u64 bit(u32 i) { return u64{1} << i; }

const char* name_of(Meeting meeting) {
  switch (meeting) {
    case Meeting::kNone:
      return "nothing";
    case Meeting::kWaveSync:
      return "wave_sync";
    case Meeting::kBarrier:
      return "a barrier";
    case Meeting::kShuffle:
      return "shuffle";
    case Meeting::kAny:
      return "any";
    case Meeting::kMma:
      return "mma_16x8x16";
    case Meeting::kMfma:
      return "mfma_4x4x4";
    case Meeting::kRing:
      return "the ring";
  }
  return "?";
}

std::string text(Where where) {
  if (where.file == nullptr) return "the kernel's beginning";
  const char* file = std::strstr(where.file, "gpu/kernel/");
  return std::string(file ? file + std::strlen("gpu/kernel/") : where.file) + ":" + std::to_string(where.line);
}

std::string text(Meeting meeting, u32 detail) {
  if (meeting != Meeting::kBarrier) return name_of(meeting);
  const u32 id = detail >> 16, size = detail & 0xffff;
  if (id >= kFirstGate) return std::string("gate ") + "ABQ"[id - kFirstGate];
  return id == 0 ? "unit_sync" : "group_sync<" + std::to_string(id) + ", " + std::to_string(size) + ">";
}

std::string text(u64 lanes) {
  std::string out;
  for (int i = 0; i < 64; i++) {
    if (!(lanes >> i & 1)) continue;
    int end = i;
    while (end < 63 && (lanes >> (end + 1) & 1)) end++;
    out += (out.empty() ? "" : ",") + std::to_string(i) + (end > i ? "-" + std::to_string(end) : "");
    i = end;
  }
  return out;
}

}  // namespace

Machine::Machine(const Options& options_, Statistics& statistics_)
    : options(options_),
      statistics(statistics_),
      random(options_.seed),
      clocks(geometry.units * geometry.waves),
      words(options_, geometry.units, geometry.units * geometry.waves, clocks, random, statistics_),
      units(geometry.units),
      waves(geometry.units * geometry.waves),
      lanes(waves.size() * geometry.wave_size),
      all_lanes_(geometry.wave_size == 64 ? ~u64{0} : bit(geometry.wave_size) - 1),
      stacks_(lanes.size()) {
  const size_t pitch = (geometry.shared_bytes + 127) / 128 * 128 + kGuardBytes;
  shared_ = static_cast<char*>(std::aligned_alloc(128, kGuardBytes + units.size() * pitch));
  for (size_t i = 0; i < kGuardBytes + units.size() * pitch; i += 4) std::memcpy(shared_ + i, &kUnwritten, 4);
  for (u32 u = 0; u < units.size(); u++) {
    units[u].index = u;
    units[u].shared = shared_ + kGuardBytes + u * pitch;
  }
  for (u32 i = 0; i < waves.size(); i++) {
    Wave& wave = waves[i];
    wave.home = &units[i / geometry.waves];
    wave.index = i;
    wave.in_unit = i % geometry.waves;
    wave.lanes = &lanes[size_t{i} * geometry.wave_size];
    wave.ready = all_lanes_;
  }
  for (u32 i = 0; i < lanes.size(); i++) {
    Lane& lane = lanes[i];
    lane.home = &waves[i / geometry.wave_size];
    lane.index = i;
    lane.unit = lane.home->home->index;
    lane.wave = lane.home->in_unit;
    lane.lane = i % geometry.wave_size;
    lane.where = {};
    stacks_.start(lane.context, i, &Machine::lane_main);
  }
  running_ = static_cast<u32>(lanes.size());
  if (geometry.checked) races = std::make_unique<Races>(*this, options);
}

Machine::~Machine() { std::free(shared_); }

bool Machine::run(std::string& message) {
  Wave& first = choose();
  new_turn(first);
  // take_turn() without a lane to leave.
  const u32 i = static_cast<u32>(first.descending ? 63 - __builtin_clzll(first.turn) : __builtin_ctzll(first.turn));
  first.turn &= ~bit(i);
  current = &first.lanes[i];
  switch_context(main_, first.lanes[i].context);
  current = nullptr;
  if (message_.empty()) message_ = check_shared();
  words.settle_all();
  message = message_;
  return message.empty();
}

void Machine::lane_main() {
  monokernel(machine->options.args);
  machine->end_lane();
}

void Machine::end_lane() {
  Lane& me = lane();
  Wave& wave = *me.home;
  wave.ended |= bit(me.lane);
  wave.ready &= ~bit(me.lane);
  if (--running_ == 0) leave("");
  if (wave.ended == all_lanes_ && wave.open_rings != 0) fail(me.where, "the wave left the kernel without Ring::drain");
  if (wave.ready == 0 && wave.arrived) {
    fail(wave.where, "lanes " + text(wave.arrived) + " wait at " + text(wave.meeting, wave.detail) +
                         " for lanes that have left the kernel");
  }
  go_on();
  __builtin_unreachable();
}

void Machine::leave(const std::string& message) {
  message_ = message;
  switch_context(left_, main_);
  __builtin_unreachable();
}

void Machine::fail(Where where, const std::string& what) {
  const Lane& me = lane();
  leave("unit " + std::to_string(me.unit) + ", wave " + std::to_string(me.wave) + ", lane " + std::to_string(me.lane) +
        ", " + text(where) + ": " + what);
}

// ---- Turns ----

void Machine::new_turn(Wave& wave) {
  wave.turn = wave.ready;
  switch (options.policy) {
    case Policy::kRoundRobin:
    case Policy::kForward:
      return;
    case Policy::kReverse:
      wave.descending = true;
      return;
    default: {
      // Now and then some lanes fall behind.
      const u64 dice = random.next();
      wave.descending = dice & 1;
      if ((dice >> 1) % 8 == 0) {
        const u64 some = wave.ready & random.next();
        if (some) wave.turn = some;
      }
    }
  }
}

inline void Machine::take_turn(Wave& wave) {
  const u32 i = static_cast<u32>(wave.descending ? 63 - __builtin_clzll(wave.turn) : __builtin_ctzll(wave.turn));
  wave.turn &= ~bit(i);
  Lane& me = lane();
  Lane& next = wave.lanes[i];
  if (&next == &me) return;
  statistics.switches++;
  current = &next;
  switch_context(me.context, next.context);
}

void Machine::go_on() {
  Wave& wave = *lane().home;
  if (wave.turn) {
    take_turn(wave);
    return;
  }
  end_step(wave);
  Wave* next = &wave;
  if (run_left_ <= 0 || wave.ready == 0) next = &choose();
  if (!next->turn) new_turn(*next);
  take_turn(*next);
}

void Machine::end_step(Wave& wave) {
  statistics.steps++;
  run_left_--;
  words.settle();
  if (wave.news != words.news() || wave.busy) {
    wave.news = words.news();
    wave.looks = 0;
    wave.busy = false;
  } else if (wave.looked) {
    wave.looks++;
  }
  wave.looked = false;
  if (statistics.steps == options.cancel_step) *const_cast<u32*>(options.args.cancel) = 1;
  if (statistics.steps > options.max_steps) {
    leave("no end after " + std::to_string(options.max_steps) + " steps:\n" + who_waits());
  }
}

void Machine::pass(Where where, bool busy) {
  Lane& me = lane();
  Wave& wave = *me.home;
  me.where = where;
  wave.busy |= busy;
  wave.looked = true;
  go_on();
}

// ---- Meetings ----

bool Machine::meet(Meeting meeting, u32 detail, Where where) {
  Lane& me = lane();
  Wave& wave = *me.home;
  me.where = where;
  if (wave.arrived == 0) {
    wave.meeting = meeting;
    wave.detail = detail;
    wave.where = where;
  } else if (wave.meeting != meeting || wave.detail != detail || wave.where.line != where.line ||
             (wave.where.file != where.file && std::strcmp(wave.where.file, where.file) != 0)) {
    fail(where, "the lane is at " + text(meeting, detail) + " while lanes " + text(wave.arrived) + " of the wave wait at " +
                    text(wave.meeting, wave.detail) + ", " + text(wave.where));
  }
  wave.arrived |= bit(me.lane);
  if (wave.arrived == all_lanes_) return true;
  wave.ready &= ~bit(me.lane);
  if (wave.ready == 0) {
    fail(where, "lanes " + text(wave.arrived) + " wait at " + text(meeting, detail) + " for lanes that have left the kernel");
  }
  go_on();
  return false;
}

void Machine::part() {
  Wave& wave = *lane().home;
  wave.arrived = 0;
  wave.phase ^= 1;
  wave.ready = all_lanes_;
  wave.turn = all_lanes_ & ~bit(lane().lane);
  end_step(wave);
  if (run_left_ <= 0) {
    Wave& next = choose();
    if (&next == &wave) return;
    wave.turn = 0;  // as any wave that another one interrupts: all lanes, this one too, have a turn when it goes on
    if (!next.turn) new_turn(next);
    take_turn(next);
  }
}

void Machine::barrier(u32 id, u32 size, bool waits, Where where) {
  if (!meet(Meeting::kBarrier, id << 16 | size, where)) return;
  Wave& wave = *lane().home;
  Unit& unit = *wave.home;
  Barrier& barrier = unit.barriers[id];
  if (barrier.here && barrier.size != size) {
    fail(where, text(Meeting::kBarrier, wave.detail) + ", but other waves wait there as " +
                    text(Meeting::kBarrier, id << 16 | barrier.size));
  }
  if (barrier.here & bit(wave.in_unit)) {
    fail(where, "wave " + std::to_string(wave.in_unit) + " comes to " + text(Meeting::kBarrier, wave.detail) +
                    " again before the others have come at all");
  }
  barrier.size = size;
  barrier.here |= bit(wave.in_unit);
  clocks.come(wave.index, barrier.met);
  words.come(wave.index, barrier.acquired);
  if (waits) barrier.waiting |= bit(wave.in_unit);
  if (static_cast<u32>(__builtin_popcountll(barrier.here)) < size) {
    if (!waits) {
      part();
      return;
    }
    wave.ready = 0;
    go_on();
    return;
  }
  if (barrier.members && barrier.members != barrier.here) {
    fail(where, "waves " + text(barrier.here) + " meet at " + text(Meeting::kBarrier, wave.detail) +
                    ", where waves " + text(barrier.members) + " met before");
  }
  const Barrier done = std::exchange(barrier, Barrier{.members = barrier.here});
  for (u64 left = done.waiting; left; left &= left - 1) {
    Wave& other = waves[unit.index * geometry.waves + static_cast<size_t>(__builtin_ctzll(left))];
    clocks.go_on(other.index, done.met);
    words.go_on(other.index, done.acquired);
    other.looks = 0;
    if (&other == &wave) continue;
    other.arrived = 0;
    other.phase ^= 1;
    other.ready = all_lanes_;
    other.turn = 0;
  }
  part();
}

// ---- Messages ----

std::string Machine::who_waits() const {
  std::string out;
  for (const Wave& wave : waves) {
    if (wave.ended == all_lanes_) continue;
    out += "unit " + std::to_string(wave.home->index) + ", wave " + std::to_string(wave.in_unit) + ":";
    if (wave.ended) out += " lanes " + text(wave.ended) + " have ended;";
    if (wave.arrived) {
      out += " lanes " + text(wave.arrived) + " wait at " + text(wave.meeting, wave.detail) + ", " + text(wave.where) + ";";
    }
    // Of the others, those in one place together.
    u64 left = wave.ready;
    while (left) {
      const Where where = wave.lanes[__builtin_ctzll(left)].where;
      u64 here = 0;
      for (u64 i = left; i; i &= i - 1) {
        const Lane& lane = wave.lanes[__builtin_ctzll(i)];
        if (lane.where.line == where.line && lane.where.file == where.file) here |= i & -i;
      }
      out += " lanes " + text(here) + " were last at " + text(where) + ";";
      left &= ~here;
    }
    out.back() = '\n';
  }
  return out;
}

std::string Machine::check_shared() const {
  for (const Unit& unit : units) {
    for (const char* guard : {unit.shared - kGuardBytes, unit.shared + (geometry.shared_bytes + 3) / 4 * 4}) {
      for (size_t i = 0; i < kGuardBytes; i += 4) {
        if (std::memcmp(guard + i, &kUnwritten, 4) != 0) {
          return "unit " + std::to_string(unit.index) + " wrote outside its shared memory, at byte " +
                 std::to_string(guard + i - unit.shared) + " of " + std::to_string(geometry.shared_bytes);
        }
      }
    }
  }
  return "";
}

// ---- What arch/host.h calls ----

void fail(Where where, const char* format, ...) {
  char message[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  machine->fail(where, message);
}

char* shared_memory() { return machine->lane().home->home->shared; }

void wave_sync(Where where) {
  if (!machine->meet(Meeting::kWaveSync, 0, where)) return;
  machine->clocks.advance(machine->lane().home->index);
  machine->part();
}

void barrier(u32 id, u32 waves, Where where) { machine->barrier(id, waves, true, where); }
void arrive(u32 id, u32 waves, Where where) { machine->barrier(id, waves, false, where); }

u32 shuffle(u32 value, u32 from, Where where) {
  Lane& me = machine->lane();
  Wave& wave = *me.home;
  if (from >= geometry.wave_size) fail(where, "shuffle from lane %d of %u", static_cast<int>(from), geometry.wave_size);
  const u32* values = wave.values[wave.phase];
  wave.values[wave.phase][me.lane] = value;
  if (machine->meet(Meeting::kShuffle, 0, where)) machine->part();
  return values[from];
}

bool any(bool value, Where where) {
  Wave& wave = *machine->lane().home;
  bool& some = wave.some[wave.phase];
  if (wave.arrived == 0) some = false;
  some |= value;
  if (machine->meet(Meeting::kAny, 0, where)) machine->part();
  return some;
}

void ring_meet(const char*, Where where) {
  if (!machine->meet(Meeting::kRing, 0, where)) return;
  machine->clocks.advance(machine->lane().home->index);
  machine->lane().home->busy = true;
  machine->part();
}

void ring_open(int change) { machine->lane().home->open_rings += change; }

}  // namespace mk::host
