// Where units are. With MK_NEAR, words that stay inside a group go no further than the cache that the units of one die share, so
// all units of a group must be on one: a work-group takes the next free number of its die's group. If there is none, on any die,
// every unit leaves before it has done anything, and the host launches the kernel without MK_NEAR.
//
// With MK_PLACED, each die has units whose weights are near to it, and a work-group takes the next free number of its die's. Without
// MK_NEAR only speed depends on that: work-groups of a die that has more of them than units wait until all have looked, and take
// the numbers that are left over.
#pragma once

#include "sync/words.h"

#if MK_NEAR || defined(MK_PLACED)

namespace mk {

#if defined(MK_PLACED)
// The units of a die.
struct Share {
  int begin, count;
};

// die: or kDies, for the units that no die has. Whatever the table says, each unit has one place.
MK_DEVICE Share share_of(const Args& args, int die) {
  int begin = 0, end = 0;
  for (int d = 0; d <= die; d++) {
    begin = end;
    end = d == kDies ? MK_UNITS : smaller(MK_UNITS, end + larger(0, smaller(MK_UNITS, args.die_units[d])));
  }
  return {begin, end - begin};
}

// The unit for the work-group that was the nth, from 0, to find no number of its die's, when all have looked.
MK_DEVICE int left_over(const Args& args, u32* taken, int nth) {
  for (int d = 0; d <= kDies; d++) {
    const Share share = share_of(args, d);
    // An addition (that compilers do not see to be of 0): a load could give what was there before others took numbers.
    const int used = d == kDies ? 0 : smaller(share.count, (int)arch::add(taken + d * 32, (u32)arch::unknown(0)));
    if (nth < share.count - used) return share.begin + used + nth;
    nth -= share.count - used;
  }
  return arch::unit();  // not reached: there are as many units as work-groups
}
#endif

// By all waves, once. False: the unit is to leave.
MK_DEVICE bool find_place(const Args& args) {
  int* place = shared_at<int>(kShared.place);
  if (arch::wave() == 0) {
    // h12: how many units have looked, and << 16 how many of them have found no number.
    u32* looked = (u32*)((char*)args.workspace + kWorkspace.places);
    u32* taken = looked + 32;  // [dies] lines
    if (arch::lane() == 0) {
      const u32 die = arch::die();
#if defined(MK_PLACED)
      const Share share = share_of(args, (int)die);
      const int number = (int)arch::add(taken + die * 32, 1);
      bool found = number < share.count;
      if (MK_NEAR) found = found && share.begin % kMembers == 0 && share.count == kMembers;
      const u32 before = arch::add(looked, found ? 1u : 1u | 1u << 16);
      place[0] = found ? share.begin + number : (int)(before >> 16);
      place[1] = !MK_NEAR && found;
#else
      const u32 number = die < (u32)kGroups ? arch::add(taken + die * 32, 1) : (u32)kMembers;
      const bool found = number < (u32)kMembers;
      place[0] = found ? (int)(die * kMembers + number) : arch::unit();
      place[1] = 0;
      arch::add(looked, found ? 1u : 1u | 1u << 16);
#endif
    }
    arch::wave_sync();
    // Where words do not stay on dies, whoever has found a number need not wait.
    if (MK_NEAR || arch::shared_number(place + 1) == 0) {
      Waiter waiter = {&args, false};
      const Site site = {looked, h12_places, 0, 0, 0};
      u32 seen = arch::load_word(looked);
      u64 deadline = 0;
      for (int spins = 1; (seen & 0xffffu) != MK_UNITS; spins++) {
        const auto find = [&] { return Missing{0, MK_UNITS, seen}; };
        if (spins % kSpinsBetweenLooks == 0 && give_up(waiter, site, spins == kSpinsBetweenLooks, deadline, find)) break;
        seen = arch::load_word(looked);
      }
#if !MK_NEAR
      arch::wave_sync();  // all lanes have seen that there was none
#endif
      if (arch::lane() == 0) {
#if MK_NEAR
        place[1] = seen == MK_UNITS;
        if (!waiter.aborted && seen != MK_UNITS && arch::claim(waiter.abort())) {
          args.report->expected = MK_UNITS;
          args.report->seen = seen;
          args.report->reason = kMisplaced;
        }
#else
        place[0] = left_over(args, taken, place[0]);
        place[1] = !waiter.aborted;
#endif
      }
    }
  }
  arch::unit_sync();
  return arch::shared_number(place + 1) != 0;
}

}  // namespace mk

#endif  // MK_NEAR || MK_PLACED
