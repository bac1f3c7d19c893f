// The machine that arch/host.h runs the kernel on: units of waves of lanes, each lane a fiber, all of them on one thread.
//
// A wave's lanes take turns: each runs until an operation that other units can notice, or until it has to wait for the
// wave's other lanes. When all had their turn, a step is over; steps are the machine's clock, and after some of them the
// policy picks the wave that goes on.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "races.h"

namespace mk::host {

struct Unit;
struct Wave;

struct Lane : Place {
  Context context;
  Wave* home;
  u32 index;           // of all lanes of the machine
  Where where;         // the last operation
  Matrices* matrices;  // of the instruction that the lane waits at
};

// What lanes of a wave wait for each other at.
enum class Meeting : u8 { kNone, kWaveSync, kBarrier, kShuffle, kAny, kMma, kMfma, kRing };

struct Wave {
  Unit* home;
  Lane* lanes;
  u32 index;               // of all waves of the machine
  u32 in_unit;
  u64 ready = 0;           // lanes that can go on
  u64 turn = 0;            // those of them whose turn is still to come in this step
  u64 ended = 0;
  bool descending = false;  // order of this step

  // The meeting that lanes have arrived at.
  Meeting meeting = Meeting::kNone;
  u32 detail = 0;  // the same for all lanes: a barrier's id and size
  Where where{};
  u64 arrived = 0;
  u32 phase = 0;  // 0 and 1 by turns, so that the fastest lane does not overwrite what others have yet to read
  u32 values[2][64];
  bool some[2] = {};

  // Whether the wave does nothing but look for news.
  bool busy = false, looked = false;  // in this step
  u32 looks = 0;      // steps without anything else since
  u64 news = 0;       // Words::news()
  u64 last_step = 0;  // when the policy picked it last
  int open_rings = 0;
};

struct Barrier {
  u32 size = 0;     // waves
  u64 here = 0;     // waves that have come
  u64 waiting = 0;  // those of them that wait for the others
  u64 members = 0;  // that met here before
  Clocks::Met met{};
  u64 acquired = 0;
};

// A barrier for copies to shared memory.
struct CopyBarrier {
  struct Copy {
    char* to;
    const char* from;
    u64 bytes;
  };
  u64 phase = 0;             // that is waited for next
  u64 announced = 0;         // bytes of it; 0: nothing was announced
  u64 requested = 0;
  std::vector<Copy> waiting;  // copies that have not been made yet
};

struct Unit {
  u32 index;
  char* shared;
  Barrier barriers[kBarriers];
};

class Machine {
 public:
  Machine(const Options& options, Statistics& statistics);
  ~Machine();

  // Runs the kernel to its end. False: it failed, and `message` says why.
  bool run(std::string& message);

  // Ends a turn of the current lane after an operation. busy: it was more than a look.
  void pass(Where where, bool busy);
  // Waits for all lanes of the wave. True for the one that came last; the others wait until it calls part().
  bool meet(Meeting meeting, u32 detail, Where where);
  void part();
  void barrier(u32 id, u32 size, bool waits, Where where);
  [[noreturn]] void fail(Where where, const std::string& what);

  Lane& lane() const { return *static_cast<Lane*>(current); }
  u32 wave_size() const { return geometry.wave_size; }
  bool in_stack(const Lane& lane, const void* p) const { return p >= stacks_.bottom(lane.index) && p < stacks_.end(lane.index); }

  const Options& options;
  Statistics& statistics;
  Random random;
  Clocks clocks;
  Words words;
  std::vector<Unit> units;
  std::vector<Wave> waves;
  std::vector<Lane> lanes;
  std::unique_ptr<Races> races;  // null in builds without instrumentation
  std::map<const u64*, CopyBarrier> copies;
  std::unordered_map<size_t, u32> near;  // words that stay on a die -> its number + 1
  const Region* last_watched = options.regions + options.region_count;  // that held an address

 private:
  static constexpr size_t kGuardBytes = 4096;  // around every unit's shared memory

  static void lane_main();
  [[noreturn]] void leave(const std::string& message);
  [[noreturn]] void end_lane();
  void end_step(Wave& wave);
  void go_on();  // with another lane: the current one has had its turn
  void take_turn(Wave& wave);
  void new_turn(Wave& wave);

  // schedule.cc
  Wave& choose();
  Wave* choose_by_rank();
  Wave* choose_in_order();
  Wave* any_of(const std::vector<Wave*>& from);
  bool looks_for_news(const Wave& wave) const;

  std::string who_waits() const;
  std::string check_shared() const;

  u64 all_lanes_;
  Stacks stacks_;
  char* shared_;
  Context main_{}, left_{};
  std::string message_;
  u32 running_ = 0;   // lanes that have not ended
  i64 run_left_ = 0;  // steps until the policy picks again
  size_t cursor_ = 0;  // of round robin
  std::vector<Wave*> candidates_;
};

extern Machine* machine;

}  // namespace mk::host
